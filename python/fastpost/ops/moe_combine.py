# SPDX-License-Identifier: Apache-2.0
"""moe_combine: what experts made, back at the tokens. Kernel: cpp/ops/moe_combine.cpp."""

from __future__ import annotations

import torch

from fastpost.ops.moe_route import Plan
from fastpost.reference import moe_combine as reference


def moe_combine(y: torch.Tensor, plan: Plan, gate: torch.Tensor | None = None, *, reduce: bool = True) -> torch.Tensor:
    """``out[t] = Σ_k gate[t, k] · y[row of slot (t, k)]``, summed in float32 in the order of k.

    Args:
        y: [T·K, H] in grouped order; float32, bfloat16, float16 or float64.
        plan: of T tokens and K slots.
        gate: [T, K] float32 (float64 for float64 y), or None = 1.
        reduce: False leaves out the sum.

    Returns:
        [T, H], or [T, K, H] with reduce=False, in the dtype of y; differentiable in y and gate (whose gradient is the
        exact dot product).

    Raises:
        ValueError: shapes that do not fit the plan, wrong dtype, layout or device.
    """
    return reference.moe_combine(y, plan, gate, reduce=reduce)
