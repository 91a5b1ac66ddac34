# SPDX-License-Identifier: Apache-2.0
"""The engine against transformers' generate, and what it promises about requests."""

import random

import pytest
import torch

import tiny
from fastpost import linear_logprob
from fastpost.generate import Engine, Request, Sampling
from fastpost.hf.cached_attention import NAME
from prompts import greedy, unequal

PROMPTS = unequal(12)
TOKENS = [random.Random(i).randint(1, 30) for i in range(12)]


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def drained(engine) -> bool:
    return engine.pages.used == 0 and not engine._schedule


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2", "mixtral", "jetmoe"])
def test_greedy_is_transformers_token_by_token(kind, tokenizer):
    """12 unequal requests, four at a time, prompts in pieces of 16, and so few pages that sequences are preempted."""
    model = tiny.model(kind)
    want = [greedy(model, p, n) for p, n in zip(PROMPTS, TOKENS, strict=True)]
    with Engine(model, tokenizer, page=4, pages=24, max_batch=4, prefill_tokens=16) as engine:
        got = engine.generate([Request(p, Sampling(max_new_tokens=n)) for p, n in zip(PROMPTS, TOKENS, strict=True)])
        assert engine.stats()["preempted"] > 0
        assert drained(engine)
    assert [c.token_ids for (c,) in got] == want
    assert [c.id for (c,) in got] == list(range(12))
    for (c,), ids in zip(got, want, strict=True):
        assert c.finish_reason == ("stop" if ids[-1] == 2 else "length")
        assert c.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_answers_do_not_depend_on_batch_page_or_order(model, tokenizer):
    """Sampled with different wishes; the random numbers go with the request, whoever runs beside it."""
    wishes = [Sampling(max_new_tokens=n, temperature=0.5 + 0.1 * i, top_p=0.9, n=1 + i % 3, seed=5)
              for i, n in enumerate(TOKENS)]  # fmt: skip
    requests = [Request(p, s, id=f"row {i}") for i, (p, s) in enumerate(zip(PROMPTS, wishes, strict=True))]

    def answers(requests, **options):
        with Engine(model, tokenizer, **options) as engine:
            return {(c.id, c.index): c.token_ids for group in engine.generate(requests) for c in group}

    want = answers(requests, page=16, pages=500)
    assert len(want) == sum(s.n for s in wishes)
    assert answers(requests[::-1], page=4, pages=25, max_batch=3, prefill_tokens=7) == want
    assert answers(requests[:1], reuse_prefix=False) == {key: ids for key, ids in want.items() if key[0] == "row 0"}
    assert len({tuple(ids) for ids in want.values()}) == len(want)


def test_run_yields_each_answer_once_and_takes_requests_as_there_is_room(model, tokenizer):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield Request([7 + taken % 300, 8], Sampling(max_new_tokens=1 + taken % 5, n=2, ignore_eos=True))

    with Engine(model, tokenizer, max_batch=4) as engine:
        answers = engine.run(endless())
        seen = [next(answers) for _ in range(40)]
        assert taken < 40
    assert len({(c.id, c.index) for c in seen}) == 40
    for c in seen:
        assert len(c.token_ids) == 1 + (c.id + 1) % 5 and c.finish_reason == "length"


