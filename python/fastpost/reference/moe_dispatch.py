# SPDX-License-Identifier: Apache-2.0
"""moe_dispatch in plain torch, and a case list that moe_combine and grouped_gemm share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastpost.reference.moe_route import Plan, moe_plan


def moe_dispatch(x, plan):
    """Same signature and meaning as :func:`fastpost.moe_dispatch`."""
    t, k = plan.place.shape
    slots = x.reshape(t * k, x.shape[-1]) if x.ndim == 3 else x.repeat_interleave(k, 0)
    rows = slots.index_select(0, plan.order.long())
    present = torch.arange(t * k, device=x.device) < plan.offset[-1]
    return torch.where(present[:, None], rows, 0)


@dataclass(frozen=True)
class Case:
    """A plan of T tokens and K slots over E experts, and rows of H columns."""

    name: str
    t: int
    k: int
    e: int
    h: int
    one_expert: bool = False  # has all tokens
    absent: float = 0.0  # share of slots that nobody here works on

    def plan(self, device="cpu", seed=0) -> Plan:
        g = torch.Generator().manual_seed(seed)
        expert = torch.rand(self.t, self.e, generator=g).argsort(-1)[:, : self.k]
        if self.one_expert:
            expert = torch.full((self.t, self.k), self.e - 1)
        expert = torch.where(torch.rand(self.t, self.k, generator=g) < self.absent, self.e, expert)
        return moe_plan(expert.to(device), self.e)

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        """(x [T, H], plan); with `slots`, x [T, K, H]."""
        g = torch.Generator().manual_seed(seed + 1)
        return torch.randn(self.t, self.h, generator=g).to(dtype).to(device), self.plan(device, seed)


def cases() -> list[Case]:
    return [
        Case("mixtral", 60, 2, 8, 64),
        Case("odd-columns", 37, 3, 5, 23),
        Case("top-1", 50, 1, 4, 32),
        Case("all-experts", 21, 4, 4, 40),
        Case("one-token", 1, 2, 8, 48),
        Case("no-tokens", 0, 2, 8, 16),
        Case("empty-experts", 4, 2, 64, 32),
        Case("one-has-all", 70, 2, 8, 16, one_expert=True),
        Case("some-absent", 45, 2, 6, 24, absent=0.3),
        Case("none-here", 12, 2, 4, 16, absent=1.1),
    ]
