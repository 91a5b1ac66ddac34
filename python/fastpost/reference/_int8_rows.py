# SPDX-License-Identifier: Apache-2.0
"""Rows in int8 with one float32 scale each: how factors, landmarks and values of a key-value cache are kept."""

from __future__ import annotations

import torch


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [..., n], scale float32 [...]): scale = max|row| / 127, row / scale rounded half to even; 0 for zeros."""
    scale = x.abs().amax(-1).to(torch.float32) / 127
    quotient = x / torch.where(scale > 0, scale, 1)[..., None].to(x.dtype)
    return quotient.round().clamp(-127, 127).to(torch.int8), scale


def widen_rows(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What the rows stand for, in `dtype`; scale None: x itself."""
    return x.to(dtype) if scale is None else x.to(dtype) * scale[..., None].to(dtype)
