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


def sqrt(progress: float) -> float:
    """1 - sqrt(progress): falls fast, then slowly."""
    return 1.0 - math.sqrt(progress)


SHAPES = {"constant": constant, "linear": linear, "cosine": cosine}
"""Shape after the warm-up: progress in [0, 1] -> share of the way from floor (0) to peak (1)."""

DECAYS = {"linear": linear, "cosine": cosine, "sqrt": sqrt, "exponential": None}
"""Shape of the decay of "wsd" as a share of the peak; exponential is floor ** progress."""

SCHEDULES = (*SHAPES, "wsd", "step")


def warmup_steps(total: int, ratio: float, steps: int | None = None) -> int:
    """Length of the warm-up: `steps` when given, else `ratio` of all steps, rounded up as transformers does."""
    return steps if steps is not None else math.ceil(total * ratio - 1e-9)


def factor(
    step: int,
    *,
    total: int,
    warmup: int = 0,
    shape: str = "cosine",
    floor: float = 0.0,
    warmup_from: float = 0.0,
    stable_ratio: float = 0.9,
    decay: str = "linear",
    step_decay: tuple[int, float] | None = None,
) -> float:
    """Share of the peak learning rate at 0-based `step` of `total`. `floor` is the share that remains at the end.

    warm-up:  warmup_from + (1 - warmup_from) * (step + 1) / warmup, for step < warmup.
    constant, linear, cosine:  floor + (1 - floor) * SHAPES[shape](progress from the end of the warm-up to total).
    wsd:   1 until stable_ratio * total (the warm-up counts), then max(floor, DECAYS[decay](progress from there to
           total)). The floor cuts the decay off, as in Llama-3-SynE's code; with stable_ratio 0.9 and total 100,
           step 90 still has 1, step 95 has .5 and step 99, the last, .1. transformers' wsd bends the curve to end at
           the floor instead; "exponential" does so here. stable_ratio 1 never decays.
    step:  gamma ** ((step - warmup) // every) with (every, gamma) = step_decay: torch's StepLR after the warm-up.

    Raises ValueError for an unknown shape or decay, for "step" without step_decay, for an exponential decay to zero and
    for a decay that would begin inside the warm-up.
    """
    if shape not in SCHEDULES:
        raise ValueError(f"[schedule] shape: expected one of {', '.join(SCHEDULES)}, got {shape!r}.")
    if step < warmup:
        return warmup_from + (1.0 - warmup_from) * (step + 1) / warmup
    if shape == "wsd":
        return _decay(step, total, warmup, floor, stable_ratio, decay)
    if shape == "step":
        if step_decay is None:
            raise ValueError("[schedule] step_decay: expected (every, gamma) with shape 'step', got none.")
        every, gamma = step_decay
        return max(floor, gamma ** ((step - warmup) // every))
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1.0 - floor) * SHAPES[shape](progress)


def _decay(step: int, total: int, warmup: int, floor: float, stable_ratio: float, decay: str) -> float:
    if decay not in DECAYS:
        raise ValueError(f"[schedule] decay: expected one of {', '.join(DECAYS)}, got {decay!r}.")
    if decay == "exponential" and not floor > 0:
        raise ValueError(f"[schedule] floor: expected more than 0 with an exponential decay, got {floor}.")
    begin = stable_ratio * total
    if begin < warmup < total:
        raise ValueError(
            f"[schedule] stable_ratio: {stable_ratio} of {total} steps is {begin:g}, within the warm-up of {warmup}. "
            "The decay must begin after it: raise stable_ratio or shorten the warm-up."
        )
    if step <= begin or stable_ratio >= 1:
        return 1.0
    progress = min(1.0, (step - begin) / (total - begin))
    return floor**progress if decay == "exponential" else max(floor, DECAYS[decay](progress))


def check(optim, where: str) -> None:
    """Raise ValueError when the schedule fields of an OptimConfig do not fit each other; `where` is named."""
    if optim.schedule == "step":
        if optim.step_decay is None:
            raise ValueError(
                f"{where}: optim.step_decay: expected [every, gamma] with optim.schedule step, got nothing. "
                "E.g. step_decay: [6212, 0.85]."
            )
        every, gamma = optim.step_decay
        if every < 1 or not 0 < gamma <= 1:
            raise ValueError(
                f"{where}: optim.step_decay: expected [every, gamma] with every at least 1 and gamma above 0 and up to "
                f"1, got [{every}, {gamma}]."
            )
    elif optim.step_decay is not None:
        raise ValueError(
            f"{where}: optim.step_decay: has no effect with optim.schedule {optim.schedule}. "
            "Set optim.schedule to step, or leave it out."
        )
    if optim.schedule == "wsd" and optim.decay == "exponential" and not optim.min_lr_ratio > 0:
        raise ValueError(
            f"{where}: optim.min_lr_ratio: expected more than 0 with optim.decay exponential, which never reaches 0; "
            f"got {optim.min_lr_ratio}."
        )
