# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm: each expert's matrix on its own rows. Kernel: cpp/ops/grouped_gemm.cpp."""

from __future__ import annotations

import torch

from fastpost import _core
from fastpost.int4 import Int4Weight
from fastpost.ops import _expert_loop, _int4_experts
from fastpost.ops._grouped import summed_back, workspace
from fastpost.ops._register import USE_REFERENCE, expect_plain, may_skip_dispatcher, register
from fastpost.ops.int4_gemm import rows_of
from fastpost.reference import grouped_gemm as reference


def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor | Int4Weight,
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
        weight: [E, N, K] in the dtype of x, contiguous or the transpose of a contiguous [E, K, N]. Or
            four-bit weights of all experts in one container of E·N rows, expert e from row e·N on; they are frozen.
        offset: [E + 1] int32 (plan.offset).
        order: [R] int32, or None.
        top_k: see x.
        bias: [E, N], or None.
        activation: None, or "swiglu" | "geglu" | "geglu_tanh" | "reglu": act(first half of the columns) · second half.

    Returns:
        [R, N], or [R, N / 2] with an activation, in the dtype of x; rows from offset[-1] on are 0. Differentiable in x,
        weight (unless in four bits) and bias.

    Raises:
        ValueError: shapes that do not fit, dtypes that differ, a weight with neither layout, an unknown activation,
            four-bit rows that are no multiple of the experts, or that require gradients.
    """
    if USE_REFERENCE or x.dtype == torch.float64:
        return reference.grouped_gemm(x, weight, offset, order=order, top_k=top_k, bias=bias, activation=activation)
    if isinstance(weight, Int4Weight):
        return _int4_experts.grouped_gemm(x, weight, offset, order, top_k, bias, activation_code(activation))
    expect_plain("grouped_gemm", x=x, weight=weight, offset=offset, order=order, bias=bias)
    code, quiet = activation_code(activation), may_skip_dispatcher(x, weight, bias)
    keep = not quiet and code > 0 and torch.is_grad_enabled()
    return (_forward if quiet else _forward_op)(x, weight, offset, order, top_k, bias, code, keep)[0]


def activation_code(activation: str | None) -> int:
    """The number that the core knows an activation by."""
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(repr(a) for a in reference.ACTIVATIONS)
        raise ValueError(f"[grouped_gemm] activation: expected one of {known}, got {activation!r}.")
    return reference.ACTIVATIONS.index(activation)


def product(x, weight, offset, order=None, top_k=1, bias=None, code=0, pre=None):
    """[R, N] or, with an activation, [R, N / 2]. pre: [R, N] to fill, if it is to be kept."""
    rows, n = (x if order is None else order).shape[0], weight.shape[1]
    if _expert_loop.preferred(weight, rows):
        return _expert_loop.product(x, weight, offset, order, top_k, bias, code, pre)
    if code and pre is None and weight.stride(2) != 1:
        pre = x.new_empty(rows, n)  # the activation follows the product
    out = x.new_empty(rows, n // 2 if code else n)
    _core.grouped_gemm(x, order, top_k, weight, offset, bias, code, workspace(weight, rows), pre, out)
    return out


def weight_gradient(grad, x, offset, like, *, grad_order=None, grad_top_k=1, order=None, top_k=1, grad_bias=None):
    """[E, N, K] in the layout of `like`, the weight."""
    (e, n, k), rows = like.shape, (x if order is None else order).shape[0]
    if like.stride(2) != 1:  # a transposed view: the gradient of what lies in memory is the other outer product
        out = grad.new_empty(e, k, n)
        _core.grouped_gemm_weight_gradient(x, order, top_k, grad, grad_order, grad_top_k, offset, workspace(out, rows),
                                           out, None)  # fmt: skip
        if grad_bias is not None:
            _core.grouped_gemm_weight_gradient(grad, grad_order, grad_top_k, x[:, :0], order, top_k, offset,
                                               workspace(out, rows), grad.new_empty(e, n, 0), grad_bias)  # fmt: skip
        return out.mT
    out = grad.new_empty(e, n, k)
    if grad_bias is None and _expert_loop.preferred(like, rows):
        grad = _expert_loop.gathered(grad, grad_order, grad_top_k)
        _expert_loop.weight_gradient(grad, _expert_loop.gathered(x, order, top_k), offset, out)
        return out
    _core.grouped_gemm_weight_gradient(grad, grad_order, grad_top_k, x, order, top_k, offset, workspace(out, rows), out,
                                       grad_bias)  # fmt: skip
    return out


# ---- as an op of torch -----------------------------------------------------------------------------------------------


def _forward(x, weight, offset, order, top_k, bias, code, keep):
    x = rows_of(x)
    pre = x.new_empty((x if order is None else order).shape[0], weight.shape[1]) if keep else None
    out = product(x, weight, offset, order, top_k, bias, code, pre)
    return out, out.new_empty(0) if pre is None else pre


def _forward_fake(x, weight, offset, order, top_k, bias, code, keep):
    rows, n = (x if order is None else order).shape[0], weight.shape[1]
    return x.new_empty(rows, n // 2 if code else n), x.new_empty((rows, n) if keep else 0)


def _backward(grad, x, weight, offset, order, top_k, pre, code, bias, wanted):
    grad = rows_of(grad)
    if code:
        grad_pre = torch.empty_like(pre)
        _core.grouped_gemm_activate(pre, code, grad, None, grad_pre)
        grad = grad_pre
    x, none = rows_of(x), grad.new_empty(0)
    grad_bias = grad.new_empty(weight.shape[:2]) if bias else None
    grad_x = product(grad, weight.mT, offset) if wanted[0] else none
    if wanted[0] and order is not None:
        grad_x = summed_back(grad_x, order, top_k, x.shape[0])
    grad_weight = none
    if wanted[1] or bias:
        grad_weight = weight_gradient(grad, x, offset, weight, order=order, top_k=top_k, grad_bias=grad_bias)
    return grad_x, grad_weight, none if grad_bias is None else grad_bias


def _backward_fake(grad, x, weight, offset, order, top_k, pre, code, bias, wanted):
    none = grad.new_empty(0)
    grad_weight = weight.mT.new_empty(weight.mT.shape).mT if weight.stride(2) != 1 else weight.new_empty(weight.shape)
    return (x.new_empty(x.shape) if wanted[0] else none, grad_weight if wanted[1] or bias else none,
            weight.new_empty(weight.shape[:2]) if bias else none)  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, weight, offset, order, ctx.top_k, ctx.bias, ctx.code, _ = inputs
    ctx.bias = ctx.bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, offset, order, output[1])


def _autograd(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    x, weight, offset, order, pre = ctx.saved_tensors
    need = ctx.needs_input_grad
    grad_x, grad_weight, grad_bias = _backward_op(grad, x, weight, offset, order, ctx.top_k, pre, ctx.code,
                                                  ctx.bias and need[5], [need[0], need[1]])  # fmt: skip
    return (grad_x if need[0] else None, grad_weight if need[1] else None, None, None, None,
            grad_bias if need[5] else None, None, None)  # fmt: skip


_backward_op = register(
    "grouped_gemm_backward(Tensor grad, Tensor x, Tensor weight, Tensor offset, Tensor? order, int top_k, Tensor pre, "
    "int code, bool bias, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip
_forward_op = register(
    "grouped_gemm(Tensor x, Tensor weight, Tensor offset, Tensor? order, int top_k, Tensor? bias, int code, bool keep) "
    "-> (Tensor, Tensor)",
    _forward, _forward_fake, _autograd, _setup_context,
)  # fmt: skip
