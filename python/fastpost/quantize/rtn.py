# SPDX-License-Identifier: Apache-2.0
"""RTN: each weight to the nearest point of its group's grid. The yardstick of every other method."""

from __future__ import annotations

import torch

from .grid import Grid, Quantized, check_groups, check_matrix


def rtn(weight: torch.Tensor, grid: Grid, group_size: int = 128) -> Quantized:
    """Round to nearest.

    Args:
        weight: [N, K], any float dtype.
        grid: bits, symmetric or not, dtype of the scales.
        group_size: columns that share a scale; -1: one scale a row.

    Raises:
        ValueError: NaN or infinity, a group size that does not divide K.
    """
    weight = check_matrix("rtn", weight)
    group_size = check_groups("rtn", group_size, weight.shape[1])
    groups = weight.unflatten(1, (-1, group_size))
    scales, zeros = grid.parameters(groups)
    codes = grid.codes(groups, scales[..., None], zeros[..., None]).flatten(1)
    return grid.finish(codes, scales, zeros, group_size)
