# SPDX-License-Identifier: Apache-2.0
"""An n-gram language model over token ids, interpolated Kneser-Ney (Chen & Goodman 1999, section 4.1.6).

    model = NGram([[5, 7, 2], [5, 9]], order=5, vocabulary=320)
    model.logprobs([5, 7])        # natural logs of 5, of 7 after it, and of the end

With a(g) an n-gram's count, h its first n-1 tokens and h' those without the first:

    P(w | h) = max(a(h w) - D, 0) / a(h .) + D N(h .) / a(h .) P(w | h')

where a(h .) sums over w, N(h .) counts the w with a(h w) > 0, and D = n1 / (n1 + 2 n2) from the number of n-grams with
a = 1 and 2 (0.5 where there are none of either). In the highest order, and for n-grams that begin a document, a is how
often the n-gram occurs; below, the number of different tokens that occur before it. At the bottom stands 1 / V over
tokens and the end of a document. A context that was never seen passes on to the next shorter one.

Everything is arrays: the n-grams of an order are the sorted numbers id(first n-1 tokens) * (V + 2) + last token, where
id is the place of the first n-1 tokens among their own order's. That is exact for any order, in about 30 bytes an
n-gram."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np


class NGram:
    """`documents`: token ids in [0, vocabulary). Raises ValueError for ids outside of it, or when there is nothing to
    learn from."""

    def __init__(self, documents: Iterable[Sequence[int]], order: int, vocabulary: int):
        if order < 1:
            raise ValueError(f"[ngram] order: expected at least 1, got {order}.")
        self.order, self.vocabulary = order, vocabulary
        self._begin, self._end, self._base = vocabulary, vocabulary + 1, vocabulary + 2
        tokens, place = self._stream(documents)
        if not len(tokens):
            raise ValueError("[ngram] documents: expected at least one, got none.")
        self._levels = []
        ids = tokens  # of the n-gram that ends at each position, among the n-grams of its order; -1 = there is none
        counted = np.bincount(tokens, minlength=self._base)
        keys, initial = np.arange(self._base), np.arange(self._base) == self._begin
        previous = np.zeros(self._base, np.int64)  # id of an n-gram's first n-1 tokens; of one token: of nothing
        for n in range(1, order + 1):
            if n < order:
                # What follows is one order up: its n-grams, and for each the id of its last n tokens.
                longer, id_longer, count_longer = self._extend(ids, tokens, place, n)
                different = np.zeros(len(keys), np.int64)
                there = id_longer >= 0
                suffix = np.full(len(longer), -1)
                suffix[id_longer[there]] = ids[there]
                np.add.at(different, suffix, 1)
                counts = np.where(initial, counted, different)
            else:
                counts = counted
            if n == 1:
                counts = np.where(initial, 0, counts)  # the beginning is never predicted
            self._levels.append(_Level(keys, previous, counts, n))
            if n < order:
                first = longer // self._base
                keys, previous, initial, counted, ids = longer, first, initial[first], count_longer, id_longer

    def logprobs(self, document: Sequence[int]) -> np.ndarray:
        """Natural log-probs of each token given those before it, and of the end after them: float64 [len + 1]."""
        tokens, _ = self._stream([document])
        bottom = self._levels[0]
        total = bottom.total[0]
        p = bottom.excess(tokens) / total + bottom.discount * bottom.kinds[0] / total / (self.vocabulary + 1)
        ids = (
            tokens  # of the n-gram one order down that ends at each position; -1 = unseen, or it would begin too early
        )
        for level in self._levels[1:]:
            context = np.concatenate([[-1], ids[:-1]])
            seen = context >= 0
            seen[seen] = level.total[context[seen]] > 0
            at = level.find(context[seen] * self._base + tokens[seen])
            total, kinds = level.total[context[seen]], level.kinds[context[seen]]
            p[seen] = level.excess(at) / total + level.discount * kinds / total * p[seen]
            ids = np.full(len(tokens), -1)
            ids[seen] = at
        return np.log(p[1:])

    def perplexity(self, document: Sequence[int]) -> float:
        """exp of the mean negative log-prob over the tokens and the end."""
        return float(np.exp(-self.logprobs(document).mean()))

    def _stream(self, documents: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Begin, tokens, end of each document, end to end; and each position's place in its document."""
        lengths = []

        def marked():
            for document in documents:
                lengths.append(len(document) + 2)
                yield from chain([self._begin], document, [self._end])

        tokens = np.fromiter(marked(), np.int64)
        starts = np.cumsum([0, *lengths])
        inside = np.delete(tokens, np.concatenate([starts[:-1], starts[1:] - 1])) if lengths else tokens
        if len(inside) and not 0 <= inside.min() <= inside.max() < self.vocabulary:
            worst = inside.min() if inside.min() < 0 else inside.max()
            raise ValueError(f"[ngram] documents: expected ids from 0 to {self.vocabulary - 1}, got {worst}.")
        return tokens, np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)

    def _extend(self, ids, tokens, place, n: int):
        """(n+1)-grams: sorted keys, the id of the one that ends at each position or -1, how often each occurs."""
        there = place >= n
        whole = np.flatnonzero(there)
        keys, inverse, counts = np.unique(
            ids[whole - 1] * self._base + tokens[whole], return_inverse=True, return_counts=True
        )
        found = np.full(len(tokens), -1)
        found[whole] = inverse
        return keys, found, counts


class _Level:
    """The n-grams of one order. total, kinds: a(h .) and N(h .) by the id of h."""

    def __init__(self, keys: np.ndarray, previous: np.ndarray, counts: np.ndarray, n: int):
        self.keys, self.counts = keys, counts
        size = int(previous.max(initial=0)) + 1 if n > 1 else 1
        self.total = np.bincount(previous, weights=counts, minlength=size)
        self.kinds = np.bincount(previous, weights=counts > 0, minlength=size)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        self.discount = once / (once + 2 * twice) if once and twice else 0.5

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The id of each n-gram, -1 where it was never seen."""
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at, -1)

    def excess(self, ids: np.ndarray) -> np.ndarray:
        """max(a - D, 0) of each n-gram."""
        return np.where(ids >= 0, np.maximum(self.counts[ids] - self.discount, 0.0), 0.0)
