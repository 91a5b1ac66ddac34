# SPDX-License-Identifier: Apache-2.0
"""Sampling beside transformers' processors and warpers, and its random numbers."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastpost.generate.request import Sampling
from fastpost.generate.sampling import _adjust, _weights, candidates, choose, stream, uniform

VOCAB = 1000


@dataclass
class Row:
    sampling: Sampling
    key: int = 0
    position: int = 0
    ids: list[int] = field(default_factory=lambda: [1, 2, 3])

    def seen(self):
        return list(dict.fromkeys(self.ids))

    def so_far(self):
        return self.ids


def theirs(logits, s: Sampling, ids):
    """transformers' distribution [V]."""
    steps = LogitsProcessorList()
    if s.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    steps.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        steps.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        steps.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        steps.append(MinPLogitsWarper(s.min_p))
    return steps(torch.tensor([ids]), logits[None].clone())[0].softmax(-1)


WISHES = [
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=1.5, top_k=40, top_p=0.8),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=0.3, top_k=50, top_p=0.95, min_p=0.02, repetition_penalty=1.3),
    Sampling(temperature=2.0, top_p=0.999),
    Sampling(temperature=1.0, top_p=1e-4),
    Sampling(temperature=1.0, top_k=5000, top_p=0.5),
    Sampling(temperature=1.0, repetition_penalty=0.5, min_p=1.0),
]


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_what_the_filters_leave_is_transformers_distribution(scale):
    """All wishes in one batch, each row against transformers' own."""
    logits = torch.randn(len(WISHES), VOCAB) * scale
    rows = [Row(s) for s in WISHES]
    ids, weights = candidates(_weights(_adjust(logits, rows), WISHES), WISHES)
    got = torch.zeros(len(WISHES), VOCAB, dtype=torch.float64)
    got.scatter_add_(1, ids, weights.double())
    got /= got.sum(-1, keepdim=True)
    for i, s in enumerate(WISHES):
        want = theirs(logits[i], s, rows[i].ids)
        assert torch.equal(got[i] > 0, want > 0), s
        torch.testing.assert_close(got[i].float(), want, rtol=1e-4, atol=1e-6)


def test_ties_at_the_kth_place_all_stay():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    s = Sampling(temperature=1.0, top_k=2)
    ids, weights = candidates(_weights(logits, [s]), [s])
    assert ids[0][weights[0] > 0].tolist() == [0, 2, 3, 4]


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.zeros(3, 50_000)
    logits[0, [7, 40_000]] = 1
    logits[1, [123, 124]] = 2
    for dtype in (torch.float32, torch.bfloat16):
        assert choose(logits.to(dtype), [Row(Sampling())] * 3).tokens == [7, 123, 0]
        mixed = [Row(Sampling()), Row(Sampling(logprobs=0)), Row(Sampling())]
        assert choose(logits.to(dtype), mixed).tokens == [7, 123, 0]


@pytest.mark.parametrize("s", [Sampling(temperature=1.0), Sampling(temperature=1.3, top_p=0.9, top_k=6)])
def test_tokens_come_as_often_as_they_should(s):
    """chi-square over 20,000 draws of 8 tokens."""
    logits = torch.randn(8)
    want = theirs(logits, s, [0])
    rows = [Row(s, key=stream(0, i, 0)) for i in range(20_000)]
    tokens = torch.tensor(choose(logits.expand(len(rows), -1), rows).tokens)
    count = tokens.bincount(minlength=8)
    assert (count[want == 0] == 0).all()
    there = want > 0
    expected = want[there] * len(rows)
    assert ((count[there] - expected) ** 2 / expected).sum() < 29.9  # 7 degrees of freedom: p = 1e-4


def test_random_numbers_are_even_and_of_their_own():
    numbers = torch.tensor([uniform(stream(s, r, j), p) for s in range(4) for r in (0, 1, "0", "a")
                            for j in range(4) for p in range(50)])  # fmt: skip
    assert len(set(numbers.tolist())) == len(numbers)
    assert numbers.min() >= 0 and numbers.max() < 1
    count = torch.histc(numbers, 20, 0, 1)
    assert ((count - len(numbers) / 20) ** 2 / (len(numbers) / 20)).sum() < 52  # 19 degrees of freedom: p = 1e-4


