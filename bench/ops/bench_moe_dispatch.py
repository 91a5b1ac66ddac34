# SPDX-License-Identifier: Apache-2.0
"""moe_dispatch: rows of tokens gathered in the order of their experts. Bound by memory: each row of the result is read
once and written once (tokens that stay in cache between their K uses are read less). Backward sums K rows a token."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import fastpost
from bench import limits, peers
from bench.case import TOLERANCE, Case, Options
from fastpost.reference import moe_dispatch as reference

SHAPES = ((16384, 2, 8, 2048), (4096, 8, 128, 2048))  # T, K, E, H
SMALL = ((64, 2, 8, 128),)


def cases(options: Options):
    for shape in SMALL if options.quick else SHAPES:
        for backward in (False, True):
            yield case(options, *shape, torch.bfloat16, backward)
    if not options.quick:
        yield case(options, *SHAPES[0], torch.float32, False)


def case(options, t, k, e, h, dtype, backward) -> Case:
    def make():
        x, plan = reference.Case("", t, k, e, h).inputs(dtype, options.device)
        # as a framework's own indexing wants them
        token, slot = plan.order.long() // k, plan.order.long()
        grad = torch.ones(t * k, h, dtype=dtype, device=options.device)
        return SimpleNamespace(x=x.requires_grad_(backward), plan=plan, token=token, slot=slot, grad=grad)

    found = {"eager": lambda x, i: x.index_select(0, i.token), "eager indexing": lambda x, i: x[i.token]}
    runs = {"fastpost": lambda x, i: fastpost.moe_dispatch(x, i.plan)} | peers.pick(found, options.peers)
    size = (2 + 2 * backward) * t * k * h * dtype.itemsize
    return Case(
        name=f"T={t} K={k} E={e} H={h} {str(dtype)[6:]} {'forward+backward' if backward else 'forward'}",
        make=make,
        runs={name: run(f, backward) for name, f in runs.items()},
        limits=limits.copy(size, options.device)
        | limits.new_copy((t * k + backward * t) * h * dtype.itemsize, options.device),
        reference=run(lambda x, i: reference.moe_dispatch(x, i.plan), backward, torch.float32),
        tolerance=TOLERANCE[dtype],
        bytes=size,
        bound="memory",
    )


def run(f, backward: bool, dtype: torch.dtype | None = None):
    def call(i):
        x = i.x if dtype is None else i.x.detach().to(dtype).requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            out = f(x, i)
            result = {"out": out.detach()}
            if backward:
                (result["grad_x"],) = torch.autograd.grad(out, x, i.grad.to(out.dtype))
        return result

    return call
