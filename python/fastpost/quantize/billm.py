# SPDX-License-Identifier: Apache-2.0
"""BiLLM: about one bit a weight, with two for the few columns that matter and two sizes for the rest."""

from __future__ import annotations

import torch

from .binary import binarize, binarize_twice
from .compensation import BLOCK, by_block, check_hessian, inverse_factor, settle_dead
from .grid import Quantized, check_matrix

MOST_SALIENT = 50
"""Columns of a block that may be salient."""
SPLITS = tuple(0.1 + 0.05 * i for i in range(17))
"""Where small weights end and large ones begin, as shares of the block's largest: 0.10 to 0.90."""


def billm(weight: torch.Tensor, hessian: torch.Tensor, *, damping: float = 0.01) -> Quantized:
    """BiLLM (Huang et al. 2024).

    In each block of 128 columns: the columns with the largest ``Σ w² / U_jj²`` are binarised twice, the second time
    what the first leaves; how many, at most 50, is searched. The other weights are split by size, at the one of 17
    places with the smallest error, and both parts are binarised. Then the columns after the block make up for its
    error: the authors divide each column's error by U_jj alone, here it is the whole least squares answer
    (compensation.by_block).

    Args:
        weight: [N, K].
        hessian: [K, K].
        damping: as in gptq.

    Raises:
        ValueError: NaN or infinity, a Hessian that does not fit.
    """
    weight = check_matrix("billm", weight)
    check_hessian("billm", weight, hessian)
    n, k = weight.shape
    weight, hessian = settle_dead(weight, hessian)
    factor = inverse_factor(hessian, damping)
    salient = 0

    def round_block(lo: int, block: torch.Tensor) -> torch.Tensor:
        nonlocal salient
        columns = salient_columns(block, factor.diagonal()[lo : lo + block.shape[1]])
        salient += len(columns)
        return round_with(block, columns)

    out = by_block(weight, factor, round_block)
    code_bits = 1 + salient / k
    # Besides the codes: which of two sizes a weight is, a mark for each column, and for each row of a block mean and
    # scale of four binarisations.
    bits = code_bits + (1 - salient / k) + 1 / n + 4 * 2 * 16 * -(-k // BLOCK) / k
    return Quantized(out, bits, code_bits)


def salient_columns(block: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """Numbers of the salient columns of block [N, b]: of the first 1 to 50 by salience, the set that leaves the
    smallest squared error when it is binarised twice and the rest once."""
    ranked = torch.argsort((block / diagonal).square().sum(0), descending=True, stable=True)
    best, found = None, ranked[:0]
    for count in range(1, min(MOST_SALIENT, block.shape[1]) + 1):
        mask = torch.zeros(block.shape[1], dtype=torch.bool, device=block.device)
        mask[ranked[:count]] = True
        mask = mask.expand_as(block)
        error = float((block - binarize_twice(block, mask) - binarize(block, ~mask)).double().square().sum())
        if best is None or error < best:
            best, found = error, ranked[:count]
    return found


def round_with(block: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The block with these columns binarised twice, and the rest split where the error is smallest."""
    mask = torch.zeros(block.shape[1], dtype=torch.bool, device=block.device)
    mask[columns] = True
    mask = mask.expand_as(block)
    out, rest, size = binarize_twice(block, mask), ~mask, block.abs()
    best, found = None, binarize(block, rest)
    largest = (size * rest).max()
    for share in SPLITS:
        small = rest & (size <= share * largest)
        parts = binarize(block, small) + binarize(block, rest & ~small)
        error = float(((block - parts) * rest).double().square().sum())
        if best is None or error < best:
            best, found = error, parts
    return out + found
