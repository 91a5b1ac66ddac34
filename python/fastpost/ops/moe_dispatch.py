# SPDX-License-Identifier: Apache-2.0
"""moe_dispatch: tokens in the order of their experts. Kernel: cpp/ops/moe_dispatch.cpp."""

from __future__ import annotations

import torch

from fastpost.ops.moe_route import Plan
from fastpost.reference import moe_dispatch as reference


def moe_dispatch(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Rows of x in grouped order: row r is the token (or slot) that the plan puts there.

    Args:
        x: [T, H], a row a token, or [T, K, H], a row a slot; float32, bfloat16, float16 or float64.
        plan: of T tokens and K slots (moe_route, moe_plan).

    Returns:
        [T·K, H], differentiable in x; rows from plan.offset[-1] on are 0.

    Raises:
        ValueError: shapes that do not fit the plan, wrong dtype, layout or device.
    """
    return reference.moe_dispatch(x, plan)
