# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm in plain torch, an expert at a time; works in any float dtype, so float64 input gives the truth."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from fastpost.int4 import Int4Weight
from fastpost.reference import moe_dispatch
from fastpost.reference.int4_gemm import dequantize

GATED = {  # act(first half of the columns) · second half
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "reglu": F.relu,
}
ACTIVATIONS = (None, *GATED)  # their places are the numbers that the core knows them by


def activate(pre, activation):
    """[R, N] -> [R, N / 2]; None changes nothing."""
    if activation is None:
        return pre
    first, second = pre.chunk(2, -1)
    return GATED[activation](first) * second


def grouped_gemm(x, weight, offset, *, order=None, top_k=1, bias=None, activation=None):
    """Same signature and meaning as :func:`fastpost.grouped_gemm`; four-bit weights are not rounded to x's dtype."""
    if isinstance(weight, Int4Weight):
        weight = dequantize(weight).view(offset.numel() - 1, -1, weight.columns)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x if order is None else x.index_select(0, order.long() // top_k)
    bounds, parts = offset.tolist(), []
    for e, (begin, end) in enumerate(pairwise(bounds)):
        part = rows[begin:end].to(wide) @ weight[e].to(wide).T
        parts.append(part if bias is None else part + bias[e].to(wide))
    parts.append(rows.new_zeros(len(rows) - bounds[-1], weight.shape[1], dtype=wide))
    return activate(torch.cat(parts), activation).to(x.dtype)


@dataclass(frozen=True)
class Case:
    """x [T, K] or already grouped, weight [E, N, K]; `routing` says who has which rows."""

    name: str
    routing: moe_dispatch.Case  # its h is K
    n: int
    activation: str | None = None
    gather: bool = True
    bias: bool = False
    transposed: bool = False  # weight lies as [E, K, N]
    scale: float = 1.0

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        """(x, weight, offset) and the keyword arguments."""
        g = torch.Generator().manual_seed(seed + 2)
        x, plan = self.routing.inputs(dtype, device, seed)
        e, k = self.routing.e, self.routing.h
        weight = self.scale * torch.randn(e, self.n, k, generator=g) / k**0.5
        weight = weight.to(dtype).to(device)
        if self.transposed:
            weight = weight.mT.contiguous().mT
        options = {"activation": self.activation}
        if self.gather:
            options |= {"order": plan.order, "top_k": self.routing.k}
        else:
            x = moe_dispatch.moe_dispatch(x, plan)
        if self.bias:
            options["bias"] = torch.randn(e, self.n, generator=g).to(dtype).to(device)
        return (x, weight, plan.offset), options


def cases() -> list[Case]:
    shapes = {c.name: c for c in moe_dispatch.cases()}
    return [
        Case("mixtral", shapes["mixtral"], 96, "swiglu"),
        Case("plain", shapes["mixtral"], 80),
        Case("grouped", shapes["mixtral"], 80, gather=False),
        Case("geglu", shapes["top-1"], 64, "geglu", bias=True),
        Case("geglu-tanh", shapes["all-experts"], 40, "geglu_tanh"),
        Case("reglu", shapes["all-experts"], 24, "reglu", gather=False),
        Case("odd", shapes["odd-columns"], 29, bias=True),
        Case("odd-swiglu", shapes["odd-columns"], 58, "swiglu", bias=True),
        Case("transposed", shapes["mixtral"], 48, transposed=True),
        Case("transposed-odd", shapes["odd-columns"], 30, "swiglu", transposed=True),
        Case("one-token", shapes["one-token"], 32, "swiglu"),
        Case("no-tokens", shapes["no-tokens"], 32, "swiglu"),
        Case("empty-experts", shapes["empty-experts"], 16, "swiglu"),
        Case("one-has-all", shapes["one-has-all"], 50, "swiglu"),
        Case("some-absent", shapes["some-absent"], 32, "swiglu"),
        Case("none-here", shapes["none-here"], 16, bias=True),
        Case("large", moe_dispatch.Case("large", 700, 2, 4, 200), 400, "swiglu"),
        Case("tiny-scale", shapes["mixtral"], 64, scale=1e-3),
        Case("huge-scale", shapes["mixtral"], 64, scale=1e3),
    ]
