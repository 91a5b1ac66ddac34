# SPDX-License-Identifier: Apache-2.0
"""MoA: a mixture of attention heads (arXiv 2210.05144). An expert owns a projection to queries and one from values.

Keys and values are shared by all experts and stay outside: a token's queries, from the experts that it chose, attend to
the same keys, and what each of them finds goes back through its own expert. One routing serves both ways.

    layer = fastpost.nn.MoA(hidden=2048, inner=16 * 128, experts=8, top_k=2, bias=True)     # JetMoE's: 16 heads of 128

    def attend(queries):                                         # [B, S, K, inner] -> the same
        heads = queries.view(B, S, K * 16, 128).transpose(1, 2)
        k, v = (t.repeat(1, K, 1, 1) for t in (keys, values))    # [B, 16, S, 128], shared
        return F.scaled_dot_product_attention(heads, k, v, is_causal=True).transpose(1, 2).reshape(queries.shape)

    out, routing = layer(x, attend)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastpost.nn.int4_experts import InFourBits, autocast, matrices, multiply
from fastpost.nn.moe import Router, as_rows, biased, spread
from fastpost.ops.moe_combine import moe_combine
from fastpost.ops.moe_route import Plan, Routing


class MoA(InFourBits, nn.Module):
    """queries[t, k] = query_e x_t, out[t] = Σ_k gate[t, k] · output_e values[t, k] (+ bias), e the k-th expert of t.

    Parameters: query [experts, inner, hidden], output [experts, hidden, inner], router.weight [experts, hidden], bias
    [hidden]. Call it as a module where hooks matter (FSDP2, checkpointing); `map` and `reduce` are its two halves.

    Args:
        hidden, experts, top_k: sizes.
        inner: columns of an expert's queries, its heads together.
        scoring, normalize, scale, correction: the router's; see Router and fastpost.moe_route.
        bias: a vector added after the experts' outputs are put together, as in JetMoE.

    Raises:
        ValueError: sizes below 1, top_k above experts, a scoring that does not exist.
    """

    expert_names = ("query", "output")

    def __init__(
        self,
        hidden: int,
        inner: int,
        experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        correction: bool = False,
        bias: bool = False,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if min(hidden, inner) < 1:
            raise ValueError(f"[MoA] expected at least one column, got hidden {hidden}, inner {inner}.")
        made = {"device": device, "dtype": dtype}
        self.router = Router(
            hidden, experts, top_k, scoring=scoring, normalize=normalize, scale=scale, correction=correction, **made
        )
        self.query = nn.Parameter(torch.empty(experts, inner, hidden, **made))
        self.output = nn.Parameter(torch.empty(experts, hidden, inner, **made))
        self.bias = nn.Parameter(torch.empty(hidden, **made)) if bias else None
        self._reset()

    def reset_parameters(self) -> None:
        """As nn.Linear does for each expert; the bias is 0."""
        self.router.reset_parameters()
        self._reset()

    def _reset(self) -> None:
        spread(self.query, self.output)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, Routing]:
        """x [..., hidden] -> (out [..., hidden], Routing); attend takes queries [..., K, inner] to values of that
        shape."""
        queries, routing = self.map(x)
        return self.reduce(attend(queries), routing), routing

    def map(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """x [B, S, hidden] -> (queries [B, S, K, inner], Routing)."""
        rows = as_rows("MoA", x, self.query.shape[2])
        routing = self.router(rows)
        queries = map_heads(*autocast(rows, matrices(self.query)), routing.plan)
        return queries.view(*x.shape[:-1], *queries.shape[1:]), routing

    def reduce(self, values: torch.Tensor, routing: Routing) -> torch.Tensor:
        """values [B, S, K, inner], in the order of the queries of `map`, whose Routing it takes -> [B, S, hidden]."""
        rows = as_rows("MoA", values, self.output.shape[2])
        rows, output = autocast(rows, matrices(self.output))
        out = biased(reduce_heads(rows, output, routing.plan, routing.gate), self.bias)
        return out.view(*values.shape[:-2], out.shape[-1])

    def extra_repr(self) -> str:
        experts, hidden, inner = self.output.shape
        return f"hidden={hidden}, inner={inner}, experts={experts}, bias={self.bias is not None}"


def map_heads(x: torch.Tensor, query: torch.Tensor, plan: Plan) -> torch.Tensor:
    """x [T, H], query [E, D, H] -> [T, K, D]."""
    rows = multiply(x, query, plan.offset, order=plan.order, top_k=plan.place.shape[1])
    return moe_combine(rows, plan, reduce=False)


def reduce_heads(values: torch.Tensor, output: torch.Tensor, plan: Plan, gate: torch.Tensor) -> torch.Tensor:
    """values [T·K, D] a row a slot, output [E, H, D] -> [T, H]."""
    return moe_combine(multiply(values, output, plan.offset, order=plan.order), plan, gate)
