# SPDX-License-Identifier: Apache-2.0
"""Which examples an epoch is made of: exact shares of the tokens from several sources, each in its own order.

    mixture = Mixture(data, seed=0, tokens=None, fixed=False)
    mixture.epoch(3)      # indices into data.examples, a pure function of (seed, epoch): nothing runs along

Epochs may differ, so that one is a stage of a training: a source's ratio and the tokens of an epoch may each be a list
with an entry for each epoch, the last of which holds for those that follow.

Of each source an epoch takes as many rows as come nearest to its quota, which is its ratio of the epoch's tokens: the
rows of a random draw, made anew each epoch (dynamic) or once (fixed). They come in that order, or in file order when
the source is not shuffled, and are spread evenly: at any point of the epoch every source has had its share, to within a
row of each. So any batch of some size holds the mixture, too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastpost.data.dataset import Dataset, Part
from fastpost.data.loader import order


class Mixture:
    """Raises ValueError naming the source when an epoch wants more of one than there is and it may not repeat."""

    def __init__(self, data: Dataset, *, seed: int, tokens: int | list[int] | None = None, fixed: bool = False):
        self.data, self.seed, self.fixed, self._asked = data, seed, fixed, tokens
        listed = [tokens, *(p.source.ratio for p in data.parts)]
        self.stages = max(len(value) if isinstance(value, list) else 1 for value in listed)
        """Epochs that may differ; those that follow are like the last of them."""
        self.have = [int(self._tokens(p).sum()) for p in data.parts]
        """Tokens of each source."""
        self.whole = tokens is None and len(data.parts) == 1
        """Whether every epoch is every row once."""
        if not self.whole:
            for epoch in range(self.stages):
                self._check(epoch)

    @property
    def ratios(self) -> list[float]:
        """Shares of the tokens in the first epoch."""
        return self.shares(0)

    @property
    def tokens(self) -> int:
        """Tokens of the first epoch, to within half a row of each source."""
        return self.size(0)

    def shares(self, epoch: int) -> list[float]:
        """Shares of the tokens of an epoch, one per source; they sum to 1."""
        ratios = [_of(p.source.ratio, epoch) for p in self.data.parts]
        return [r / sum(ratios) for r in ratios]

    def size(self, epoch: int) -> int:
        """Tokens of an epoch: what was asked, or as many as there are before a source runs out."""
        if self._asked is not None:
            return _of(self._asked, epoch)
        ends = [h / r for h, r, p in zip(self.have, self.shares(epoch), self.data.parts) if r and not p.source.repeat]
        return math.floor(min(ends)) if ends else sum(self.have)

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of the examples of an epoch in their order, int64."""
        picks = [self._pick(k, epoch) for k, share in enumerate(self.shares(epoch)) if share]
        if len(picks) == 1:
            return picks[0]
        # Where in the epoch the middle of each row lies, as a share of its source's tokens: sorting by that spreads the
        # sources evenly and keeps the order within each.
        places = []
        for pick in picks:
            tokens = self.data.examples.tokens[pick]
            end = tokens.cumsum()
            places.append((end - tokens / 2) / end[-1])
        return np.concatenate(picks)[np.argsort(np.concatenate(places), kind="stable")]

    def lines(self) -> list[str]:
        """The account for people: what was asked and what each epoch that differs has of each source."""
        if self.whole:
            return []
        lines = []
        for epoch in range(self.stages):
            shares, draw = self.shares(epoch), "fixed" if self.fixed else "dynamic"
            drawn = [self._drawn(k, epoch) if share else 0 for k, share in enumerate(shares)]
            given = ":".join(f"{_of(p.source.ratio, epoch):g}" for p in self.data.parts)
            last = " on" if epoch + 1 == self.stages else ""
            which = "an epoch" if self.stages == 1 else f"in epoch {epoch + 1}{last}"
            lines.append(f"mix    {sum(drawn)} tokens {which}, ratios {given}, draw {draw}")
            for part, share, got, have in zip(self.data.parts, shares, drawn, self.have):
                times = f"read {got / have:.2f} times" if got > have else f"{got / have:.1%} of it"
                lines.append(
                    f"mix    {part.source.path}: wanted {share:.2%}, is {got / sum(drawn):.2%} = {got} tokens "
                    f"({times}), {'shuffled' if part.source.shuffle else 'in file order'}"
                )
        return lines

    def _drawn(self, k: int, epoch: int) -> int:
        return int(self.data.examples.tokens[self._pick(k, epoch)].sum())

    def _pick(self, k: int, epoch: int) -> np.ndarray:
        """Indices of source k's rows in an epoch, in the order in which they come."""
        part = self.data.parts[k]
        draw = 0 if self.fixed else epoch
        # The first source of all is drawn as a single file is, so that adding nothing changes nothing.
        seed = f"{self.seed}/{k}" if k else self.seed
        if self.whole:
            rows = np.array(order(seed, epoch, part.stop - part.start, part.source.shuffle))
            return rows + part.start
        tokens, passes, left = self._tokens(part), [], self.size(epoch) * self.shares(epoch)[k]
        while left > 0:
            n = len(passes)
            rows = np.array(order(f"{seed}/pass {n}" if n else seed, draw, len(tokens)))
            end = np.concatenate([[0], tokens[rows].cumsum()])
            rows = rows[: int(np.abs(end - left).argmin())]
            if n and not len(rows):
                break
            rows = rows[:1] if n == 0 and not len(rows) else rows  # half a row is more than the quota: take one
            passes.append(rows if part.source.shuffle else np.sort(rows))
            left -= int(end[-1])
        picked = np.concatenate(passes)
        if self.fixed and part.source.shuffle and epoch:  # the same rows, in a new order
            picked = picked[order(f"{seed}/again", epoch, len(picked))]
        return picked + part.start

    def _tokens(self, part: Part) -> np.ndarray:
        return self.data.examples.tokens[part.start : part.stop]

    def _check(self, epoch: int) -> None:
        tokens = self.size(epoch)
        for k, (part, share) in enumerate(zip(self.data.parts, self.shares(epoch))):
            wanted = tokens * share
            if wanted - self.have[k] >= self._tokens(part).max() and not part.source.repeat:
                which = f"epoch {epoch + 1}" if self.stages > 1 else "an epoch"
                raise ValueError(
                    f"[data] data.train[{k}] {part.source.path}: runs out: {which} of {tokens} tokens wants "
                    f"{wanted:.0f} of it ({share:.2%}), and it has {self.have[k]}. Set its repeat to "
                    f"true, or data.epoch_tokens to at most {math.floor(self.have[k] / share)}."
                )


