# SPDX-License-Identifier: Apache-2.0
"""kv_landmarks: one key that stands for a chunk. Kernel: cpp/ops/kv_landmarks.cpp."""

from __future__ import annotations

from typing import NamedTuple

import torch

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
        ValueError: wrong dtype, shape, layout or device; an input that requires grad.
    """
    return reference.kv_landmarks(keys, chunk=chunk, length=length, bits=bits)
