# SPDX-License-Identifier: Apache-2.0
"""Which examples an epoch is made of: exact shares of the tokens from several sources, each in its own order.

    mixture = Mixture(data, seed=0, tokens=None, fixed=False)
    mixture.epoch(3)      # indices into data.examples, a pure function of (seed, epoch): nothing runs along

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

    def __init__(self, data: Dataset, *, seed: int, tokens: int | None = None, fixed: bool = False):
        self.data, self.seed, self.fixed = data, seed, fixed
        total = sum(p.source.ratio for p in data.parts)
        self.ratios = [p.source.ratio / total for p in data.parts]
        """Shares of the tokens, one per source; they sum to 1."""
        self.have = [int(self._tokens(p).sum()) for p in data.parts]
        """Tokens of each source."""
        self.whole = tokens is None and len(data.parts) == 1
        """Whether every epoch is every row once."""
        ends = [h / r for h, r, p in zip(self.have, self.ratios, data.parts) if not p.source.repeat]
        self.tokens = tokens or (math.floor(min(ends)) if ends else sum(self.have))
        """Tokens of an epoch, to within half a row of each source."""
        self.quotas = [self.tokens * r for r in self.ratios]
        if not self.whole:
            self._check()

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of the examples of an epoch in their order, int64."""
        picks = [self._pick(k, epoch) for k in range(len(self.data.parts))]
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
        """The account for people: what was asked and what the first epoch has of each source."""
        if self.whole:
            return []
        drawn = [self.data.examples.tokens[self._pick(k, 0)].sum() for k in range(len(self.data.parts))]
        given = ":".join(f"{p.source.ratio:g}" for p in self.data.parts)
        lines = [f"mix    {sum(drawn)} tokens an epoch, ratios {given}, draw {'fixed' if self.fixed else 'dynamic'}"]
        for part, ratio, got, have in zip(self.data.parts, self.ratios, drawn, self.have):
            times = f"read {got / have:.2f} times" if got > have else f"{got / have:.1%} of it"
            lines.append(
                f"mix    {part.source.path}: wanted {ratio:.2%}, is {got / sum(drawn):.2%} = {got} tokens ({times}), "
                f"{'shuffled' if part.source.shuffle else 'in file order'}"
            )
        return lines

    def _pick(self, k: int, epoch: int) -> np.ndarray:
        """Indices of source k's rows in an epoch, in the order in which they come."""
        part, quota = self.data.parts[k], self.quotas[k]
        draw = 0 if self.fixed else epoch
        # The first source of all is drawn as a single file is, so that adding nothing changes nothing.
        seed = f"{self.seed}/{k}" if k else self.seed
        if self.whole:
            rows = np.array(order(seed, epoch, part.stop - part.start, part.source.shuffle))
            return rows + part.start
        tokens, passes, left = self._tokens(part), [], quota
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

    def _check(self) -> None:
        for k, part in enumerate(self.data.parts):
            over = self.quotas[k] - self.have[k]
            if over >= self._tokens(part).max() and not part.source.repeat:
                most = math.floor(self.have[k] / self.ratios[k])
                raise ValueError(
                    f"[data] data.train[{k}] {part.source.path}: runs out: an epoch of {self.tokens} tokens wants "
                    f"{self.quotas[k]:.0f} of it ({self.ratios[k]:.2%}), and it has {self.have[k]}. Set its repeat to "
                    f"true, or data.epoch_tokens to at most {most}."
                )


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
