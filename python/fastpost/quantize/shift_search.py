# SPDX-License-Identifier: Apache-2.0
"""The shift of each block that gives its NF4 codes most entropy, by counting where each weight changes its code.

A block is looked at in units of its largest distance from the median, so weights u lie in [-1, 1]. With the shift f the
scale is max(high - f, f - low), and the border between two codes, f + scale * middle, rises with f. So each weight
crosses each of the 15 borders once, at a point that has a closed form: one pass over 15 points a weight replaces 201
quantisations of it.
"""

from __future__ import annotations

import math

import torch

from fastpost.int4 import NF4

PIECE = {"cpu": 1 << 12, "cuda": 1 << 20}
"""Weights at a time: their counts, about 200 bytes a weight, stay in a core's cache, or fill a GPU."""


def best_shifts(blocks: torch.Tensor, points: int, reach: float) -> torch.Tensor:
    """median + f max|w - median| of each block of blocks [B, g], with the f of `points` (odd) equally spaced ones in
    [-reach, reach] whose codes have most entropy; of equal ones the smallest |f|. [B] in the dtype of blocks.

    Arithmetic is float32 (float64 for float64 blocks); a weight within rounding of a border may count on either side.
    """
    size = max(1, PIECE.get(blocks.device.type, 1 << 20) // max(blocks.shape[1], 1))
    parts = [_best(part, points, reach) for part in blocks.split(size)]
    return torch.cat(parts) if parts else blocks.new_empty(0)


def _best(blocks: torch.Tensor, points: int, reach: float) -> torch.Tensor:
    exact = blocks if blocks.dtype == torch.float64 else blocks.float()
    count, g = exact.shape
    median = exact.median(1).values
    unit = (exact - median[:, None]).abs().amax(1)
    u = (exact - median[:, None]) / torch.where(unit > 0, unit, 1.0)[:, None]
    low, high = u.amin(1)[:, None], u.amax(1)[:, None]
    step = 2 * reach / (points - 1)
    table = torch.tensor(NF4, dtype=exact.dtype)
    crossed = []
    for middle in ((table[1:] + table[:-1]) / 2).tolist():
        by_high, by_low = (u - high * middle) / (1 - middle), (u + low * middle) / (1 + middle)
        at = torch.minimum(by_high, by_low) if middle >= 0 else torch.maximum(by_high, by_low)
        crossed.append(((at + reach) / step - 1e-4).ceil_().clamp_(0, points))  # the first f at or after it
    # below[b, j, k]: weights of block b below border j at the k-th shift; the last column holds those never below.
    rows = torch.arange(count * 15, device=u.device).view(count, 15, 1) * (points + 1)
    index = torch.stack(crossed, 1).long() + rows
    below = torch.bincount(index.view(-1), minlength=count * 15 * (points + 1)).view(count, 15, points + 1)
    below = below[..., :points].float().cumsum(2)
    counts = torch.empty(count, 16, points, device=u.device)
    counts[:, 0], counts[:, 15] = below[:, 0], g - below[:, 14]
    torch.sub(below[:, 1:], below[:, :-1], out=counts[:, 1:15])
    # The entropy is a constant less the sum of c log c over the counts. Each term is made a whole number, so that sums
    # are exact and equal entropies equal.
    terms = counts.clamp(min=1).log_().mul_(counts).mul_(2**23 / max(g * math.log(g), 1.0)).round_()
    # Of equal ones the smallest |f|: a penalty smaller than any difference.
    distance = (torch.arange(points, device=u.device) - points // 2).abs()
    best = (terms.sum(1).long() * points + distance).argmin(1) - points // 2
    return (median + best.to(exact.dtype) * step * unit).to(blocks.dtype)
