# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm: each expert's matrix on its own rows. Kernel: cpp/ops/grouped_gemm.cpp."""

from __future__ import annotations

import torch

from fastpost.reference import grouped_gemm as reference


def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    *,
    order: torch.Tensor | None = None,
    top_k: int = 1,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """``out[r] = act(x_r · W_eᵀ + b_e)`` for the expert e that has row r, offset[e] <= r < offset[e + 1].

    Args:
        x: [R, K] in grouped order; or, with `order`, rows anywhere: row r is then x[order[r] // top_k], gathered on the
            way into the product (plan.order with top_k for tokens, with 1 for slots). float32, bfloat16 or float16.
        weight: [E, N, K] in the dtype of x, contiguous or the transpose of a contiguous [E, K, N].
        offset: [E + 1] int32 (plan.offset).
        order: [R] int32, or None.
        top_k: see x.
        bias: [E, N], or None.
        activation: None, or "swiglu" | "geglu" | "geglu_tanh" | "reglu": act(first half of the columns) · second half.

    Returns:
        [R, N], or [R, N / 2] with an activation, in the dtype of x; rows from offset[-1] on are 0. Differentiable in x,
        weight and bias.

    Raises:
        ValueError: shapes that do not fit, dtypes that differ, a weight with neither layout, an unknown activation.
    """
    return reference.grouped_gemm(x, weight, offset, order=order, top_k=top_k, bias=bias, activation=activation)
