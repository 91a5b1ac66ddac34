# SPDX-License-Identifier: Apache-2.0
"""kv_landmarks: one key that stands for a chunk. Kernel: cpp/ops/kv_landmarks.cpp."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastpost import _core
from fastpost.ops._register import USE_REFERENCE, expect_plain, refuse_grad, register
from fastpost.reference import kv_landmarks as reference


class KVLandmarks(NamedTuple):
    landmark: torch.Tensor  # [B, G, C, d] int8, or a float dtype when scale is None
    scale: torch.Tensor | None  # [B, G, C] float32
    similarity: torch.Tensor  # [B, G, C] float32: the least cosine between a member of the chunk and the mean


def kv_landmarks(
    keys: torch.Tensor, *, chunk: int = 8, length: torch.Tensor | None = None, bits: int | None = 8
) -> KVLandmarks:
    """The mean of each `chunk` consecutive keys, and how well it stands for them.

    Source: ShadowKV (arXiv 2410.21465): keys after RoPE; the chunks of least similarity are its outliers.

    Args:
        keys: [B, G, S, d], last dimension of stride 1; float32, bfloat16 or float16. The S mod chunk last are left out.
        chunk: tokens of a chunk.
        length: [B] int32: chunks that do not end below it get landmark 0, scale 0 and similarity 1. None: all S.
        bits: 8 for int8 rows with a scale each; None leaves the dtype of keys.

    Raises:
        ValueError: wrong dtype, shape, layout or device; an input that requires grad; on CPU also a length outside
            [0, S].
    """
    if USE_REFERENCE:
        return reference.kv_landmarks(keys, chunk=chunk, length=length, bits=bits)
    expect_plain("kv_landmarks", keys=keys, length=length)
    refuse_grad("kv_landmarks", keys=keys)
    if bits not in (8, None):
        raise ValueError(f"[kv_landmarks] bits: expected 8 or None, got {bits!r}.")
    landmark, scale, similarity = _op(keys, length, chunk, bits == 8)
    return KVLandmarks(landmark, scale if bits else None, similarity)


def _landmarks(keys, length, chunk, int8):
    landmark, scale, similarity = outputs = _fake(keys, length, chunk, int8)
    _core.kv_landmarks(keys, length, chunk, landmark, scale if int8 else None, similarity)
    return outputs


def _fake(keys, _length, chunk, int8):
    """landmark, scale (empty without int8), similarity."""
    if keys.ndim != 4 or chunk < 1:
        raise ValueError(
            f"[kv_landmarks] keys, chunk: expected [B, G, S, d] and at least 1, got {list(keys.shape)} and {chunk}."
        )
    b, g, s, d = keys.shape
    landmark = keys.new_empty(b, g, s // chunk, d, dtype=torch.int8 if int8 else keys.dtype)
    scale = keys.new_empty((b, g, s // chunk) if int8 else (0,), dtype=torch.float32)
    return landmark, scale, keys.new_empty(b, g, s // chunk, dtype=torch.float32)


_op = register(
    "kv_landmarks(Tensor keys, Tensor? length, int chunk, bool int8) -> (Tensor, Tensor, Tensor)", _landmarks, _fake
)
