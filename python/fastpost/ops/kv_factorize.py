# SPDX-License-Identifier: Apache-2.0
"""kv_factorize: keys as a product of two thin matrices. Kernel: cpp/ops/kv_factorize.cpp."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastpost import _core
from fastpost.ops import _subspace
from fastpost.ops._register import USE_REFERENCE, expect_plain, refuse_grad, register
from fastpost.reference import kv_factorize as reference


class KVFactors(NamedTuple):
    """keys[b, s] ≈ (u[b, s] · scale[b, s]) @ basis[b]."""

    u: torch.Tensor  # [B, S, r] int8, or a float dtype when scale is None
    scale: torch.Tensor | None  # [B, S] float32
    basis: torch.Tensor  # [B, r, D] float32: singular values times right singular vectors (GPU: as good a basis)
    directions: torch.Tensor  # [B, D, r] float32: u = keys @ directions, for keys that come later
    error: torch.Tensor  # [B] float32: |keys - u @ basis| / |keys| (Frobenius) of the truncation alone


def kv_factorize(
    keys: torch.Tensor, rank: int, *, length: torch.Tensor | None = None, bits: int | None = 8
) -> KVFactors:
    """The `rank` largest singular directions of each sequence's keys, all key heads together.

    By the Gram matrix KᵀK (sums in float32) and a subspace iteration on it; nothing waits for a GPU, unless the rank is
    most of D. Where the exact decomposition's error is above 2e-3, this one's is at most 1.001 times that; below, sums
    in float32 no longer tell small directions from rounding, and it stays below 2e-3, known to 1e-3
    (tests/ops/test_kv_factorize.py). Source: ShadowKV (arXiv 2410.21465), which factorises the keys before RoPE.

    Args:
        keys: [B, S, D] with D = key heads · head dimension, before RoPE; float32, bfloat16 or float16, last dimension
            of stride 1.
        rank: r in 1 .. D.
        length: [B] int32: tokens from there on do not count (their u is 0). None: all S.
        bits: 8 quantises rows of u to int8, with a scale each; None leaves them in the dtype of keys.

    Singular values below 1e-3 of the largest count as that in basis and directions, whose product stays the same.

    Raises:
        ValueError: wrong dtype, shape, layout or device; rank above D; an input that requires grad; on CPU also a
            length outside [0, S], and keys whose squares are not finite.
    """
    if USE_REFERENCE:
        return reference.kv_factorize(keys, rank, length=length, bits=bits)
    expect_plain("kv_factorize", keys=keys, length=length)
    refuse_grad("kv_factorize", keys=keys)
    u, scale, basis, directions, error = _factorize_op(keys, length, rank, _int8("kv_factorize", bits))
    return KVFactors(u, scale if bits else None, basis, directions, error)


def kv_project(
    keys: torch.Tensor, directions: torch.Tensor, *, length: torch.Tensor | None = None, bits: int | None = 8
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(u, scale) of later keys [B, S', D] in a basis that is there already: ``u = keys @ directions``.

    Products in bfloat16 with bfloat16 keys, where the CPU (GPU) has them, else in float32; sums in float32.
    """
    if USE_REFERENCE:
        return reference.kv_project(keys, directions, length=length, bits=bits)
    expect_plain("kv_project", keys=keys, directions=directions, length=length)
    refuse_grad("kv_project", keys=keys, directions=directions)
    u, scale = _project_op(keys, length, directions, _int8("kv_project", bits))
    return u, scale if bits else None


def _int8(op, bits):
    if bits not in (8, None):
        raise ValueError(f"[{op}] bits: expected 8 or None, got {bits!r}.")
    return bits == 8


def _factorize(keys, length, rank, int8):
    if keys.ndim == 3 and not 1 <= rank <= keys.shape[2]:
        raise ValueError(
            f"[kv_factorize] rank: expected 1 to {keys.shape[2]} (key heads · head dimension), got {rank}."
        )
    u, scale, basis, directions, error = outputs = _factorize_fake(keys, length, rank, int8)
    gram = keys.new_empty(keys.shape[0], keys.shape[2], keys.shape[2], dtype=torch.float32)
    workspace = _workspace(keys, rank)
    _core.kv_factorize_gram(keys, length, workspace, gram)
    if not keys.is_cuda:
        _expect_finite(gram.diagonal(dim1=1, dim2=2).sum(1).tolist())
    values, vectors, left = _subspace.leading(gram, rank)
    torch.sqrt(left, out=error)
    singular = reference.resolved(values.sqrt())
    torch.mul(vectors.mT, singular[:, :, None], out=basis)
    torch.div(vectors, singular[:, None], out=directions)
    _core.kv_factorize_project(keys, length, directions, workspace, u, scale if int8 else None)
    return outputs


def _expect_finite(energies):
    for i, energy in enumerate(energies):
        if not math.isfinite(energy):
            raise ValueError(
                f"[kv_factorize] keys: expected numbers whose squares sum to a finite one, got a sum of {energy} in "
                f"sequence {i}."
            )


def _factorize_fake(keys, length, rank, int8):
    """u, scale (empty without int8), basis, directions, error."""
    if keys.ndim != 3:
        raise ValueError(f"[kv_factorize] keys: expected [B, S, D], got shape {list(keys.shape)}.")
    b, _, d = keys.shape

    def new(*shape):
        return keys.new_empty(shape, dtype=torch.float32)

    return *_u_fake(keys, rank, int8), new(b, rank, d), new(b, d, rank), new(b)


def _u_fake(keys, rank, int8):
    b, s, _ = keys.shape
    u = keys.new_empty(b, s, rank, dtype=torch.int8 if int8 else keys.dtype)
    return u, keys.new_empty((b, s) if int8 else (0,), dtype=torch.float32)


def _project(keys, length, directions, int8):
    u, scale = outputs = _project_fake(keys, length, directions, int8)
    workspace = _workspace(keys, directions.shape[2])
    _core.kv_factorize_project(keys, length, directions, workspace, u, scale if int8 else None)
    return outputs


def _project_fake(keys, _length, directions, int8):
    if keys.ndim != 3 or directions.ndim != 3:
        raise ValueError(
            "[kv_project] keys, directions: expected [B, S, D] and [B, D, r], got shapes "
            f"{list(keys.shape)} and {list(directions.shape)}."
        )
    return _u_fake(keys, directions.shape[2], int8)


def _workspace(keys, rank):
    bytes = _core.kv_factorize_bytes(keys, rank, torch.get_num_threads())
    return keys.new_empty(bytes, dtype=torch.uint8)


_factorize_op = register(
    "kv_factorize(Tensor keys, Tensor? length, int rank, bool int8) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _factorize, _factorize_fake,
)  # fmt: skip
_project_op = register(
    "kv_project(Tensor keys, Tensor? length, Tensor directions, bool int8) -> (Tensor, Tensor)", _project, _project_fake
)
