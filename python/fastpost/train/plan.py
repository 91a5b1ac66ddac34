# SPDX-License-Identifier: Apache-2.0
"""Which rows belong to which step, and at what rate: arithmetic on (seed, epoch, step), nothing that runs along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from fastpost.data.loader import Dataset, order

from .config import Config
from .schedule import factor, warmup_steps


class Plan:
    """The steps of a run over `data`. Everything about step s follows from s, so a resume needs to restore nothing."""

    def __init__(self, cfg: Config, data: Dataset, ranks: int = 1):
        self.cfg, self.data, self.ranks = cfg, data, ranks
        self.steps_per_epoch = math.ceil(len(data) / cfg.train.batch_size)
        self.steps = self.steps_per_epoch * cfg.train.epochs
        if cfg.train.max_steps is not None:
            self.steps = min(self.steps, cfg.train.max_steps)
        self.warmup = warmup_steps(self.steps, cfg.optim.warmup_ratio, cfg.optim.warmup_steps)
        self._epoch, self._order = -1, []

    def rows(self, step: int) -> list[int]:
        """Indices into the data of `step` (from 0). The last step of an epoch may have fewer than batch_size."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, order(self.cfg.train.seed, epoch, len(self.data), self.cfg.data.shuffle)
        size = self.cfg.train.batch_size
        return self._order[position * size : (position + 1) * size]

    def parts(self, step: int) -> list[list[int]]:
        """The same rows as micro-batches, as many for each rank where rows allow it."""
        return even(self.cut(self.data, self.rows(step)), self.ranks, self.data.examples)

    def first_epoch(self) -> list[list[int]]:
        """The micro-batches of the first epoch: each row once."""
        return [part for step in range(self.steps_per_epoch) for part in self.parts(step)]

    def cut(self, data: Dataset, rows: list[int]) -> list[list[int]]:
        """`rows` of any dataset as micro-batches."""
        return data.micro_batches(rows, self.cfg.train.max_tokens_per_micro_batch, self.cfg.train.micro_batch_size)

    def tokens(self, step: int) -> int:
        return sum(self.data.examples[row].tokens for row in self.rows(step))

    def lr(self, step: int) -> float:
        o = self.cfg.optim
        return o.lr * factor(step, total=self.steps, warmup=self.warmup, shape=o.schedule, floor=o.min_lr_ratio)

    def epoch(self, finished: int) -> float:
        """Epochs done after `finished` steps."""
        return finished / self.steps_per_epoch


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
