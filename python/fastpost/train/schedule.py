# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules as pure functions of the step: nothing to save, so a resume cannot get them wrong.

Steps count from 0. The warm-up is (step + 1) / warmup, so the first step already moves (transformers' schedules waste
step 0 on a rate of zero); `step == warmup` is the peak, and the shape reaches `floor` at `step == total`, one past
the last step.
"""

from __future__ import annotations

import math


def constant(progress: float) -> float:
    return 1.0


def linear(progress: float) -> float:
    return 1.0 - progress


def cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SHAPES = {"constant": constant, "linear": linear, "cosine": cosine}
"""Shape after the warm-up: progress in [0, 1] -> share of the way from floor (0) to peak (1)."""


def warmup_steps(total: int, ratio: float, steps: int | None = None) -> int:
    """Length of the warm-up: `steps` when given, else `ratio` of all steps, rounded up as transformers does."""
    return steps if steps is not None else math.ceil(total * ratio - 1e-9)


def factor(step: int, *, total: int, warmup: int = 0, shape: str = "cosine", floor: float = 0.0) -> float:
    """Share of the peak learning rate at 0-based `step` of `total`. `floor` is the share that remains at the end.

    Raises ValueError for an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"[schedule] shape: expected one of {', '.join(SHAPES)}, got {shape!r}.")
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1.0 - floor) * SHAPES[shape](progress)
