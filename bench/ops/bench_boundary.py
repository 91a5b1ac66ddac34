# SPDX-License-Identifier: Apache-2.0
"""What crossing from Python into the core costs: an op that does nothing, with five tensors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat

import torch

from bench.case import Case, Options
from fastpost import _core

CALLS = 2000  # in one run, so that the loop around them costs 0.01 µs each
GOALS = {"core call": 1.5e-6, "through the dispatcher": 5e-6}


def cases(options: Options):
    tensors = tuple(torch.zeros(8, device=options.device) for _ in range(5))
    op, custom = dispatched()
    calls = {
        "core call": lambda: _core.empty_op(*tensors),
        "through the dispatcher": lambda: op(*tensors),
        "torch.library.custom_op": lambda: custom(*tensors),
        "torch.add": lambda: torch.add(tensors[0], tensors[1]),
        "an empty lambda": lambda: None,
    }
    yield Case(
        name="empty op with five tensors",
        make=lambda: None,
        runs={name: many(call) for name, call in calls.items()},
        calls=CALLS,
        goals=GOALS,
    )


def many(call: Callable[[], object]):
    def run(_):
        for _ in repeat(None, CALLS):
            call()
        return {}

    return run


def dispatched() -> tuple[Callable, Callable]:
    """The empty op behind torch's dispatcher: as fastpost registers ops, and as torch's decorator does."""
    five = ", ".join(f"Tensor {x}" for x in "abcde")
    library = torch.library.Library("fastpost_bench", "FRAGMENT")
    library.define(f"empty({five}) -> ()")
    for key in ("CPU", "CUDA"):
        library.impl("empty", _core.empty_op, key)

    @torch.library.custom_op("fastpost_bench::empty_custom", mutates_args=())
    def custom(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, e: torch.Tensor) -> None:
        _core.empty_op(a, b, c, d, e)

    dispatched.keep = library  # its ops live as long as it does
    return torch.ops.fastpost_bench.empty.default, custom
