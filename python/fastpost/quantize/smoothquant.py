# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant: outliers of activations are moved into weights, then both are rounded."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from .fold import Fold, apply
from .grid import Quantized, check_matrix


def smooth_scale(largest_x: torch.Tensor, weights: list[torch.Tensor], alpha: float = 0.5) -> torch.Tensor:
    """``s = max|x|^α / max|W|^(1-α)`` for each column (Xiao et al. 2023, eq. 4), at least 1e-5.

    largest_x [K], weights [N_i, K] of the layers that share the input."""
    largest_w = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp(min=1e-5)
    return (largest_x.clamp(min=1e-5).pow(alpha) / largest_w.pow(1 - alpha)).clamp(min=1e-5)


def absmax_round(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row (last dimension) to the nearest of 2^b - 1 values about 0, ``scale = max|x| / (2^(b-1) - 1)``."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


def smooth_weight(weight: torch.Tensor, bits: int) -> Quantized:
    """W [N, K] with one symmetric scale a row. Raises ValueError for NaN or infinity."""
    weight = check_matrix("smoothquant", weight)
    return Quantized(absmax_round(weight, bits), bits + 16 / weight.shape[1], bits)


def smooth_block(
    block: nn.Module, folds: list[Fold], largest: dict[str, torch.Tensor], alpha: float, dtype: torch.dtype
) -> None:
    """Move the scales of a block, in place. `largest`: linear layer -> max|x| [K] of its inputs."""
    modules = dict(block.named_modules())
    for fold in folds:
        weights = [modules[name].weight for name in fold.linears]
        apply(block, fold, smooth_scale(largest[fold.linears[0]], weights, alpha), dtype)


def round_activations(model: nn.Module, bits: int, names: Collection[str] | None = None) -> list:
    """From now on the inputs of linear layers are rounded, token by token, to `bits` bits: what an integer product
    would be given. The arithmetic stays in floats.

    names: which layers; None: all nn.Linear of `model`. Returns the handles of the hooks.
    """

    def hook(module: nn.Module, args: tuple) -> tuple:
        return (absmax_round(args[0], bits), *args[1:])

    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return [found[name].register_forward_pre_hook(hook) for name in (found if names is None else names)]
