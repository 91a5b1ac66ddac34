# SPDX-License-Identifier: Apache-2.0
"""token_logprob: bound by memory. Forward reads the logits; backward reads them again and writes their gradient."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import fastpost
from bench import limits, peers
from bench.case import TOLERANCE, Case, Options
from fastpost.reference import token_logprob as reference

SHAPES = ((512, 32000), (1024, 49152))  # N, V
SMALL = ((64, 1000),)


def cases(options: Options):
    for n, v in SMALL if options.quick else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            yield case(options, n, v, dtype)
            yield case(options, n, v, dtype, backward=False)
        yield case(options, n, v, torch.bfloat16, scored=0.4)


def case(options, n, v, dtype, backward=True, scored=1.0) -> Case:
    def make():
        g = torch.Generator().manual_seed(0)
        logits = (torch.randn(n, v, generator=g) * 3).to(dtype).to(options.device).requires_grad_(backward)
        target = torch.randint(0, v, (n,), generator=g)
        target[torch.rand(n, generator=g) >= scored] = peers.IGNORE
        return SimpleNamespace(logits=logits, target=target.to(options.device))

    found = {"fastpost": fastpost.token_logprob} | peers.pick(peers.token_logprob(options.device), options.peers)
    exact = torch.float32 if dtype != torch.float32 else torch.float64
    # Forward reads scored rows. Backward reads them again and writes a gradient for all rows, the ignored ones zero.
    size = int(n * v * dtype.itemsize * (2 * scored + 1 if backward else scored))
    return Case(
        name=f"N={n} V={v} {str(dtype)[6:]} {'forward+backward' if backward else 'forward'}"
        + (f", {scored:.0%} of rows scored" if scored < 1 else ""),
        make=make,
        runs={name: run(f, backward) for name, f in found.items()},
        limits=limits.copy(size, options.device),
        reference=run(reference.token_logprob, backward, exact),
        tolerance=TOLERANCE[dtype],
        bytes=size,
        bound="memory",
    )


def run(f, backward: bool, dtype: torch.dtype | None = None):
    def call(x):
        logits = x.logits if dtype is None else x.logits.detach().to(dtype).requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            logprob = f(logits, x.target)
            result = {"logprob": logprob.detach()}
            if backward:
                (result["grad_logits"],) = torch.autograd.grad(logprob.sum(), logits)
        return result

    return call
