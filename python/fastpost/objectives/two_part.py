# SPDX-License-Identifier: Apache-2.0
"""Supervised training on a reply in two parts of fixed weight."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from .base import Objective, number


@dataclasses.dataclass(frozen=True)
class TwoPartSFT(Objective):
    """Cross-entropy of rationale and answer, weighted: losses[p] = (1 - alpha) (-mean_r) + alpha (-mean_a).

    Sequences 2p and 2p + 1 are rationale and answer of row p; alone, a long rationale would drown its answer. Each mean
    is over the tokens of that part of that row, and the loss is the mean over rows; the authors' code, a fork of
    LLaMA-Factory, takes the two means over a device's batch. alpha 0 trains the rationale only. Default: the authors'
    .3. Its implied reward, for want of one, is lp. Source: NesyCD (Xnhyacinth/NesyCD), the mt variants.
    """

    alpha: float = number(0.3, least=0, most=1)
    paired = False
    unit = "pair"
    row_type: ClassVar[str | None] = "two_part"

    def _losses(self, s, kl):
        return -(1 - self.alpha) * s.mean[0::2] - self.alpha * s.mean[1::2]

    def _rewards(self, s):
        return s.logprob
