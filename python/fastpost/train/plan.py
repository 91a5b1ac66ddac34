# SPDX-License-Identifier: Apache-2.0
"""Which rows belong to which step, and at what rate: arithmetic on (seed, epoch, step), nothing that runs along."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from fastpost.data.loader import Dataset
from fastpost.data.mixture import Mixture

from .config import Config
from .schedule import factor, warmup_steps


class Plan:
    """The steps of a run over `data`. Everything about step s follows from s, so a resume needs to restore nothing.

    It is the same on every rank: `rows(step)` and `parts(step)` are those of the whole step, of which a rank takes its
    share."""

    def __init__(self, cfg: Config, data: Dataset, ranks: int = 1):
        self.cfg, self.data, self.ranks = cfg, data, ranks
        self.mixture = Mixture(data, seed=cfg.train.seed, tokens=cfg.data.epoch_tokens, fixed=cfg.data.draw == "fixed")
        self._epoch, self._order = -1, []
        # An epoch of so many tokens has a number of rows of its own, so the ends of epochs are counted, not multiplied.
        steps = [math.ceil(self._rows_in(e) / cfg.train.batch_size) for e in range(cfg.train.epochs)]
        self._ends = list(accumulate(steps))
        self.steps_per_epoch = steps[0]
        """Steps of the first epoch; those of a mixture may differ by a few from epoch to epoch."""
        self.steps = self._ends[-1]
        if cfg.train.max_steps is not None:
            self.steps = min(self.steps, cfg.train.max_steps)
        self.warmup = warmup_steps(self.steps, cfg.optim.warmup_ratio, cfg.optim.warmup_steps)
        self.lr(self.steps - 1)  # a schedule that does not fit the number of steps is an error now, not in an hour

    def rows(self, step: int) -> list[int]:
        """Indices into the data of `step` (from 0). The last step of an epoch may have fewer than batch_size."""
        epoch = bisect_right(self._ends, step)
        position = step - (self._ends[epoch - 1] if epoch else 0)
        size = self.cfg.train.batch_size
        return self._rows_of(epoch)[position * size : (position + 1) * size]

    def parts(self, step: int) -> list[list[int]]:
        """The same rows as micro-batches, as many for each rank where rows allow it."""
        return even(self.cut(self.data, self.rows(step)), self.ranks, self.data.examples)

    def first_epoch(self) -> list[list[int]]:
        """The micro-batches of the first epoch, and of what a mixture leaves out of it: each row once."""
        seen, parts = set(), []
        for part in (part for step in range(self.steps_per_epoch) for part in self.parts(step)):
            fresh = [row for row in dict.fromkeys(part) if row not in seen]
            seen.update(fresh)
            parts += [fresh] if fresh else []
        return parts + self.cut(self.data, [row for row in range(len(self.data)) if row not in seen])

    def cut(self, data: Dataset, rows: list[int]) -> list[list[int]]:
        """`rows` of any dataset as micro-batches."""
        return data.micro_batches(rows, self.cfg.train.max_tokens_per_micro_batch, self.cfg.train.micro_batch_size)

    def tokens(self, step: int) -> int:
        return int(self.data.examples.tokens[self.rows(step)].sum())

    def lr(self, step: int) -> float:
        o = self.cfg.optim
        return o.lr * factor(
            step,
            total=self.steps,
            warmup=self.warmup,
            shape=o.schedule,
            floor=o.min_lr_ratio,
            warmup_from=o.warmup_from,
            stable_ratio=o.stable_ratio,
            decay=o.decay,
            step_decay=o.step_decay,
        )

    def epoch(self, finished: int) -> float:
        """Epochs done after `finished` steps."""
        epoch = bisect_right(self._ends, finished)
        begin, end = [0, *self._ends][epoch], [*self._ends, self._ends[-1] + 1][epoch]
        return epoch + (finished - begin) / (end - begin)

    def _rows_of(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.mixture.epoch(epoch).tolist()
        return self._order

    def _rows_in(self, epoch: int) -> int:
        return len(self.data) if self.mixture.whole else len(self._rows_of(epoch))


def even(parts: list[list[int]], ranks: int, examples: Sequence) -> list[list[int]]:
    """`parts` with the largest halved, again and again, until their number is a multiple of `ranks` (or each is one
    row): otherwise ranks would wait for those with one more."""
    parts = list(parts)
    while len(parts) % ranks:
        tokens = [[examples[row].computed for row in part] for part in parts]
        at = max(range(len(parts)), key=lambda i: (len(parts[i]) > 1, sum(tokens[i])))
        if len(parts[at]) == 1:
            break
        before = list(accumulate(tokens[at]))
        cut = min(range(1, len(parts[at])), key=lambda i: abs(2 * before[i - 1] - before[-1]))
        parts[at : at + 1] = [parts[at][:cut], parts[at][cut:]]
    return parts
