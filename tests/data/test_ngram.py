# SPDX-License-Identifier: Apache-2.0
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from fastpost.data.ngram import NGram


def test_against_numbers_worked_by_hand():
    """Documents "a b", "a b", "a c" (a = 0, b = 1, c = 2), order 2, V = 3.

    Bigrams: <a 3, ab 2, ac 1, b> 2, c> 1 (< begins, > ends). n1 = 2 (ac, c>), n2 = 2 (ab, b>): D2 = 2 / 6 = 1/3.
    Unigrams count what stands before: a 1 (<), b 1 (a), c 1 (a), > 2 (b, c); of 5. n1 = 3, n2 = 1: D1 = 3/5.
    P(a) = (1 - 3/5)/5 + (3/5) 4/5 / 4 = 0.08 + 0.12 = 0.2, so P(b) = P(c) = 0.2, P(>) = (2 - 3/5)/5 + 0.12 = 0.4.
    P(b|a) = (2 - 1/3)/3 + (1/3) 2/3 0.2 = 5/9 + 2/45 = 0.6;  P(c|a) = (1 - 1/3)/3 + 2/45 = 4/15
    P(a|<) = (3 - 1/3)/3 + (1/3) 1/3 0.2 = 8/9 + 1/45 = 41/45;  P(>|b) = (2 - 1/3)/2 + (1/3) 1/2 0.4 = 0.9
    P(>|c) = (1 - 1/3)/1 + (1/3) 0.4 = 0.8;  P(b|c) = (1/3) 0.2 = 1/15
    """
    model = NGram([[0, 1], [0, 1], [0, 2]], order=2, vocabulary=3)
    assert np.exp(model.logprobs([0, 1])) == pytest.approx([41 / 45, 0.6, 0.9])
    assert np.exp(model.logprobs([0, 2, 1])) == pytest.approx([41 / 45, 4 / 15, 1 / 15, 0.9])
    assert np.exp(model.logprobs([2])) == pytest.approx([1 / 45, 0.8])
    assert model.perplexity([0, 1]) == pytest.approx((41 / 45 * 0.6 * 0.9) ** (-1 / 3))
    assert np.exp(model.logprobs([])) == pytest.approx([1 / 9 * 0.4])


def test_a_single_document_by_hand():
    """[a a], order 1, V = 2 (b was never seen). Counts: a 2, > 1, of 3; n1 = n2 = 1: D = 1/3.
    P(a) = (5/3)/3 + (1/3)(2/3)/3 = 5/9 + 2/27 = 17/27, P(>) = 2/9 + 2/27 = 8/27, P(b) = 2/27."""
    model = NGram([[0, 0]], order=1, vocabulary=2)
    assert np.exp(model.logprobs([0, 1])) == pytest.approx([17 / 27, 2 / 27, 8 / 27])


def in_dictionaries(documents, order, vocabulary):
    """The same formula over tuples, written as it stands in the module's docstring."""
    begin, end = vocabulary, vocabulary + 1
    grams = [Counter() for _ in range(order + 1)]
    before = [defaultdict(set) for _ in range(order + 1)]
    for document in documents:
        d = (begin, *document, end)
        for n in range(1, order + 1):
            for i in range(len(d) - n + 1):
                grams[n][d[i : i + n]] += 1
                if i:
                    before[n][d[i : i + n]].add(d[i - 1])
    a = [None] * (order + 1)
    for n in range(1, order + 1):
        raw = {g for g in grams[n] if n == order or g[0] == begin}
        a[n] = {g: grams[n][g] if g in raw else len(before[n][g]) for g in grams[n] if g != (begin,)}

    def p(w, h):
        n = len(h) + 1
        c = a[n]
        n1, n2 = (sum(v == k for v in c.values()) for k in (1, 2))
        discount = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
        lower = p(w, h[1:]) if h else 1 / (vocabulary + 1)
        follow = [v for g, v in c.items() if g[:-1] == h and v > 0]
        if not follow:
            return lower
        return max(c.get((*h, w), 0) - discount, 0) / sum(follow) + discount * len(follow) / sum(follow) * lower

    def logprobs(document):
        d = (begin, *document, end)
        return [math.log(p(d[i], d[max(0, i - order + 1) : i])) for i in range(1, len(d))]

    return p, logprobs


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_against_dictionaries(order):
    draw = random.Random(order)
    documents = [[draw.randint(0, 6) for _ in range(draw.randint(0, 12))] for _ in range(30)]
    model = NGram(documents, order, vocabulary=8)
    p, logprobs = in_dictionaries(documents, order, 8)
    for document in [*documents[:5], [7, 7, 1, 2], [], [3] * 20]:
        assert model.logprobs(document) == pytest.approx(logprobs(document), rel=1e-12)
    for history in ((), (1,), (8, 3), (3, 7), (0, 1)):  # every distribution sums to one
        history = history[: order - 1]
        assert sum(p(w, history) for w in [*range(8), 9]) == pytest.approx(1)


def test_it_prefers_what_it_was_trained_on():
    draw = random.Random(0)
    model = NGram([[0, 1, 2, 3] * 5 for _ in range(20)], order=3, vocabulary=50)
    known = model.perplexity([0, 1, 2, 3, 0, 1, 2, 3])
    assert known < 2 < 20 < model.perplexity([draw.randint(0, 49) for _ in range(8)])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"\[ngram\] order: expected at least 1, got 0"):
        NGram([[1]], 0, 5)
    with pytest.raises(ValueError, match=r"\[ngram\] documents: expected at least one, got none"):
        NGram([], 2, 5)
    with pytest.raises(ValueError, match=r"\[ngram\] documents: expected ids from 0 to 4, got 5"):
        NGram([[1, 5]], 2, 5)
    with pytest.raises(ValueError, match=r"\[ngram\] documents: expected ids from 0 to 4, got -1"):
        NGram([[1]], 2, 5).logprobs([-1])
