# SPDX-License-Identifier: Apache-2.0
"""kv_select: FILL IN what bounds it. Here memory: forward reads x once, backward writes its gradient."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import fastpost
from bench import limits, peers
from bench.case import TOLERANCE, Case, Options
from fastpost.reference import kv_select as reference

SHAPES = ((4096, 4096),)  # N, D
SMALL = ((64, 100),)


def cases(options: Options):
    for n, d in SMALL if options.quick else SHAPES:
        yield case(options, n, d)


def case(options, n, d) -> Case:
    def make():
        (x,) = reference.Case("bench", n, d).inputs(torch.float32, options.device)
        return SimpleNamespace(x=x.requires_grad_())

    found = {"fastpost": fastpost.kv_select} | peers.pick({"eager": lambda x: x.sum(1)}, options.peers)
    size = 2 * n * d * 4  # x read, grad_x written
    return Case(
        name=f"N={n} D={d} float32 forward+backward",
        make=make,
        runs={name: run(f) for name, f in found.items()},
        limits=limits.copy(size, options.device),
        reference=run(reference.kv_select, torch.float64),
        tolerance=TOLERANCE[torch.float32],
        bytes=size,
        bound="memory",
    )


def run(f, dtype: torch.dtype | None = None):
    def call(inputs):
        x = inputs.x if dtype is None else inputs.x.detach().to(dtype).requires_grad_()
        out = f(x)
        (grad_x,) = torch.autograd.grad(out.sum(), x)
        return {"out": out.detach(), "grad_x": grad_x}

    return call
