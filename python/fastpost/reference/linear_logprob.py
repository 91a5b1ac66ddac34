# SPDX-License-Identifier: Apache-2.0
"""linear_logprob in plain torch; works in any float dtype, so float64 input gives the truth."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastpost.reference.token_logprob import token_logprob


def linear_logprob(hidden, weight, target, *, bias=None, temperature=1.0, softcap=None, ignore_index=-100,
                   return_entropy=False, memory_budget=None):  # fmt: skip
    """Same signature and meaning as :func:`fastpost.linear_logprob`; stores the logits."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return token_logprob(logits, target, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
                         return_entropy=return_entropy)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One shape with its options; `inputs` draws the tensors."""

    name: str
    n: int
    d: int
    v: int
    scale: float = 1.0  # of the logits
    bias: bool = False
    ignored: float = 0.0
    peaked: bool = False  # hidden states point at their target's row of the weight: p -> 1
    options: dict = field(default_factory=dict)

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        """hidden, weight, target, bias or None."""
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(self.v, self.d, generator=g)
        target = torch.randint(0, self.v, (self.n,), generator=g)
        if self.peaked:
            hidden = weight[target] * (12.0 / self.d)
        else:
            hidden = torch.randn(self.n, self.d, generator=g) * (self.scale / self.d**0.5)
        bias = torch.randn(self.v, generator=g).to(dtype).to(device) if self.bias else None
        if self.ignored:
            target[torch.rand(self.n, generator=g) < self.ignored] = self.options.get("ignore_index", -100)
        return hidden.to(dtype).to(device), weight.to(dtype).to(device), target.to(device), bias


MIB = 1 << 20


def cases() -> list[Case]:
    small = {"memory_budget": MIB}  # forces tiles, and with these sizes every kind of sweep
    return [
        Case("empty", 0, 8, 17),
        Case("one-row", 1, 16, 100),
        Case("odd", 13, 31, 1003),
        Case("tiny-scale", 8, 16, 333, scale=1e-3),
        Case("huge-scale", 8, 16, 333, scale=1e3),
        Case("peaked", 16, 64, 500, peaked=True),
        Case("half-ignored", 33, 16, 515, ignored=0.5),
        Case("all-ignored", 4, 8, 100, ignored=1.1),
        Case("bias", 9, 16, 777, bias=True),
        Case("softcap", 9, 16, 777, scale=30, options={"softcap": 30.0}),
        Case("entropy", 9, 16, 777, scale=2, options={"return_entropy": True}),
        Case("everything", 40, 24, 2001, scale=10, bias=True, ignored=0.3,
             options={"temperature": 1.3, "softcap": 20.0, "return_entropy": True}),
        Case("slices", 64, 32, 9000, bias=True, options=small),  # few rows: the vocabulary is cut
        Case("blocks", 3000, 8, 300, bias=True, ignored=0.2, options=small),  # many rows: the rows are cut
        Case("cols", 1200, 16, 5000, ignored=0.2, options=small),  # both are, and the three ways to sum gradients
        Case("rows", 2500, 16, 1200, ignored=0.2, bias=True, options=small),
        Case("twice", 2100, 128, 1700, scale=2, ignored=0.2, options=small | {"return_entropy": True}),
    ]  # fmt: skip
