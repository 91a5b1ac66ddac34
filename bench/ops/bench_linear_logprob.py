# SPDX-License-Identifier: Apache-2.0
"""linear_logprob: three GEMMs of N·V·D are the floor; the question is what everything between them costs."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import fastpost
from bench import limits, peers
from bench.case import TOLERANCE, Case, Options
from fastpost.reference import linear_logprob as reference

SHAPES = ((512, 1024, 32000), (1024, 576, 49152))  # N, D, V; the second is the head of SmolLM2-135M
SMALL = ((64, 64, 1000),)


def cases(options: Options):
    for n, d, v in SMALL if options.quick else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            yield case(options, n, d, v, dtype)
            yield case(options, n, d, v, dtype, backward=False)
        yield case(options, n, d, v, torch.bfloat16, scored=0.4)


def case(options, n, d, v, dtype, backward=True, scored=1.0) -> Case:
    shape = reference.Case("bench", n, d, v, scale=3.0, ignored=1 - scored if scored < 1 else 0.0)

    def make():
        hidden, weight, target, _ = shape.inputs(dtype, options.device)
        made = SimpleNamespace(hidden=hidden, weight=weight, target=target, scored=int((target >= 0).sum()))
        made.grad_logits = torch.randn(made.scored, v, device=options.device).mul_(1e-3).to(dtype)
        made.rows = hidden[target >= 0]  # what the limit multiplies
        hidden.requires_grad_(backward), weight.requires_grad_(backward)
        return made

    found = peers.linear_logprob(options.device)
    if scored < 1:
        found["eager, rows picked"] = peers.rows_picked(found["eager"])
    found = {"fastpost": fastpost.linear_logprob} | peers.pick(found, options.peers)
    exact = torch.float32 if dtype != torch.float32 else torch.float64
    elements = d * (n * scored + v)  # of hidden and weight
    return Case(
        name=f"N={n} D={d} V={v} {str(dtype)[6:]} {'forward+backward' if backward else 'forward'}"
        + (f", {scored:.0%} of rows scored" if scored < 1 else ""),
        make=make,
        runs={name: run(f, backward) for name, f in found.items()},
        limits=limits.gemms("rows", "weight", backward),
        reference=run(reference.linear_logprob, backward, exact),
        tolerance=TOLERANCE[dtype],
        flops=int((6 if backward else 2) * n * scored * v * d),  # 2 N V D for each of logits, dX = dZ·W, dW = dZᵀ·X
        bytes=int(elements * dtype.itemsize * (3 if backward else 1)),  # read twice, gradients written once
    )


def run(f, backward: bool, dtype: torch.dtype | None = None):
    """The mean of -logprob over scored tokens, as every peer can give it, and its gradients."""

    def call(x):
        h, w = (x.hidden, x.weight) if dtype is None else (t.detach().to(dtype) for t in (x.hidden, x.weight))
        with torch.set_grad_enabled(backward):
            if backward and dtype:
                h.requires_grad_(), w.requires_grad_()
            out = f(h, w, x.target)
            if hasattr(f, "mean_only"):
                loss, result = out, {"loss": out.detach()}
            else:
                loss = -out.to(torch.promote_types(out.dtype, torch.float32)).sum() / x.scored
                result = {"loss": loss.detach(), "logprob": out.detach()}
            if backward:
                result["grad_hidden"], result["grad_weight"] = torch.autograd.grad(loss, (h, w))
        return result

    return call
