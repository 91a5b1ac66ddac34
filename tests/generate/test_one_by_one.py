# SPDX-License-Identifier: Apache-2.0
"""Requests through transformers' own generate, for models and caches that are not the engine's."""

import pytest
import torch
from transformers import DynamicCache

import tiny
from fastpost.generate import Engine, OneByOne, Request, Sampling


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in ("What is", "the sum of two numbers? " * 5, "x")]


def run(generator, requests) -> dict:
    with generator:
        return {(c.id, c.index): c for c in generator.run(requests)}


def test_greedy_is_the_engines(model, tokenizer):
    """Text, tokens, log-probs, alternatives, reasons; a folder's own sampling options change nothing."""
    asked = [Request(p, Sampling(max_new_tokens=12, logprobs=2, repetition_penalty=1.2)) for p in prompts(tokenizer)]
    before = model.generation_config
    theirs = run(Engine(model, tokenizer), asked)
    model.generation_config = type(before)(eos_token_id=2, temperature=0.3, top_k=1, do_sample=True, max_length=5)
    try:
        ours = run(OneByOne(model, tokenizer), asked)
    finally:
        model.generation_config = before
    assert ours.keys() == theirs.keys()
    for key, found in ours.items():
        wanted = theirs[key]
        assert (found.token_ids, found.text, found.finish_reason, found.prompt_tokens) == (
            wanted.token_ids, wanted.text, wanted.finish_reason, wanted.prompt_tokens
        )  # fmt: skip
        torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(wanted.logprobs), rtol=1e-4, atol=1e-4)
        assert [[i for i, _ in t] for t in found.top_logprobs] == [[i for i, _ in t] for t in wanted.top_logprobs]


def test_draws_depend_on_seed_request_and_index(model, tokenizer):
    how = Sampling(max_new_tokens=8, temperature=1.0, n=3, seed=4)
    asked = [Request(prompts(tokenizer)[0], how, id=i) for i in (7, "a")]
    state = torch.get_rng_state()
    first = run(OneByOne(model, tokenizer), asked)
    assert torch.equal(torch.get_rng_state(), state)
    again = run(OneByOne(model, tokenizer, lambda: DynamicCache(config=model.config)), asked[::-1])
    assert {k: c.token_ids for k, c in first.items()} == {k: c.token_ids for k, c in again.items()}
    assert len({tuple(c.token_ids) for c in first.values()}) == 6


@pytest.mark.parametrize("how, allowed", [({"top_k": 3}, 3), ({"top_p": 1e-6}, 1), ({"min_p": 1.0}, 1)])
def test_filters(model, tokenizer, how, allowed):
    asked = [Request(prompts(tokenizer)[0], Sampling(max_new_tokens=1, temperature=2.0, n=40, **how))]
    found = {c.token_ids[0] for c in run(OneByOne(model, tokenizer), asked).values()}
    logits = model(torch.tensor([prompts(tokenizer)[0]])).logits[0, -1]
    assert found <= set(logits.topk(allowed).indices.tolist()) and len(found) == allowed


def test_stop_strings_and_pieces(model, tokenizer):
    ((whole),) = run(OneByOne(model, tokenizer), [Request(prompts(tokenizer)[1], Sampling(max_new_tokens=20))]).values()
    stop = whole.text[4:7]
    pieces = []
    asked = [Request(prompts(tokenizer)[1], Sampling(max_new_tokens=20, stop=(stop,)), stream=pieces.append)]
    ((cut),) = run(OneByOne(model, tokenizer), asked).values()
    assert cut.text == whole.text[: whole.text.index(stop)] and (cut.finish_reason, cut.stop) == ("stop", stop)
    assert "".join(p.text for p in pieces) == cut.text
    assert [t for p in pieces for t in p.token_ids] == cut.token_ids
    assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["stop"]


def test_the_end_of_the_models_positions(model, tokenizer):
    long = [5] * 505
    (found,) = run(
        OneByOne(model, tokenizer), [Request(long, Sampling(max_new_tokens=50, stop=("never ever",)))]
    ).values()
    assert len(found.token_ids) <= 7
    generator = OneByOne(model, tokenizer)
    for request, words in (
        (Request([5] * 512), r"fewer than the model's 512 positions, got 512 tokens"),
        (Request([]), "expected at least one token id"),
        (Request([5], Sampling(ignore_eos=True)), "which only Engine has"),
    ):
        with pytest.raises(ValueError, match=words):
            generator.check(request)
    assert generator.stats() == {"finished": 0, "prompt_tokens": 0, "new_tokens": 0}
