# SPDX-License-Identifier: Apache-2.0
"""PB-LLM: most weights become signs, the salient few keep eight bits."""

from __future__ import annotations

import torch

from .binary import binarize
from .compensation import BLOCK, by_column, check_hessian, inverse_factor, settle_dead
from .grid import Grid, Quantized, check_matrix

HIGH_BITS = 8


def pb_llm(
    weight: torch.Tensor, hessian: torch.Tensor, *, binary_share: float = 0.9, damping: float = 0.01
) -> Quantized:
    """PB-LLM after training (Shang et al. 2023).

    In each block of 128 columns the weights with the smallest ``w² / U_jj²`` (U as in compensation.py: the loss that
    dropping the weight would cost) are binarised, with a mean and a scale for each row of the block; the others go to
    an eight-bit grid of their row. Every column's error is compensated as in GPTQ.

    Args:
        weight: [N, K].
        hessian: [K, K].
        binary_share: share of weights that is binarised, 0 to 1.
        damping: as in gptq.

    Raises:
        ValueError: NaN or infinity, a Hessian that does not fit, a share outside [0, 1].
    """
    weight = check_matrix("pb_llm", weight)
    check_hessian("pb_llm", weight, hessian)
    if not 0 <= binary_share <= 1:
        raise ValueError(f"[pb_llm] binary_share: expected a share between 0 and 1, got {binary_share!r}.")
    k = weight.shape[1]
    weight, hessian = settle_dead(weight, hessian)
    factor = inverse_factor(hessian, damping)
    high = Grid(HIGH_BITS)
    scales, zeros = high.parameters(weight)
    state: dict[str, torch.Tensor] = {}

    def round_column(j: int, moved: torch.Tensor) -> torch.Tensor:
        if j % BLOCK == 0:
            block = moved[j : j + BLOCK].t()
            state["mask"] = low_salience(block, factor.diagonal()[j : j + BLOCK], binary_share)
            signs = binarize(block, state["mask"])
            # The two values of a row are mean ± scale: any masked entry and its mirror give them back.
            count = state["mask"].sum(1).clamp(min=1)
            state["mean"] = (block * state["mask"]).sum(1) / count
            state["scale"] = ((signs - state["mean"][:, None]).abs() * state["mask"]).sum(1) / count
        column = moved[j]
        low = state["mean"] + torch.where(column >= state["mean"], state["scale"], -state["scale"])
        return torch.where(state["mask"][:, j % BLOCK], low, high.round(column, scales, zeros))

    out = by_column(weight, factor, round_column)
    code_bits = binary_share + (1 - binary_share) * HIGH_BITS
    # Besides the codes: a bit a weight for the mask, mean and scale of each row of a block, the grid of each row.
    bits = code_bits + 1 + 2 * 16 * -(-k // BLOCK) / k + (16 + HIGH_BITS) / k
    return Quantized(out, bits, code_bits)


def low_salience(block: torch.Tensor, diagonal: torch.Tensor, share: float) -> torch.Tensor:
    """Bool [N, b]: the `share` of the block's weights with the smallest w² / U_jj²."""
    salience = (block / diagonal).square().flatten()
    mask = torch.zeros_like(salience, dtype=torch.bool)
    mask[torch.argsort(salience, stable=True)[: round(share * len(salience))]] = True
    return mask.view(block.shape)
