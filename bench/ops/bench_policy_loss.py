# SPDX-License-Identifier: Apache-2.0
"""policy_loss with DAPO's clipping, forward and backward: when every reply teaches something, and when 40 % have
advantage 0 (groups of equal rewards), whose rows need no GEMM in the backward: 2 of 6 parts for all rows, 4 for the
rest. The limit is the plain GEMMs of all rows in both cases."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import fastpost
from bench import limits, peers
from bench.case import TOLERANCE, Case, Options
from fastpost.reference import policy_loss as reference

SHAPES = ((500, 1024, 32000, 10), (1000, 576, 49152, 10))  # T, D, V, sequences
SMALL = ((80, 64, 1000, 10),)
DAPO = fastpost.objectives.GRPO("dapo", epsilon_high=0.28)


def cases(options: Options):
    for t, d, v, s in SMALL if options.quick else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for neutral in (0, 4 * s // 10):
                yield case(options, t, d, v, s, dtype, neutral)


def case(options, t, d, v, s, dtype, neutral) -> Case:
    def make():
        g = torch.Generator().manual_seed(0)
        advantage = torch.randn(s, generator=g)
        advantage[:neutral] = 0
        tensors = {
            "hidden": (torch.randn(t, d, generator=g) * (3 / d**0.5)).to(dtype),
            "weight": torch.randn(v, d, generator=g).to(dtype),
            "target": torch.randint(0, v, (t,), generator=g),
            "ends": torch.arange(0, t + 1, t // s, dtype=torch.int32),
            "advantage": advantage,
            "grad_logits": torch.randn(t, v).mul_(1e-3).to(dtype),
        }
        x = SimpleNamespace(**{name: tensor.to(options.device) for name, tensor in tensors.items()})
        x.hidden.requires_grad_(), x.weight.requires_grad_()
        return x

    runs = {"fastpost": lambda h, w, x: fastpost.policy_loss(h, w, x.target, x.ends, DAPO, advantage=x.advantage).loss}
    for name, f in peers.pick(peers.linear_logprob(options.device), options.peers).items():
        if not hasattr(f, "mean_only"):
            runs[name] = lambda h, w, x, f=f: surrogate(f(h, w, x.target), x)
    exact = torch.float32 if dtype != torch.float32 else torch.float64

    def truth(h, w, x):
        return reference.policy_loss(h, w, x.target, x.ends, DAPO, advantage=x.advantage.to(exact)).loss

    return Case(
        name=f"DAPO T={t} D={d} V={v} {neutral} of {s} replies neutral {str(dtype)[6:]} forward+backward",
        make=make,
        runs={name: run(f) for name, f in runs.items()},
        limits=limits.gemms(),
        reference=run(truth, exact),
        tolerance=TOLERANCE[dtype],
        flops=(2 * t + 4 * (s - neutral) * (t // s)) * v * d,
        bytes=3 * d * (t + v) * dtype.itemsize,
    )


def surrogate(logprob, x):
    """The same loss from anyone's log-probs of tokens, on-policy."""
    logprob, advantage = logprob.float(), x.advantage.repeat_interleave(x.ends.diff())
    ratio = (logprob - logprob.detach()).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).mean()


def run(f, dtype: torch.dtype | None = None):
    def call(x):
        h, w = x.hidden, x.weight
        if dtype is not None:
            h, w = (p.detach().to(dtype).requires_grad_() for p in (h, w))
        loss = f(h, w, x)
        grad_hidden, grad_weight = torch.autograd.grad(loss, (h, w))
        return {"loss": loss.detach(), "grad_hidden": grad_hidden, "grad_weight": grad_weight}

    return call
