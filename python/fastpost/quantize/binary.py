# SPDX-License-Identifier: Apache-2.0
"""Binarisation with a mask, the piece that PB-LLM and BiLLM are built of."""

from __future__ import annotations

import torch


def binarize(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``mean + mean|x - mean| · sign(x - mean)`` of the masked entries of each row; 0 elsewhere.

    values [N, b], mask bool [N, b]. For given signs, mean and scale are close to the least squares ones; a row with
    nothing masked stays 0."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    mean = (values * mask).sum(1, keepdim=True) / count
    centred = (values - mean) * mask
    scale = centred.abs().sum(1, keepdim=True) / count
    return torch.where(mask, mean + torch.where(centred >= 0, scale, -scale), 0.0)


def binarize_twice(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A binarisation, and another of what it leaves."""
    first = binarize(values, mask)
    return first + binarize(values - first, mask)
