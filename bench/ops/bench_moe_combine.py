# SPDX-License-Identifier: Apache-2.0
"""moe_combine: weighted sums of experts' rows, back at the tokens, and the gradients of rows and gates. Memory-bound.
Forward reads K rows a token and writes one; backward reads the token's gradient and K rows and writes K."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import fastpost
from bench import limits, peers
from bench.case import TOLERANCE, Case, Options
from fastpost.reference import moe_combine as reference

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
        g = torch.Generator().manual_seed(7)
        plan = reference.Case("", t, k, e, h).plan(options.device)
        y = torch.randn(t * k, h, generator=g).to(dtype).to(options.device).requires_grad_(backward)
        gate = torch.rand(t, k, generator=g).to(options.device).requires_grad_(backward)
        grad = torch.randn(t, h, generator=g).to(dtype).to(options.device)
        token, place = plan.order.long() // k, plan.place.long()
        return SimpleNamespace(y=y, gate=gate, plan=plan, grad=grad, token=token, place=place, order=plan.order.long())

    found = {"eager": index_add, "eager gather": gather_sum}
    runs = {"fastpost": lambda y, gate, i: fastpost.moe_combine(y, i.plan, gate)} | peers.pick(found, options.peers)
    size = (t * k + t + backward * (2 * t * k + t)) * h * dtype.itemsize
    return Case(
        name=f"T={t} K={k} E={e} H={h} {str(dtype)[6:]} {'forward+backward' if backward else 'forward'}",
        make=make,
        runs={name: run(f, backward) for name, f in runs.items()},
        limits=limits.copy(size, options.device)
        | limits.new_copy((t + backward * t * k) * h * dtype.itemsize, options.device),
        reference=run(lambda y, gate, i: reference.moe_combine(y, i.plan, gate), backward, torch.float32),
        tolerance=TOLERANCE[dtype],
        bytes=size,
        bound="memory",
    )


def index_add(y, gate, i):
    """As transformers' loop over experts ends: in y's dtype."""
    weighted = y * gate.flatten()[i.order, None].to(y.dtype)
    return torch.zeros(i.plan.place.shape[0], y.shape[1], dtype=y.dtype, device=y.device).index_add(
        0, i.token, weighted
    )


def gather_sum(y, gate, i):
    """As its grouped path ends."""
    rows = y[i.place.flatten()] * gate.flatten()[:, None].to(y.dtype)
    return rows.view(*i.place.shape, -1).sum(1)


def run(f, backward: bool, dtype: torch.dtype | None = None):
    def call(i):
        y, gate = i.y, i.gate
        if dtype is not None:
            y, gate = (p.detach().to(dtype).requires_grad_(backward) for p in (y, gate))
        with torch.set_grad_enabled(backward):
            out = f(y, gate, i)
            result = {"out": out.detach()}
            if backward:
                grads = torch.autograd.grad(out, (y, gate), i.grad.to(out.dtype))
                result |= dict(zip(("grad_y", "grad_gate"), grads))
        return result

    return call