def test_a_draw_does_not_depend_on_the_other_rows():
    logits = torch.randn(len(WISHES), VOCAB)
    rows = [Row(s, key=i) for i, s in enumerate(WISHES)]
    together = choose(logits, rows).tokens
    assert together == [choose(logits[i : i + 1], [row]).tokens[0] for i, row in enumerate(rows)]
    assert together[::-1] == choose(logits.flip(0), rows[::-1]).tokens
    again = [Row(s, key=i, position=1) for i, s in enumerate(WISHES)]
    assert choose(logits, again).tokens != together


def test_a_number_just_below_one_takes_a_token_that_weighs_something(monkeypatch):
    monkeypatch.setattr("fastpost.generate.sampling.uniform", lambda key, position: 1 - 2.0**-53)
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    assert choose(logits, [Row(Sampling(temperature=1.0))]).tokens == [1]
    assert choose(logits, [Row(Sampling(temperature=1.0, top_k=3))]).tokens == [1]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_of_the_model_ignore_filters(temperature, dtype):
    logits = (torch.randn(4, VOCAB) * 3).to(dtype)
    s = Sampling(temperature=temperature, top_k=3 if temperature else 0, repetition_penalty=1.2, logprobs=5)
    chosen = choose(logits, [Row(s, key=i) for i in range(4)])
    want = (logits.double() / (temperature or 1)).log_softmax(-1)
    for i, token in enumerate(chosen.tokens):
        assert chosen.logprobs[i] == pytest.approx(float(want[i, token]), abs=1e-5)
        values, ids = want[i].topk(5)
        assert [t for t, _ in chosen.top[i]] == ids.tolist()
        assert [v for _, v in chosen.top[i]] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("s", WISHES)
def test_logprobs_of_what_was_drawn_from_count_filters(s):
    logits = torch.randn(VOCAB)
    s = Sampling(**{**vars(s), "logprobs": 3, "logprob_of": "sampled"})
    want = theirs(logits, s, [1, 2, 3])
    chosen = choose(logits[None], [Row(s)])
    assert chosen.logprobs[0] == pytest.approx(float(want[chosen.tokens[0]].log()), abs=1e-4)
    assert len(chosen.top[0]) == min(3, int((want > 0).sum()))
    for token, value in chosen.top[0]:
        assert value == pytest.approx(float(want[token].log()), abs=1e-4)


def test_rows_without_logprobs_have_none():
    logits = torch.randn(2, VOCAB)
    chosen = choose(logits, [Row(Sampling()), Row(Sampling(logprobs=0))])
    assert chosen.logprobs[0] is None and chosen.logprobs[1] < 0 and chosen.top == [None, None]


def test_a_callback_may_return_logits_change_them_or_leave_them():
    def forbid(ids, row):
        assert ids == [1, 2, 3] and row.shape == (VOCAB,) and row.dtype == torch.float32
        row[:500] = -torch.inf

    logits = torch.randn(3, VOCAB, dtype=torch.bfloat16)
    before = logits.clone()
    callbacks = [forbid, lambda ids, row: -row, lambda ids, row: None]
    chosen = choose(logits, [Row(Sampling(logits_callback=c)) for c in callbacks])
    want = [500 + int(logits[0, 500:].argmax()), int(logits[1].argmin()), int(logits[2].argmax())]
    assert chosen.tokens == want and torch.equal(logits, before)


def test_a_callback_that_returns_something_else_is_refused():
    for wrong in (torch.zeros(3), "no"):
        with pytest.raises(ValueError, match=r"\[Sampling\] logits_callback: expected logits \[1000\] or None"):
            choose(torch.randn(1, VOCAB), [Row(Sampling(logits_callback=lambda ids, row, w=wrong: w))])


@pytest.mark.parametrize("s", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=2)])
def test_nan_logits_are_named(s):
    logits = torch.randn(2, VOCAB)
    logits[1, 5] = torch.nan
    with pytest.raises(ValueError, match=r"\[generate\] logits: expected numbers, got NaN"):
        choose(logits, [Row(s), Row(s)])


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1),
     ("top_k", -1), ("top_k", 1.5), ("min_p", 2), ("repetition_penalty", 0), ("n", 0), ("stop", ("",)), ("stop", (3,)),
     ("seed", "x"), ("logprobs", -1), ("logprob_of", "raw"), ("logits_callback", 3)],
)  # fmt: skip
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"\[Sampling\] {name}: expected"):
        Sampling(**{name: value})


def test_one_stop_string_need_not_be_a_tuple():
    assert Sampling(stop="x").stop == ("x",) and Sampling(stop=["a", "b"]).stop == ("a", "b")
