# SPDX-License-Identifier: Apache-2.0
"""kv_factorize: keys as a product of two thin matrices. Kernel: cpp/ops/kv_factorize.cpp."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastpost.reference import kv_factorize as reference


class KVFactors(NamedTuple):
    """keys[b, s] ≈ (u[b, s] · scale[b, s]) @ basis[b]."""

    u: torch.Tensor  # [B, S, r] int8, or a float dtype when scale is None
    scale: torch.Tensor | None  # [B, S] float32
    basis: torch.Tensor  # [B, r, D] float32: singular values times right singular vectors
    directions: torch.Tensor  # [B, D, r] float32: u = keys @ directions, for keys that come later
    error: torch.Tensor  # [B] float32: |keys - u @ basis| / |keys| (Frobenius) of the truncation alone


def kv_factorize(
    keys: torch.Tensor, rank: int, *, length: torch.Tensor | None = None, bits: int | None = 8
) -> KVFactors:
    """The `rank` largest singular directions of each sequence's keys, all key heads together.

    By the Gram matrix KᵀK (sums in float32) and a subspace iteration on it; the error is at most 1.001 times that of
    the exact decomposition (tests/ops/test_kv_factorize.py). Source: ShadowKV (arXiv 2410.21465), which
    factorises the keys before RoPE.

    Args:
        keys: [B, S, D] with D = key heads · head dimension, before RoPE; float32, bfloat16 or float16, last dimension
            of stride 1.
        rank: r in 1 .. D.
        length: [B] int32: tokens from there on do not count (their u is 0). None: all S.
        bits: 8 quantises rows of u to int8, with a scale each; None leaves them in the dtype of keys.

    Raises:
        ValueError: wrong dtype, shape, layout or device; rank above D; an input that requires grad.
    """
    return reference.kv_factorize(keys, rank, length=length, bits=bits)


def kv_project(
    keys: torch.Tensor, directions: torch.Tensor, *, length: torch.Tensor | None = None, bits: int | None = 8
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(u, scale) of later keys [B, S', D] in a basis that is there already: ``u = keys @ directions``."""
    return reference.kv_project(keys, directions, length=length, bits=bits)
