# SPDX-License-Identifier: Apache-2.0
"""moe_combine: what experts made, back at the tokens. Kernel: cpp/ops/moe_combine.cpp."""

from __future__ import annotations

import torch

from fastpost import _core
from fastpost.ops._register import USE_REFERENCE, expect_plain, may_skip_dispatcher, register
from fastpost.ops.moe_route import Plan
from fastpost.reference import moe_combine as reference


def moe_combine(y: torch.Tensor, plan: Plan, gate: torch.Tensor | None = None, *, reduce: bool = True) -> torch.Tensor:
    """``out[t] = Σ_k gate[t, k] · y[row of slot (t, k)]``, summed in float32 in the order of k.

    Args:
        y: [T·K, H] in grouped order; float32, bfloat16 or float16 (on CPU also float64), last dimension of stride 1.
        plan: of T tokens and K slots.
        gate: [T, K] float32 (float64 for float64 y), or None = 1.
        reduce: False leaves out the sum.

    Returns:
        [T, H], or [T, K, H] with reduce=False, in the dtype of y; differentiable in y and gate (whose gradient is the
        exact dot product).

    Raises:
        ValueError: shapes that do not fit the plan, wrong dtype, layout or device.
    """
    if USE_REFERENCE:
        return reference.moe_combine(y, plan, gate, reduce=reduce)
    expect_plain("moe_combine", y=y, offset=plan.offset, order=plan.order, place=plan.place, gate=gate)
    return (_forward if may_skip_dispatcher(y, *plan, gate) else _forward_op)(y, *plan, gate, reduce)


def _forward(y, offset, order, place, gate, reduce):
    out = _forward_fake(y, offset, order, place, gate, reduce)
    _core.moe_combine(y, place, gate, out)
    return out


def _forward_fake(y, _offset, _order, place, _gate, reduce):
    return y.new_empty((place.shape[0], y.shape[-1]) if reduce else (*place.shape, y.shape[-1]))


def _backward(grad, y, offset, order, place, gate, of_y, of_gate):
    grad_y, grad_gate = _backward_fake(grad, y, offset, order, place, gate, of_y, of_gate)
    _core.moe_combine_backward(grad, y, place, offset, order, gate, grad_y if of_y else None,
                               grad_gate if of_gate else None)  # fmt: skip
    return grad_y, grad_gate


def _backward_fake(grad, _y, _offset, order, place, gate, of_y, of_gate):
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return (grad.new_empty(order.shape[0] if of_y else 0, grad.shape[-1]),
            grad.new_empty(place.shape if of_gate else (0,), dtype=wide))  # fmt: skip


def _setup_context(ctx, inputs, output):
    y, offset, order, place, gate, _ = inputs
    # y is needed for the gradient of the gate alone; without one it can go.
    of_gate = ctx.needs_input_grad[4]
    ctx.save_for_backward(y if of_gate else None, offset, order, place, gate)


def _autograd(ctx, grad):
    y, offset, order, place, gate = ctx.saved_tensors
    of_y, of_gate = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    grad_y, grad_gate = _backward_op(grad.contiguous(), y, offset, order, place, gate, of_y, of_gate)
    return grad_y if of_y else None, None, None, None, grad_gate if of_gate else None, None


_backward_op = register(
    "moe_combine_backward(Tensor grad, Tensor? y, Tensor offset, Tensor order, Tensor place, Tensor? gate, bool of_y, "
    "bool of_gate) -> (Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip
_forward_op = register(
    "moe_combine(Tensor y, Tensor offset, Tensor order, Tensor place, Tensor? gate, bool reduce) -> Tensor",
    _forward, _forward_fake, _autograd, _setup_context,
)  # fmt: skip
