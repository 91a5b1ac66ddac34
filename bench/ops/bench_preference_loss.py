# SPDX-License-Identifier: Apache-2.0
"""preference_loss with SimPO, forward and backward: linear_logprob's three GEMMs, and the sums per sequence."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import fastpost
from bench import limits, peers
from bench.case import TOLERANCE, Case, Options
from fastpost.reference import preference_loss as reference

SHAPES = ((512, 1024, 32000, 8), (1024, 576, 49152, 4))  # T, D, V, pairs
SMALL = ((64, 64, 1000, 4),)
BETA, GAMMA_BETA_RATIO = 2.0, 0.5


def cases(options: Options):
    for t, d, v, pairs in SMALL if options.quick else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            yield case(options, t, d, v, pairs, dtype)


def case(options, t, d, v, pairs, dtype) -> Case:
    def make():
        g = torch.Generator().manual_seed(0)
        hidden = (torch.randn(t, d, generator=g) * (3 / d**0.5)).to(dtype).to(options.device)
        weight = torch.randn(v, d, generator=g).to(dtype).to(options.device)
        target = torch.randint(0, v, (t,), generator=g).to(options.device)
        ends = torch.arange(0, t + 1, t // (2 * pairs), dtype=torch.int32, device=options.device)
        grad_logits = torch.randn(t, v, device=options.device).mul_(1e-3).to(dtype)
        return SimpleNamespace(hidden=hidden.requires_grad_(), weight=weight.requires_grad_(), target=target, ends=ends,
                               grad_logits=grad_logits)  # fmt: skip

    simpo = fastpost.objectives.SimPO(beta=BETA, gamma_beta_ratio=GAMMA_BETA_RATIO)
    runs = {"fastpost": lambda h, w, x: fastpost.preference_loss(h, w, x.target, x.ends, simpo).loss}
    for name, f in peers.pick(peers.simpo(options.device), options.peers).items():
        runs[name] = lambda h, w, x, f=f: f(h, w, x.target, pairs, BETA, GAMMA_BETA_RATIO)
    exact = torch.float32 if dtype != torch.float32 else torch.float64
    return Case(
        name=f"SimPO T={t} D={d} V={v} {pairs} pairs {str(dtype)[6:]} forward+backward",
        make=make,
        runs={name: run(f) for name, f in runs.items()},
        limits=limits.gemms(),
        reference=run(lambda h, w, x: reference.preference_loss(h, w, x.target, x.ends, simpo).loss, exact),
        tolerance=TOLERANCE[dtype],
        flops=6 * t * v * d,
        bytes=3 * d * (t + v) * dtype.itemsize,
    )


def run(f, dtype: torch.dtype | None = None):
    def call(x):
        h, w = x.hidden, x.weight
        if dtype is not None:
            h, w = (p.detach().to(dtype).requires_grad_() for p in (h, w))
        loss = f(h, w, x)
        grad_hidden, grad_weight = torch.autograd.grad(loss, (h, w))
        return {"loss": loss.detach(), "grad_hidden": grad_hidden, "grad_weight": grad_weight}

    return call
