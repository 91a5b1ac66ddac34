# SPDX-License-Identifier: Apache-2.0
"""One workload: what is run, what it must give, how much work it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[Any], Any]  # inputs -> {output name: tensor}; the inputs are whatever Case.make returns

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest relative error with which results still agree. bfloat16 has 8 bits of mantissa: rounding once costs 2e-3."""


@dataclass(frozen=True)
class Options:
    """What the command line asks of the workloads."""

    device: torch.device
    quick: bool = False  # small shapes: does it run at all?
    peers: list[str] | None = None  # None = all that are installed
    clock: str = "wall"  # of timing.CLOCKS


@dataclass
class Case:
    """`runs` holds the providers in the order of the table, ours ("fastpost") first; `limits` what nothing can beat."""

    name: str
    make: Callable[[], Any]
    runs: dict[str, Run]
    limits: dict[str, Run] = field(default_factory=dict)
    reference: Run | None = None
    tolerance: float = 0.0
    flops: int = 0
    bytes: int = 0  # what must move to and from memory at the least
    bound: str = "compute"  # or "memory": whether FLOP/s or B/s is shown
    calls: int = 1  # how often one run calls what is measured
    goals: dict[str, float] = field(default_factory=dict)  # seconds a call


def errors(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Per output: |got - wanted| / |wanted| over the whole tensor, and over its worst row. Compares what both have."""
    result = {}
    for name in wanted.keys() & got.keys():
        a, b = got[name].detach().to(wanted[name].dtype), wanted[name]
        difference = a.reshape(b.shape) - b
        rows, norms = difference.reshape(-1, b.shape[-1] if b.ndim > 1 else 1), b.reshape(difference.shape)
        norms = norms.reshape(rows.shape).norm(dim=1)
        scored = norms > 0
        worst = (rows.norm(dim=1)[scored] / norms[scored]).max() if scored.any() else rows.norm()
        result[name] = {"all": float(difference.norm() / b.norm().clamp(min=1e-30)), "worst_row": float(worst)}
    return result


def worst(found: dict[str, dict[str, float]]) -> float:
    """The number that decides: the largest error over a whole output. NaN counts as infinite."""
    values = [e["all"] for e in found.values()]
    return max((v if v == v else float("inf") for v in values), default=float("inf"))
