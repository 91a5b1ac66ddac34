# SPDX-License-Identifier: Apache-2.0
"""moe_dispatch: tokens in the order of their experts. Kernel: cpp/ops/moe_dispatch.cpp."""

from __future__ import annotations

import torch

from fastpost import _core
from fastpost.ops._register import USE_REFERENCE, expect_plain, may_skip_dispatcher, register
from fastpost.ops.moe_route import Plan
from fastpost.reference import moe_dispatch as reference


def moe_dispatch(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Rows of x in grouped order: row r is the token (or slot) that the plan puts there.

    Args:
        x: [T, H], a row a token, or [T, K, H], a row a slot; float32, bfloat16 or float16 (on CPU also
            float64), last dimension of stride 1.
        plan: of T tokens and K slots (moe_route, moe_plan).

    Returns:
        [T·K, H], differentiable in x; rows from plan.offset[-1] on are 0.

    Raises:
        ValueError: shapes that do not fit the plan, wrong dtype, layout or device.
    """
    if USE_REFERENCE:
        return reference.moe_dispatch(x, plan)
    expect_plain("moe_dispatch", x=x, offset=plan.offset, order=plan.order, place=plan.place)
    return (_forward if may_skip_dispatcher(x, *plan) else _forward_op)(x, *plan)


def _forward(x, offset, order, place):
    out = _forward_fake(x, offset, order, place)
    _core.moe_dispatch(x, offset, order, place, out)
    return out


def _forward_fake(x, _offset, order, _place):
    return x.new_empty(order.shape[0], x.shape[-1])


def _backward(grad, place, of_slots):
    grad_x = _backward_fake(grad, place, of_slots)
    _core.moe_dispatch_backward(grad, place, grad_x)
    return grad_x


def _backward_fake(grad, place, of_slots):
    return grad.new_empty((*place.shape, grad.shape[1]) if of_slots else (place.shape[0], grad.shape[1]))


def _setup_context(ctx, inputs, output):
    x, _, _, place = inputs
    ctx.of_slots = x.ndim == 3
    ctx.save_for_backward(place)


def _autograd(ctx, grad):
    (place,) = ctx.saved_tensors
    return _backward_op(grad.contiguous(), place, ctx.of_slots), None, None, None


_backward_op = register(
    "moe_dispatch_backward(Tensor grad, Tensor place, bool of_slots) -> Tensor", _backward, _backward_fake
)
_forward_op = register(
    "moe_dispatch(Tensor x, Tensor offset, Tensor order, Tensor place) -> Tensor",
    _forward, _forward_fake, _autograd, _setup_context,
)  # fmt: skip
