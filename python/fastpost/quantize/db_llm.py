# SPDX-License-Identifier: Apache-2.0
"""DB-LLM's two binary planes: two bits a weight as a sum of two scaled planes of zeros and ones."""

from __future__ import annotations

import torch

from .grid import Quantized, check_groups, check_matrix

STARTS = tuple(0.3 + 0.1 * i for i in range(8))
"""Where the search for the scales begins, as shares of half the group's largest weight: 0.3 to 1.0."""
TRIED, ROUNDS = 4, 16
"""Rounds for each start, and for the best of them."""
PIECE = 1 << 13
"""Groups at a time, so that the memory for trials is bounded."""


def db_llm(weight: torch.Tensor, group_size: int = 128) -> Quantized:
    """The part of DB-LLM (Chen et al. 2024) that needs neither data nor training: ``w = α₁ b₁ + α₂ b₂``, b in {0, 1}.

    The planes begin as a two-bit grid, α₁ = 2s and α₂ = -s, that is the values -s, 0, s and 2s; then nearest values and
    least-squares scales alternate, which never makes the error larger; s may be negative, and the best of 16 begins is
    kept for each group. Left out: the authors train the scales through a straight-through estimator and distil from the
    full model with weights for uncertain tokens (deviation-aware distillation); results are therefore not theirs.

    Args:
        weight: [N, K].
        group_size: columns that share the two scales; -1: a row.

    Raises:
        ValueError: NaN or infinity, a group size that does not divide K.
    """
    weight = check_matrix("db_llm", weight)
    n, k = weight.shape
    group_size = check_groups("db_llm", group_size, k)
    groups = weight.reshape(-1, group_size)
    out = torch.cat([_best(piece) for piece in groups.split(PIECE)])
    return Quantized(out.view(n, k), 2 + 2 * 16 / group_size, 2)


def _best(groups: torch.Tensor) -> torch.Tensor:
    """The values of groups [B, g] with the best scales that were found."""
    least = torch.full_like(groups[:, 0], torch.inf)
    first, second = torch.zeros_like(least), torch.zeros_like(least)
    largest = groups.abs().amax(1) / 2
    for start in (sign * share for share in STARTS for sign in (1, -1)):
        scales = refined(groups, 2 * start * largest, -start * largest, TRIED)
        error = (groups - values(groups, *scales)).square().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        first, second = torch.where(better, scales[0], first), torch.where(better, scales[1], second)
    return values(groups, *refined(groups, first, second, ROUNDS))


def refined(
    groups: torch.Tensor, first: torch.Tensor, second: torch.Tensor, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [B] after `rounds` of nearest planes and least squares; the error never grows."""
    for _ in range(rounds):
        first, second = _scales(groups, *_planes(groups, first, second), first, second)
    return first, second


def values(groups: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """What groups [B, g] become with these scales [B]."""
    one, two = _planes(groups, first, second)
    return first[:, None] * one + second[:, None] * two


def _planes(groups: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The planes whose sum is nearest."""
    levels = torch.stack([torch.zeros_like(first), first, second, first + second])
    code = (groups - levels[..., None]).abs().argmin(0)
    return (code & 1).to(groups.dtype), (code >> 1).to(groups.dtype)


def _scales(groups, one, two, first, second) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares over a 2 x 2 system; where it is singular (a plane empty, or both the same) the scales stay."""
    a, b, c = one.sum(1), (one * two).sum(1), two.sum(1)
    p, q = (one * groups).sum(1), (two * groups).sum(1)
    determinant = a * c - b * b
    usable = determinant > 0
    determinant = torch.where(usable, determinant, 1.0)
    return (
        torch.where(usable, (c * p - b * q) / determinant, first),
        torch.where(usable, (a * q - b * p) / determinant, second),
    )
