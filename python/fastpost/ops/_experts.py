# SPDX-License-Identifier: Apache-2.0
"""A whole feed-forward mixture, as nn.MoE and the transformers side call it, made of the public ops."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from fastpost.ops.grouped_gemm import grouped_gemm
from fastpost.ops.moe_combine import moe_combine
from fastpost.ops.moe_route import Plan


def experts(
    x: torch.Tensor,
    plan: Plan,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    activation: str = "swiglu",
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """``out[t] = Σ_k gate[t, k] · W_down act(W_up x_t)`` with the matrices of the k-th expert of token t.

    x [T, H]; gate [T, K] float32; up [E, 2I, H], the half that goes through the activation first; down [E, H, I]; the
    biases [E, 2I] and [E, H]. recompute: the backward pass makes the hidden rows again instead of keeping them.
    """

    def mixture(x, gate, up, down, up_bias, down_bias):
        k = plan.place.shape[1]
        rows = grouped_gemm(x, up, plan.offset, order=plan.order, top_k=k, bias=up_bias, activation=activation)
        return moe_combine(grouped_gemm(rows, down, plan.offset, bias=down_bias), plan, gate)

    inputs = (x, gate, up, down, up_bias, down_bias)
    if recompute and torch.is_grad_enabled():
        return checkpoint(mixture, *inputs, use_reentrant=False, preserve_rng_state=False)
    return mixture(*inputs)
