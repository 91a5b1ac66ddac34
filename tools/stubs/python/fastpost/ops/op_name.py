# SPDX-License-Identifier: Apache-2.0
"""op_name: FILL IN what it is, in a line. Kernel: cpp/ops/op_name.cpp."""

from __future__ import annotations

import torch

from fastpost import _core
from fastpost.ops._register import USE_REFERENCE, contiguous_float, expect_plain, register
from fastpost.reference import op_name as reference


def op_name(x: torch.Tensor) -> torch.Tensor:
    """FILL IN: ``out_i = Σ_j x_ij``.

    Args:
        x: [N, D] float32; last dimension of stride 1.

    Returns:
        [N] float32, differentiable in `x`.

    Raises:
        ValueError: wrong dtype, shape, device or layout.
    """
    if USE_REFERENCE:
        return reference.op_name(x)
    expect_plain("op_name", x=x)
    return _forward_op(x)


def _forward(x):
    out = _forward_fake(x)
    _core.op_name(x, out)
    return out


def _forward_fake(x):
    return torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def _backward(grad_out, d):
    grad_x = _backward_fake(grad_out, d)
    _core.op_name_backward(grad_out, grad_x)
    return grad_x


def _backward_fake(grad_out, d):
    return torch.empty(grad_out.shape[0], d, dtype=torch.float32, device=grad_out.device)


def _setup_context(ctx, inputs, output):
    ctx.d = inputs[0].shape[1]


def _autograd(ctx, grad_out):
    return _backward_op(contiguous_float(grad_out), ctx.d)


_backward_op = register("op_name_backward(Tensor grad_out, SymInt d) -> Tensor", _backward, _backward_fake)
_forward_op = register("op_name(Tensor x) -> Tensor", _forward, _forward_fake, _autograd, _setup_context)
