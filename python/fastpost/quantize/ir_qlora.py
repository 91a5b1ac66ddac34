# SPDX-License-Identifier: Apache-2.0
"""IR-QLoRA's NF4: each block is shifted so that its sixteen codes carry the most information."""

from __future__ import annotations

from statistics import NormalDist

import torch

from fastpost.int4 import NF4

from . import shift_search
from .grid import Quantized, check_groups, check_matrix

SIGMA = 1 / NormalDist().inv_cdf(0.9677083)
"""Standard deviation of a normal distribution whose NF4 range ends at 1."""
POINTS = 201
"""Shifts tried: the median plus -0.1 σ to +0.1 σ of the largest weight."""
OUTER = 256
"""Shifts that share a float32 scale when they are stored."""


def ir_qlora(weight: torch.Tensor, group_size: int = 64, *, store_shifts: bool = True) -> Quantized:
    """Information calibration of IR-QLoRA (Qin et al. 2024): ``w = scale * NF4[code] + shift``.

    shift = median + f max|w - median| with the f, of 201 between -0.1 σ and 0.1 σ, whose codes have most entropy; of
    equal ones the smallest |f|. f = 0, the plain median, is among them. The authors' reach is max|w|, which is the same
    where a block has no offset; measured from the median, an offset changes nothing. The method's other half, LoRA with
    averaged inputs, is in hf/int4_lora.py.

    Args:
        weight: [N, K].
        group_size: block size; -1: one block a row.
        store_shifts: round the shifts to eight-bit floats (e4m3) with a float32 scale for every 256 of them, as they
            are to be stored; False keeps them exact.

    Raises:
        ValueError: NaN or infinity, a group size that does not divide K.
    """
    weight = check_matrix("ir_qlora", weight)
    n, k = weight.shape
    group_size = check_groups("ir_qlora", group_size, k)
    blocks = weight.reshape(-1, group_size)
    shifts = best_shifts(blocks)
    if store_shifts:
        shifts = _eight_bits(shifts)
    codes, scales = shifted_codes(blocks, shifts)
    table = torch.tensor(NF4, dtype=weight.dtype, device=weight.device)
    out = table[codes.long()] * scales[:, None] + shifts[:, None]
    bits = 4 + (32 + ((8 + 32 / OUTER) if store_shifts else 32)) / group_size
    return Quantized(out.view(n, k), bits, 4)


def shifted_codes(blocks: torch.Tensor, shifts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NF4 codes [B, g] uint8 and scales [B] of blocks [B, g] less their shifts [B]."""
    table = torch.tensor(NF4, dtype=blocks.dtype, device=blocks.device)
    left = blocks - shifts[:, None]
    scales = left.abs().amax(1)
    units = left / torch.where(scales > 0, scales, 1.0)[:, None]
    return torch.bucketize(units, (table[1:] + table[:-1]) / 2).to(torch.uint8), scales


def entropy(codes: torch.Tensor) -> torch.Tensor:
    """Bits of information [B] in the codes of each block [B, g]: -Σ p log₂ p over the shares p of the 16 codes."""
    counts = torch.zeros(len(codes), 16, dtype=torch.float64, device=codes.device)
    counts.scatter_add_(1, codes.long(), counts.new_ones(()).expand(codes.shape))
    share = counts / codes.shape[1]
    return -torch.special.xlogy(share, share).sum(1) / torch.log(share.new_tensor(2.0))


def best_shifts(blocks: torch.Tensor, points: int = POINTS) -> torch.Tensor:
    """The shift [B] of each block [B, g]. `points` is odd, so that 0 is one of the factors."""
    return shift_search.best_shifts(blocks, points, 0.1 * SIGMA)


def _eight_bits(shifts: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(shifts, (0, -len(shifts) % OUTER)).view(-1, OUTER)
    scale = padded.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    scale = torch.where(scale > 0, scale, 1.0)
    return ((padded / scale).to(torch.float8_e4m3fn).to(shifts.dtype) * scale).view(-1)[: len(shifts)]
