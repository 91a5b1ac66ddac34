# SPDX-License-Identifier: Apache-2.0
"""Columns are rounded one after another, and those still to come are moved to make up for the error (GPTQ).

With UᵀU = H⁻¹, U upper triangular, the best move of the columns after j for an error e_j = (w_j - q_j) / U_jj is
``w_k -= e_j U_jk`` (Frantar et al. 2023, section 3). PB-LLM and BiLLM round in other ways, and compensate in this one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

BLOCK = 128
"""Columns whose moves are saved up into one matrix product."""


def settle_dead(weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies in which an input that was never anything but 0 has weight 0 and a diagonal like its neighbours'.

    GPTQ writes 1 there; the mean of the live ones is the same thing for inputs of any scale, and keeps the damping, a
    share of the mean diagonal, from being set by columns that do not matter."""
    weight, hessian = weight.clone(), hessian.to(weight.dtype, copy=True)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if dead.any():
        live = diagonal[~dead]
        diagonal[dead] = live.mean() if len(live) else torch.ones((), dtype=live.dtype)
        weight[:, dead] = 0
    return weight, hessian


def check_hessian(op: str, weight: torch.Tensor, hessian: torch.Tensor) -> None:
    k = weight.shape[1]
    if not isinstance(hessian, torch.Tensor) or hessian.shape != (k, k) or not torch.isfinite(hessian).all():
        got = list(hessian.shape) if isinstance(hessian, torch.Tensor) else type(hessian).__name__
        raise ValueError(f"[{op}] hessian: expected a finite matrix [{k}, {k}], got {got}.")


def upper_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """R [K, K], upper triangular, with R Rᵀ = H + damping · mean diag(H) · I: Cholesky from the last column up.

    Its inverse U has UᵀU = (H + ...)⁻¹, so the inverse itself is never formed: less work and less lost than by
    Cholesky, inverse, Cholesky. float32 is tried first, then float64.

    Raises:
        ValueError: not positive definite with this damping.
    """
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
        lower, failed = torch.linalg.cholesky_ex(damped.to(dtype).flip(0, 1))
        if not failed:
            return lower.flip(0, 1).to(hessian.dtype)
    raise ValueError(
        f"[quantize] hessian: not positive definite with damping {damping:g}. Give more calibration rows, or "
        "more damping."
    )


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U [K, K], upper triangular, with UᵀU = (H + damping · mean diag(H) · I)⁻¹."""
    factor = upper_factor(hessian, damping)
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye, upper=True)


def by_column(
    weight: torch.Tensor, factor: torch.Tensor, round_column: Callable[[int, torch.Tensor], torch.Tensor],
    block: int = BLOCK,
) -> torch.Tensor:  # fmt: skip
    """Round W [N, K] column by column.

    round_column(j, moved) gives column j [N]; `moved` [K, N] is W's transpose so far: its rows from j to the end of
    their block are up to date, those of later blocks up to the begin of this one.
    """
    moved, out = weight.t().contiguous(), torch.empty_like(weight.t(), memory_format=torch.contiguous_format)
    for lo in range(0, len(moved), block):
        hi = min(lo + block, len(moved))
        errors = torch.empty_like(moved[lo:hi])
        for j in range(lo, hi):
            out[j] = round_column(j, moved)
            torch.sub(moved[j], out[j], out=errors[j - lo]).div_(factor[j, j])
            moved[j + 1 : hi].addr_(factor[j, j + 1 : hi], errors[j - lo], alpha=-1)
        moved[hi:].addmm_(factor[lo:hi, hi:].t(), errors, alpha=-1)
    return out.t().contiguous()


def by_block(
    weight: torch.Tensor, factor: torch.Tensor, round_block: Callable[[int, torch.Tensor], torch.Tensor],
    block: int = BLOCK,
) -> torch.Tensor:  # fmt: skip
    """Round W [N, K] a block of columns at a time: round_block(first column, block [N, b], up to date) -> [N, b].

    For errors E of a block with factor U_BB the later columns move by -E U_BB⁻¹ U_B,later, the least squares answer."""
    moved, out = weight.clone(), torch.empty_like(weight)
    for lo in range(0, weight.shape[1], block):
        hi = min(lo + block, weight.shape[1])
        out[:, lo:hi] = round_block(lo, moved[:, lo:hi])
        errors = moved[:, lo:hi] - out[:, lo:hi]
        errors = torch.linalg.solve_triangular(factor[lo:hi, lo:hi], errors, upper=True, left=False)
        moved[:, hi:].addmm_(errors, factor[lo:hi, hi:], alpha=-1)
    return out
