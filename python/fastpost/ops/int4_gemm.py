# SPDX-License-Identifier: Apache-2.0
"""int4_gemm: a product with four-bit weights, forward and input gradient from the same bytes.

Kernels: cpp/ops/int4_gemm.cpp. What has none on a GPU (thousands of rows, NF4 with many rows, float32, gradients) goes
through slabs: a slice of W is made in x's dtype and multiplied by the framework's GEMM; W as a whole never exists.
"""

from __future__ import annotations

import math

import torch

from fastpost import _core
from fastpost.int4 import Int4Weight
from fastpost.ops._register import USE_REFERENCE, expect_plain, may_skip_dispatcher, register
from fastpost.reference import int4_gemm as reference


def int4_gemm(
    x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None, *, activation_bits: int | None = None
) -> torch.Tensor:
    """``x · Wᵀ + bias`` for four-bit W, with float32 sums: what `torch.nn.functional.linear` gives for
    ``weight.dequantize(x.dtype)``, without ever making it.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        weight: Int4Weight [N, K].
        bias: [N] in the dtype of x, or None.
        activation_bits: None (exact), or 8: rows of x may become int8 with a scale for every 32 columns, where that is
            faster; it adds an error of about 0.6 % of the row's norm (W4A8; CPU only, forward only).

    Returns:
        [..., N] in the dtype of x, differentiable in x and bias.

    Raises:
        ValueError: x is not [..., K], bias is not [N], dtypes or devices differ, activation_bits is something else.
    """
    if not isinstance(weight, Int4Weight):
        raise ValueError(
            f"[int4_gemm] weight: expected an Int4Weight, got {type(weight).__name__}. Make one with "
            "fastpost.int4_quantize(weight)."
        )
    if activation_bits not in (None, 8):
        raise ValueError(f"[int4_gemm] activation_bits: expected None or 8, got {activation_bits!r}.")
    expect_plain("int4_gemm", x=x, codes=weight.codes, bias=bias)
    if x.ndim < 1 or x.shape[-1] != weight.columns:
        raise ValueError(f"[int4_gemm] x: expected [..., {weight.columns}], got {list(x.shape)}.")
    if USE_REFERENCE:
        return reference.int4_gemm(x, weight, bias, activation_bits=activation_bits)
    rows = x.reshape(-1, weight.columns)
    if weight.order is not None:
        rows = rows.index_select(1, weight.order)
    call = _forward if may_skip_dispatcher(rows, weight.codes, bias) else _forward_op
    out = call(rows, weight.codes, weight.float_scales(), weight.zeros, weight.table, weight.group_size, bias,
               activation_bits or 0)  # fmt: skip
    return out.view(*x.shape[:-1], out.shape[1])


