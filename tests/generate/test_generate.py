# SPDX-License-Identifier: Apache-2.0
"""generate(): answers to prompts in order."""

import pytest
import torch

import tiny
from fastpost.generate import generate
from fastpost.generate.sample import encode
from prompts import greedy

PROMPTS = ["What is the sum?", "seven apples", [{"role": "user", "content": "in the basket"}], "two", "numbers?"] * 3


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def test_greedy_answers_are_transformers_in_order(model, tokenizer):
    want = [
        [tokenizer.decode(greedy(model, encode(tokenizer, p), 12), skip_special_tokens=True).strip()] for p in PROMPTS
    ]
    assert list(generate(model, tokenizer, PROMPTS, max_new_tokens=12, samples=3, max_batch=4)) == want


def test_sample_j_of_prompt_i_depends_on_seed_i_and_j_alone(model, tokenizer):
    options = {"max_new_tokens": 10, "temperature": 1.0, "top_p": 0.95, "samples": 3}
    want = list(generate(model, tokenizer, PROMPTS, seed=4, **options))
    assert all(len(answers) == 3 for answers in want)
    assert list(generate(model, tokenizer, PROMPTS, seed=4, max_batch=2, **options)) == want
    assert list(generate(model, tokenizer, PROMPTS[:2], seed=4, **options)) == want[:2]
    one = list(generate(model, tokenizer, PROMPTS[:2], seed=4, **(options | {"samples": 1})))
    assert one == [answers[:1] for answers in want[:2]]
    assert list(generate(model, tokenizer, PROMPTS, seed=5, **options)) != want
    assert want[0] != want[5]  # the same prompt under another number


def test_the_models_own_repetition_penalty_counts(model, tokenizer):
    model.generation_config.repetition_penalty = 1.7
    try:
        want = [tokenizer.decode(greedy(model, encode(tokenizer, "seven"), 12), skip_special_tokens=True).strip()]
        (got,) = generate(model, tokenizer, ["seven"], max_new_tokens=12)
    finally:
        model.generation_config.repetition_penalty = None
    assert got == want
    assert [want] != list(generate(model, tokenizer, ["seven"], max_new_tokens=12))


def test_between_answers_and_after_the_model_is_as_it_was(tokenizer):
    model = tiny.model().train()
    kinds, before = [type(m) for m in model.modules()], model.config._attn_implementation
    answers = generate(model, tokenizer, PROMPTS[:3], max_new_tokens=4)
    for turn in range(3):
        assert model.training and model.config._attn_implementation == before
        assert [type(m) for m in model.modules()] == kinds
        if turn < 2:
            next(answers)
    answers.close()
    assert model.training and [type(m) for m in model.modules()] == kinds


def test_an_empty_prompt_is_named_after_the_answers_before_it(model):
    plain = tiny.tokenizer(template=None)
    answers = generate(model, plain, ["seven", "apples", "", "two"], max_new_tokens=3)
    assert len([next(answers), next(answers)]) == 2
    with pytest.raises(ValueError, match=r"\[generate\] prompt 2: expected at least one token"):
        next(answers)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"samples": 0}])
def test_options_out_of_range_are_refused(model, tokenizer, options):
    with pytest.raises(ValueError, match=r"\[generate\] options: expected"):
        generate(model, tokenizer, ["x"], **options)


def test_a_model_that_the_engine_does_not_take_answers_through_transformers(tokenizer):
    import transformers

    config = transformers.MambaConfig(
        vocab_size=320, hidden_size=16, state_size=4, num_hidden_layers=1, eos_token_id=2, pad_token_id=0
    )
    model = transformers.MambaForCausalLM(config).eval()
    with pytest.warns(UserWarning, match="one at a time"):
        answers = generate(model, tokenizer, ["seven"], max_new_tokens=3)
    ids = encode(tokenizer, "seven")
    want = tokenizer.decode(greedy(model, ids, 3), skip_special_tokens=True).strip()
    assert list(answers) == [[want]]
    assert torch.is_grad_enabled()