def test_answers_of_one_prompt_share_its_pages(model, tokenizer):
    prompt = PROMPTS[0] * 3
    with Engine(model, tokenizer, page=4, pages=200, reuse_prefix=False) as engine:
        handles = engine.submit(Request(prompt, Sampling(max_new_tokens=6, temperature=1.0, n=8, ignore_eos=True)))
        engine.step()
        assert engine.stats()["prompt_tokens"] == len(prompt)
        assert all(h.pages == handles[0].pages for h in handles)
        assert engine.pages.used == -(-len(prompt) // 4)
        while engine._schedule:
            engine.step()
        assert engine.stats()["prompt_tokens"] == len(prompt)
        assert engine.pages.peak <= len(prompt) // 4 + 8 * 3
        assert drained(engine)
    assert len({tuple(h.token_ids) for h in handles}) == 8


def test_a_prompt_that_begins_like_an_earlier_one_is_not_computed_again(model, tokenizer):
    first, second = PROMPTS[0][:20], PROMPTS[0][:20] + PROMPTS[1][:5]
    want = greedy(model, second, 8)
    with Engine(model, tokenizer, page=4, pages=50) as engine:
        engine.generate([Request(first, Sampling(max_new_tokens=3))])
        ((answer,),) = engine.generate([Request(second, Sampling(max_new_tokens=8))])
        assert engine.stats()["reused_tokens"] == 20
    assert answer.token_ids == want


def test_end_tokens_end_unless_they_are_to_be_ignored(model, tokenizer):
    ids = greedy(model, PROMPTS[0], 9)
    model.generation_config.eos_token_id = [300, ids[4]]
    try:
        with Engine(model, tokenizer) as engine:
            ((stopped,), (whole,)) = engine.generate(
                Request(PROMPTS[0], Sampling(max_new_tokens=9, ignore_eos=ignore)) for ignore in (False, True)
            )
    finally:
        model.generation_config.eos_token_id = 2
    first = ids.index(ids[4])
    assert stopped.token_ids == ids[: first + 1] and stopped.finish_reason == "stop" and stopped.stop is None
    assert whole.token_ids == ids and whole.finish_reason == "length"


def test_the_models_positions_bound_an_answer(model, tokenizer):
    prompt = [9] * 505
    with Engine(model, tokenizer) as engine:
        ((c,),) = engine.generate([Request(prompt, Sampling(max_new_tokens=50, ignore_eos=True))])
    assert len(c.token_ids) == 512 - 505 and c.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_trainers(tokenizer, dtype, temperature):
    """Of each sampled token, by linear_logprob on the hidden states of the whole row."""
    model = tiny.model().to(dtype)
    s = Sampling(max_new_tokens=20, temperature=temperature, top_p=0.8, logprobs=3, ignore_eos=True)
    with Engine(model, tokenizer, page=4, prefill_tokens=16) as engine:
        completions = [c for (c,) in engine.generate([Request(p, s) for p in PROMPTS])]
    for prompt, c in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([prompt + c.token_ids])
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[0]
            want = linear_logprob(hidden[:-1], model.lm_head.weight, ids[0, 1:], temperature=temperature or 1.0)
        want = want[len(prompt) - 1 :]
        # bfloat16 logits of about 8 are rounded by up to 1/64, at this temperature 0.02; and the row is computed by
        # other products.
        tolerance = 2e-4 if dtype is torch.float32 else 0.25
        error = (torch.tensor(c.logprobs) - want).abs()
        assert error.max() < tolerance and error.mean() < tolerance / 4
        for token, logprob, top in zip(c.token_ids, c.logprobs, c.top_logprobs, strict=True):
            assert len(top) == 3 and top[0][1] >= logprob - 1e-6
            assert dict(top).get(token, logprob) == pytest.approx(logprob, abs=1e-5)


def test_a_callback_sees_prompt_and_answer_and_steers(model, tokenizer):
    seen = []

    def count_up(ids, logits):
        seen.append(list(ids))
        logits[:] = -torch.inf
        logits[ids[-1] + 1] = 0

    with Engine(model, tokenizer) as engine:
        ((c,),) = engine.generate([Request([10], Sampling(max_new_tokens=4, logits_callback=count_up))])
    assert c.token_ids == [11, 12, 13, 14]
    assert seen == [[10], [10, 11], [10, 11, 12], [10, 11, 12, 13]]


def test_a_callback_that_raises_leaves_an_engine_that_goes_on(model, tokenizer):
    def once(ids, logits):
        if len(ids) == len(PROMPTS[0]) + 3 and not failed:
            failed.append(True)
            raise KeyError("mine")

    failed = []
    want = [greedy(model, p, 9) for p in PROMPTS[:3]]
    with Engine(model, tokenizer, page=4) as engine:
        handles = [engine.submit(Request(p, Sampling(max_new_tokens=9, logits_callback=once)))[0] for p in PROMPTS[:3]]
        with pytest.raises(KeyError, match="mine"):
            while engine._schedule:
                engine.step()
        while engine._schedule:
            engine.step()
        assert [h.token_ids for h in handles] == want and drained(engine)


def test_the_model_is_put_back_as_it_was(tokenizer):
    model = tiny.model()
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    kinds = [type(m) for m in model.modules()]
    before = model.config._attn_implementation
    engine = Engine(model, tokenizer)
    assert model.config._attn_implementation == NAME and not model.training
    engine.pause()
    assert [m.training for m in model.modules()] == modes and model.config._attn_implementation == before
    with pytest.raises(ValueError, match=r"After pause\(\) call resume\(\)"):
        engine.generate([Request([7, 8], Sampling(max_new_tokens=2))])
    engine.resume()
    engine.generate([Request([7, 8], Sampling(max_new_tokens=2))])
    engine.close()
    engine.close()
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == kinds
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="this engine is closed"):
        engine.step()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "prompt: expected at least one token id, got none"),
        (Request([5, 320]), r"prompt: expected token ids in \[0, 320\), got 320"),
        (Request([-1]), r"prompt: expected token ids in \[0, 320\), got -1"),
        (Request([5] * 512), "prompt: expected fewer than the model's 512 positions, got 512 tokens"),
        (Request([5] * 30, Sampling(max_new_tokens=12)), r"at most 40 positions \(10 pages of 4\), got 41"),
    ],
)
def test_a_request_that_can_never_run_is_refused(model, tokenizer, request_, message):
    with Engine(model, tokenizer, page=4, pages=10) as engine:
        with pytest.raises(ValueError, match=rf"\[Engine\] .*{message}"):
            engine.submit(request_)
        ((c,),) = engine.generate([Request([5] * 30, Sampling(max_new_tokens=11, ignore_eos=True))])  # just fits
        assert len(c.token_ids) == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page": 0}, "page: expected at least 1, got 0"),
        ({"max_batch": 0}, "max_batch: expected at least 1, got 0"),
        ({"prefill_tokens": -1}, "prefill_tokens: expected at least 1, got -1"),
        ({"pages": 0}, "pages: expected room for a page of 4096 bytes, got 0"),
        ({"memory": 4095}, "memory: expected room for a page of 4096 bytes, got 4095"),
        ({"memory": 5000, "pages": 1}, "pages, memory: expected one of the two, got both"),
    ],
)
def test_an_engine_that_makes_no_sense_is_refused(model, tokenizer, options, message):
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=rf"\[Engine\] {message}"):
        Engine(model, tokenizer, **options)
    assert model.config._attn_implementation == before


def test_memory_counts_in_bytes(model, tokenizer):
    with Engine(model, tokenizer, memory=4096 * 7 + 100) as engine:
        assert engine.stats()["pages"] == 7
        assert sum(store.nbytes for store in engine.cache.stores) == 4096 * 7


def test_without_a_tokenizer_there_are_tokens_only(model):
    with Engine(model) as engine:
        ((c,),) = engine.generate([Request([7, 8], Sampling(max_new_tokens=3))])
        assert c.token_ids == greedy(model, [7, 8], 3) and c.text == ""
        with pytest.raises(ValueError, match="stop: expected a tokenizer"):
            engine.submit(Request([7], Sampling(stop="x")))


def test_two_engines_of_a_model_do_not_go_on_with_what_the_other_left(tokenizer):
    model = tiny.model()
    first, second = Engine(model, tokenizer), Engine(model, tokenizer)
    first.close()
    with pytest.raises(ValueError, match="let no two engines have a model at the same time"):
        second.generate([Request([7, 8], Sampling(max_new_tokens=2))])
    second.close()