def int4_dequantize(weight: Int4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """W [N, K] in a float dtype, its columns in their own order. See :meth:`fastpost.int4.Int4Weight.dequantize`."""
    if USE_REFERENCE:
        return reference.dequantize(weight).to(dtype)
    stored = _dequantize_op(weight.codes, weight.float_scales(), weight.zeros, weight.table, weight.group_size,
                            weight.columns, dtype)  # fmt: skip
    return stored if weight.order is None else torch.empty_like(stored).index_copy_(1, weight.order, stored)


# ---- forward and backward --------------------------------------------------------------------------------------------

# A slab of W: large enough that its product fills the GPU. 8192 x 8192, 1024 rows, H200: 334 µs with slabs of 16 MB,
# which stay in L2, 282 with 32 MB, 268 with 64 MB or all of W (bfloat16 alone: 177).
SLAB_BYTES = 64 << 20


def _forward(x, codes, scales, zeros, table, group_size, bias, activation_bits):
    x = rows_of(x)
    out = x.new_empty(x.shape[0], codes.shape[0])
    if x.is_cuda and not _core.int4_gemm_fits(x, codes, scales, table, False):
        return _forward_slabs(x, codes, scales, zeros, table, group_size, bias, out)
    bytes = _core.int4_gemm_bytes(x, codes, x.shape[1], False, activation_bits, torch.get_num_threads())
    workspace = torch.empty(bytes, dtype=torch.uint8, device=x.device)
    _core.int4_gemm(x, codes, scales, zeros, table, group_size, bias, activation_bits, workspace, out)
    return out


def _forward_slabs(x, codes, scales, zeros, table, group_size, bias, out):
    n, k = codes.shape[0], x.shape[1]
    step = max(256, SLAB_BYTES // (k * x.element_size()) // 256 * 256)
    slab = x.new_empty(min(step, n), k)
    for begin in range(0, n, step):
        rows = slice(begin, min(begin + step, n))
        part = slab[: rows.stop - rows.start]
        _core.int4_gemm_dequantize(codes[rows], scales[rows], None if zeros is None else zeros[rows], table, group_size,
                                   part)  # fmt: skip
        if bias is None:
            torch.mm(x, part.t(), out=out[:, rows])
        else:
            torch.addmm(bias[rows], x, part.t(), out=out[:, rows])
    return out


def _forward_fake(x, codes, scales, zeros, table, group_size, bias, activation_bits):
    return x.new_empty(x.shape[0], codes.shape[0])


def _backward(grad, codes, scales, zeros, table, group_size, columns):
    grad = rows_of(grad)
    grad_x = grad.new_empty(grad.shape[0], columns)
    # cuda/ops/int4_gemm_sm90.cu has a kernel that needs no slabs. In its run on an H200 it hung, most likely because
    # warp groups asked for more registers than a block has. They no longer do; until it has run, nothing depends on it.
    if grad.is_cuda:
        return _backward_slabs(grad, codes, scales, zeros, table, group_size, grad_x)
    bytes = _core.int4_gemm_bytes(grad, codes, columns, True, 0, torch.get_num_threads())
    workspace = torch.empty(bytes, dtype=torch.uint8, device=grad.device)
    _core.int4_gemm_backward(grad, codes, scales, zeros, table, group_size, workspace, grad_x)
    return grad_x


def _backward_slabs(grad, codes, scales, zeros, table, group_size, grad_x):
    """Slabs of columns, so that each column's sum over N is one GEMM and rounded once."""
    n, k = codes.shape[0], grad_x.shape[1]
    unit = math.lcm(256, group_size) if group_size < k else 256  # a view begins at a whole block and a whole group
    step = max(unit, SLAB_BYTES // (n * grad.element_size()) // unit * unit)
    slab = grad.new_empty(n * min(step, k))
    for begin in range(0, k, step):
        end = min(begin + step, k)
        part = slab[: n * (end - begin)].view(n, end - begin)
        first, width = begin // 2, -(-(end - begin) // 128) * 64
        groups = slice(begin // group_size, -(-end // group_size))
        _core.int4_gemm_dequantize(codes[:, first : first + width], scales[:, groups],
                                   None if zeros is None else zeros[:, groups], table, group_size, part)  # fmt: skip
        torch.mm(grad, part, out=grad_x[:, begin:end])
    return grad_x


def _backward_fake(grad, codes, scales, zeros, table, group_size, columns):
    return grad.new_empty(grad.shape[0], columns)


def _dequantize(codes, scales, zeros, table, group_size, columns, dtype):
    out = torch.empty(codes.shape[0], columns, dtype=dtype, device=codes.device)
    _core.int4_gemm_dequantize(codes, scales, zeros, table, group_size, out)
    return out


def _dequantize_fake(codes, scales, zeros, table, group_size, columns, dtype):
    return torch.empty(codes.shape[0], columns, dtype=dtype, device=codes.device)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Gradients arrive expanded from sums; kernels want rows in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _setup_context(ctx, inputs, output):
    x, codes, scales, zeros, table, ctx.group_size, _bias, ctx.activation_bits = inputs
    ctx.columns = x.shape[1]
    ctx.save_for_backward(codes, scales, zeros, table)


def _autograd(ctx, grad):
    if ctx.activation_bits:
        raise ValueError("[int4_gemm] activation_bits=8 has no gradient. Leave it out for training.")
    codes, scales, zeros, table = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _backward_op(grad, codes, scales, zeros, table, ctx.group_size, ctx.columns)
    if ctx.needs_input_grad[6]:
        grad_bias = grad.sum(0, dtype=torch.float32).to(grad.dtype)
    return grad_x, None, None, None, None, None, grad_bias, None


_backward_op = register(
    "int4_gemm_backward(Tensor grad, Tensor codes, Tensor scales, Tensor? zeros, Tensor? table, int group_size, "
    "SymInt columns) -> Tensor",
    _backward, _backward_fake,
)  # fmt: skip
_forward_op = register(
    "int4_gemm(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? table, int group_size, Tensor? bias, "
    "int activation_bits) -> Tensor",
    _forward, _forward_fake, _autograd, _setup_context,
)  # fmt: skip
_dequantize_op = register(
    "int4_gemm_dequantize(Tensor codes, Tensor scales, Tensor? zeros, Tensor? table, int group_size, SymInt columns, "
    "ScalarType dtype) -> Tensor",
    _dequantize, _dequantize_fake,
)  # fmt: skip
