# SPDX-License-Identifier: Apache-2.0
"""AWQ: columns that see large activations are enlarged before rounding, and a group's outliers are cut if it pays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .fold import Fold, apply
from .grid import Grid, Quantized, check_groups, check_matrix
from .rtn import rtn

STEPS = 20
CLIP_STEPS, MOST_SHRINK = 20, 0.5
CLIP_TOKENS = 512
NOT_CLIPPED = (
    "q_proj",
    "k_proj",
)  # their error goes through the softmax, of which the layer's own output knows nothing

Call = tuple[tuple, dict]


def candidates(mean_abs: torch.Tensor, steps: int = STEPS) -> list[torch.Tensor]:
    """``s = mean|x|^a`` for a = 0, 1/20, ... 19/20, at least 1e-4, divided by √(max s · min s) (Lin et al. 2024)."""
    out = []
    for step in range(steps):
        scale = mean_abs.pow(step / steps).clamp(min=1e-4)
        out.append(scale / (scale.max() * scale.min()).sqrt())
    return out


def search_scale(
    mean_abs: torch.Tensor, weights: list[torch.Tensor], loss: Callable[[list[torch.Tensor]], float],
    grid: Grid, group_size: int,
) -> torch.Tensor:  # fmt: skip
    """The candidate [K] whose rounded weights, scaled back, have the smallest loss; a = 0 is plain rounding."""
    best, found = None, torch.ones_like(mean_abs)
    for scale in candidates(mean_abs):
        error = loss([rtn(w * scale, grid, group_size).weight / scale for w in weights])
        if error == error and (best is None or error < best):
            best, found = error, scale
    return found


def search_clip(weight: torch.Tensor, x: torch.Tensor, grid: Grid, group_size: int) -> torch.Tensor:
    """W [N, K] with each group cut to ±m, for the m among max|w| · (1, 0.95, ... 0.55) that changes the group's share
    of the outputs of x [T, K] least once it is rounded."""
    weight = check_matrix("awq", weight)
    group_size = check_groups("awq", group_size, weight.shape[1])
    x = x.unflatten(1, (-1, group_size)).transpose(0, 1)  # [G, T, g]
    out = []
    for part in weight.unflatten(1, (-1, group_size)).split(256):  # [n, G, g]
        largest = part.abs().amax(-1, keepdim=True)
        best, limit = torch.full_like(largest, torch.inf), largest
        for step in range(int(MOST_SHRINK * CLIP_STEPS)):
            bound = largest * (1 - step / CLIP_STEPS)
            cut = part.clamp(-bound, bound)
            scales, zeros = grid.parameters(cut)
            change = grid.round(cut, scales[..., None], zeros[..., None]) - part
            error = (x @ change.permute(1, 2, 0)).square().mean(1).t()[..., None]  # [G, T, n] -> [n, G, 1]
            better = error < best
            best, limit = torch.where(better, error, best), torch.where(better, bound, limit)
        out.append(part.clamp(-limit, limit).flatten(1))
    return torch.cat(out)


@torch.no_grad()
def awq_scales(
    block: nn.Module, folds: list[Fold], calls: dict[str, list[Call]], mean_abs: dict[str, torch.Tensor],
    grid: Grid, group_size: int,
) -> list[torch.Tensor]:  # fmt: skip
    """The scale of each fold. All are searched on the block as it is: what one changes, another does not see.

    calls: inspected module -> arguments of its calls; the loss is the mean squared change of what it gives.
    mean_abs: linear layer -> mean|x| [K].
    """
    modules, found = dict(block.named_modules()), []
    for fold in folds:
        inspected, linears = modules[fold.inspect], [modules[name] for name in fold.linears]
        wanted = [_output(inspected, call) for call in calls[fold.inspect]]
        weights = [linear.weight.detach().clone() for linear in linears]

        def loss(trial: list[torch.Tensor], linears=linears, inspected=inspected, wanted=wanted, fold=fold) -> float:
            for linear, weight in zip(linears, trial):
                linear.weight.copy_(weight)
            total = 0.0
            for call, want in zip(calls[fold.inspect], wanted):
                total += float((_output(inspected, call) - want).square().double().mean())
            return total / len(wanted)

        found.append(search_scale(mean_abs[fold.linears[0]], weights, loss, grid, group_size))
        for linear, weight in zip(linears, weights):
            linear.weight.copy_(weight)
    return found


@torch.no_grad()
def awq_move(
    block: nn.Module, folds: list[Fold], scales: list[torch.Tensor], sample: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Move the scales, in place, in the weights and in the sampled inputs `sample` (linear layer -> [T, K])."""
    for fold, scale in zip(folds, scales, strict=True):
        used = apply(block, fold, scale, dtype)
        for name in fold.linears:
            sample[name] = sample[name] / used


@torch.no_grad()
def awq_round(name: str, weight: torch.Tensor, x: torch.Tensor, grid: Grid, group_size: int) -> Quantized:
    """W [N, K] of the layer `name`, its scales moved, cut and rounded. x [T, K]: inputs, divided by these scales."""
    if name.rpartition(".")[2] not in NOT_CLIPPED:
        weight = search_clip(weight, x[:: max(1, len(x) // CLIP_TOKENS)][:CLIP_TOKENS], grid, group_size)
    return rtn(weight, grid, group_size)


def _output(module: nn.Module, call: Call) -> torch.Tensor:
    out = module(*call[0], **call[1])
    return out[0] if isinstance(out, tuple) else out
