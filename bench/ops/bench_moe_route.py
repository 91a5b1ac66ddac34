# SPDX-License-Identifier: Apache-2.0
"""moe_route: choice, gates, plan, load balance and z loss of a router, and their gradient. Bound by memory: logits in,
ids, gates and plan out; backward reads logits, ids and the gates' gradients and writes that of the logits.

The peers do what transformers does for its grouped path: softmax, top-k, a histogram, a sort, and the losses after."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import fastpost
from bench import limits, peers
from bench.case import TOLERANCE, Case, Options
from fastpost.reference import moe_route as reference

SHAPES = ((16384, 8, 2), (16384, 128, 8), (512, 8, 2))  # T, E, K
SMALL = ((64, 8, 2),)


def cases(options: Options):
    for t, e, k in SMALL if options.quick else SHAPES:
        for backward in (False, True):
            yield case(options, t, e, k, backward)


def case(options, t, e, k, backward) -> Case:
    def make():
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(t, e, generator=g).to(options.device).requires_grad_(backward)
        return SimpleNamespace(logits=logits, grad_gate=torch.randn(t, k, generator=g).to(options.device))

    found = {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    runs = {"fastpost": fastpost.moe_route} | peers.pick(found, options.peers)
    size = t * e * 4 + t * k * (8 + 4 + 4 + 4)
    return Case(
        name=f"T={t} E={e} K={k} float32 {'forward+backward' if backward else 'forward'}",
        make=make,
        runs={name: run(f, k, backward) for name, f in runs.items()},
        limits=limits.copy(size + backward * (2 * t * e * 4 + t * k * 12), options.device),
        reference=run(reference.moe_route, k, backward, torch.float64),
        tolerance=TOLERANCE[torch.float32],
        bytes=size + backward * (2 * t * e * 4 + t * k * 12),
        bound="memory",
    )


def eager(logits, top_k):
    (t, e), probability = logits.shape, logits.softmax(-1)
    gate, expert = probability.topk(top_k, -1)
    gate = gate / gate.sum(-1, keepdim=True)
    flat = expert.flatten()
    order = flat.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    rows = torch.histc(flat.float(), bins=e, min=0, max=e - 1)
    offset = torch.nn.functional.pad(rows.cumsum(0), (1, 0)).int()
    mean = probability.mean(0)
    plan = reference.Plan(offset, order.int(), place.view(t, top_k).int())
    load_balance = e * (rows / (t * top_k) * mean).sum()
    return reference.Routing(expert, gate, plan, load_balance, logits.logsumexp(-1).square().mean(), mean)


def run(f, top_k: int, backward: bool, dtype: torch.dtype | None = None):
    def call(x):
        logits = x.logits if dtype is None else x.logits.detach().to(dtype).requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            out = f(logits, top_k)
            result = {"gate": out.gate.detach(), "load_balance": out.load_balance.detach(), "z": out.z.detach()}
            result["offset"] = out.plan.offset.to(dtype or torch.float32)
            if backward:
                loss = (out.gate * x.grad_gate).sum() + 0.01 * out.load_balance + 0.001 * out.z
                (result["grad_logits"],) = torch.autograd.grad(loss, logits)
        return result

    return call
