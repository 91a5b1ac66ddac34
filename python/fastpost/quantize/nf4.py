# SPDX-License-Identifier: Apache-2.0
"""NF4: the sixteen quantiles of a normal distribution, scaled to each block's largest weight (QLoRA)."""

from __future__ import annotations

import torch

from fastpost.int4 import int4_quantize

from .grid import Quantized, check_groups, check_matrix


def nf4(weight: torch.Tensor, group_size: int = 64, *, double_quant: bool = False) -> Quantized:
    """NF4 (Dettmers et al. 2023), codes and scales as bitsandbytes makes them.

    bitsandbytes cuts the matrix into blocks row after row; where the block size divides K, as is asked for here, these
    are our groups.

    Args:
        weight: [N, K].
        group_size: block size; -1: one scale a row.
        double_quant: scales in eight bits with a float32 one for every 256 of them.

    Raises:
        ValueError: NaN or infinity, a group size that does not divide K or is no multiple of 32.
    """
    weight = check_matrix("nf4", weight)
    columns = check_groups("nf4", group_size, weight.shape[1])
    int4 = int4_quantize(weight, group_size=group_size, scheme="nf4", double_quant=double_quant)
    return Quantized(int4.dequantize(), 4 + ((8 + 32 / 256) if double_quant else 32) / columns, 4, int4)
