# SPDX-License-Identifier: Apache-2.0
"""GPTQ: rounding to a grid with the error of each column carried to those that come after it."""

from __future__ import annotations

import torch

from .compensation import BLOCK, by_column, check_hessian, inverse_factor, settle_dead
from .grid import Grid, Quantized, check_groups, check_matrix


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, group_size: int = 128, *, act_order: bool = False,
    damping: float = 0.01,
) -> Quantized:  # fmt: skip
    """GPTQ (Frantar et al. 2023, algorithm 1).

    A group's scale and zero are taken when its first column comes up, from weights that have been moved by then. With
    H = I nothing moves and the result is RTN's.

    Args:
        weight: [N, K].
        hessian: [K, K], 2 x xᵀ averaged over calibration rows (Moments.hessian).
        grid: bits, symmetric or not, dtype of the scales.
        group_size: columns that share a scale; -1: one scale a row, from the weights as they come.
        act_order: columns in falling order of H's diagonal, so that the ones that matter are rounded while many are
            left to make up for them. Groups are then of columns in that order (Int4Weight.order).
        damping: share of H's mean diagonal that is added to its diagonal.

    Raises:
        ValueError: NaN or infinity, a group size that does not divide K, a Hessian that is not [K, K] or singular.
    """
    weight = check_matrix("gptq", weight)
    check_hessian("gptq", weight, hessian)
    n, k = weight.shape
    group_size = check_groups("gptq", group_size, k)
    weight, hessian = settle_dead(weight, hessian)
    order = None
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        weight, hessian = weight[:, order], hessian[order][:, order]
    factor = inverse_factor(hessian, damping)
    scales, zeros = (weight.new_empty(k // group_size, n) for _ in range(2))
    codes = weight.new_empty(k, n)

    def round_column(j: int, moved: torch.Tensor) -> torch.Tensor:
        group, inside = divmod(j, group_size)
        if not inside:
            scales[group], zeros[group] = grid.parameters(moved[j : j + group_size].t())
        codes[j] = grid.codes(moved[j], scales[group], zeros[group])
        return (codes[j] - zeros[group]) * scales[group]

    # A block must not end inside a group: the group's parameters come from columns that are up to date.
    whole = BLOCK % group_size == 0 or group_size % BLOCK == 0 or group_size == k
    by_column(weight, factor, round_column, BLOCK if whole else group_size)
    return grid.finish(codes.t(), scales.t(), zeros.t(), group_size, order)
