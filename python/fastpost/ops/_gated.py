# SPDX-License-Identifier: Apache-2.0
"""The gate between two grouped products, on its own: for what comes between a product and its activation (LoRA)."""

from __future__ import annotations

import torch

from fastpost import _core
from fastpost.ops._register import USE_REFERENCE, expect_plain, may_skip_dispatcher, register
from fastpost.ops.grouped_gemm import activation_code
from fastpost.ops.int4_gemm import rows_of
from fastpost.reference import grouped_gemm as reference


def gated(pre: torch.Tensor, activation: str) -> torch.Tensor:
    """[R, 2I] -> [R, I]: act(first half of the columns) · second half, as grouped_gemm has it, in float32 and rounded
    once. Differentiable in pre, which is what it keeps. Raises ValueError for an activation that is not gated."""
    code = activation_code(activation)
    if not code:
        raise ValueError("[grouped_gemm] activation: expected a gated one, got None.")
    if USE_REFERENCE or pre.dtype == torch.float64:
        return reference.activate(pre, activation)
    expect_plain("grouped_gemm", pre=pre)
    return (_forward if may_skip_dispatcher(pre) else _forward_op)(pre, code)


def _forward(pre, code):
    out = _forward_fake(pre, code)
    _core.grouped_gemm_activate(rows_of(pre), code, None, out, None)
    return out


def _forward_fake(pre, code):
    return pre.new_empty(pre.shape[0], pre.shape[1] // 2)


def _backward(grad, pre, code):
    grad_pre = pre.new_empty(pre.shape)
    _core.grouped_gemm_activate(rows_of(pre), code, rows_of(grad), None, grad_pre)
    return grad_pre


def _backward_fake(grad, pre, code):
    return pre.new_empty(pre.shape)


def _setup_context(ctx, inputs, output):
    pre, ctx.code = inputs
    ctx.save_for_backward(pre)


def _autograd(ctx, grad):
    return _backward_op(grad, *ctx.saved_tensors, ctx.code), None


_backward_op = register(
    "grouped_gemm_activate_backward(Tensor grad, Tensor pre, int code) -> Tensor", _backward, _backward_fake
)
_forward_op = register(
    "grouped_gemm_activate(Tensor pre, int code) -> Tensor", _forward, _forward_fake, _autograd, _setup_context
)
