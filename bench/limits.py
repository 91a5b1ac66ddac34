# SPDX-License-Identifier: Apache-2.0
"""What the machine can do at best on a workload, measured beside it and not taken from a data sheet."""

from __future__ import annotations

from itertools import count

import torch

GEMM = "plain GEMM"
GEMMS = "plain GEMMs"
GEMMS_REUSED = "same, outputs reused"
COPY = "copy"
NEW_COPY = "copy to new memory"
COLD = 64 << 20  # bytes: more than the caches hold


def gemms(hidden: str = "hidden", weight: str = "weight", backward: bool = True) -> dict:
    """The products that torch's autograd would run for logits = hidden · weightᵀ, with its operands and layouts.

    Plain ones allocate their results as autograd does; the others write into the same memory each time, which spares
    the page faults and is the harder limit. The inputs need `.grad_logits`, a tensor [N, V], when there is a backward.
    """

    def plain(x):
        h, w = getattr(x, hidden).detach(), getattr(x, weight).detach()
        kept = [torch.mm(h, w.t())]
        if backward:
            kept += [torch.mm(x.grad_logits, w), torch.mm(x.grad_logits.t(), h)]
        return kept

    memory: list[torch.Tensor] = []

    def reused(x):
        if not memory:
            memory.extend(plain(x))
        h, w = getattr(x, hidden).detach(), getattr(x, weight).detach()
        torch.mm(h, w.t(), out=memory[0])
        if backward:
            torch.mm(x.grad_logits, w, out=memory[1])
            torch.mm(x.grad_logits.t(), h, out=memory[2])

    return {GEMMS: plain, GEMMS_REUSED: reused}


def copy(size: int, device: torch.device) -> dict:
    """Moving as many bytes as the op has to read and write: a copy of half of them (each is read once, written once).

    Small copies walk through a larger area, so that they find nothing in cache, as the op's own inputs do not.
    """
    half = max(1, size // 2)
    places = max(1, COLD // half)
    source, target = (torch.ones(places * half, dtype=torch.uint8, device=device) for _ in range(2))
    turns = count()

    def run(x):
        begin = next(turns) % places * half
        return target[begin : begin + half].copy_(source[begin : begin + half])

    return {COPY: run}


def new_copy(written: int, device: torch.device) -> dict:
    """Writing that many bytes into memory that is allocated for them, as an op's result is, and reading as many. On a
    CPU, where a large result is new pages each time, that costs several times the copy itself."""
    source = torch.ones(max(1, written), dtype=torch.uint8, device=device)
    return {NEW_COPY: lambda x: source.clone()}