def _of(value, epoch: int):
    """The entry of a list that holds for `epoch`, or the one number that holds for all."""
    return value[min(epoch, len(value) - 1)] if isinstance(value, list) else value


def updated_ratios(ratios: Sequence[float], factors: Sequence[float]) -> list[float]:
    """Ratios that follow feedback: r_i f_i / sum_j r_j f_j (Llama-3-SynE). `ratios` need not sum to 1; the result
    does. ValueError for a factor that is not above 0: it would remove a topic for good."""
    if len(ratios) != len(factors) or not ratios:
        raise ValueError(f"[mixture] factors: expected one for each of {len(ratios)} ratios, got {len(factors)}.")
    for name, values in (("ratios", ratios), ("factors", factors)):
        for i, value in enumerate(values):
            if not 0 < value < math.inf:
                raise ValueError(f"[mixture] {name}[{i}]: expected a number above 0, got {value}. Lower alpha.")
    products = [r * f for r, f in zip(ratios, factors)]
    return [p / sum(products) for p in products]


def feedback_factors(
    before: Sequence[float], after: Sequence[float], alpha: float, weights: Sequence[float] | None = None
) -> list[float]:
    """f_i = 1 + alpha * delta_i * w_i from each topic's held-out perplexity before and after a stretch of training
    (Llama-3-SynE): a topic that got worse gets more. delta_i = (after_i - before_i) / max_j |after_j - before_j| is in
    [-1, 1] (the source names no normaliser, this one is ours), w_i (default 1) how much the topic matters."""
    changes = [b - a for a, b in zip(before, after, strict=True)]
    largest = max(map(abs, changes)) or 1.0
    return [1 + alpha * c / largest * w for c, w in zip(changes, weights or [1.0] * len(changes), strict=True)]
