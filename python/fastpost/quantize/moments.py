# SPDX-License-Identifier: Apache-2.0
"""What calibration leaves of a layer's inputs: second moments, mean and largest size of each column."""

from __future__ import annotations

import torch


class Moments:
    """Statistics of rows x [T, K], gathered piece by piece.

    Fields:
        hessian: [K, K] float32, the running mean over rows of 2 x xᵀ: the Hessian of ‖(W - Ŵ) x‖² in each row of Ŵ
            (GPTQ, Frantar et al. 2023, eq. 1). A mean, so it neither grows with the rows nor needs their number in
            advance.
        mean_abs, max_abs: [K] float32.
        rows: how many rows so far.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", *, hessian: bool = True):
        self.hessian = torch.zeros(columns, columns, device=device) if hessian else None
        self.mean_abs = torch.zeros(columns, device=device)
        self.max_abs = torch.zeros(columns, device=device)
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in x [..., K].

        Raises:
            ValueError: NaN or infinity in it.
        """
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        if not torch.isfinite(x).all():
            raise ValueError(
                "[calibration] inputs of a layer hold NaN or infinity, so nothing can be learnt from them. Check the "
                "model with `fastpost eval MODEL --perplexity TEXT`."
            )
        total = self.rows + len(x)
        keep, share = self.rows / total, 1 / total
        if self.hessian is not None:
            self.hessian.addmm_(x.t(), x, beta=keep, alpha=2 * share)
        size = x.abs()
        self.mean_abs.mul_(keep).add_(size.sum(0), alpha=share)
        torch.maximum(self.max_abs, size.amax(0), out=self.max_abs)
        self.rows = total


def proxy_loss(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(Δ H Δᵀ) in float64: what a layer's output loses, up to a factor, when its weight changes by Δ [N, K]."""
    difference = difference.double()
    return float(((difference @ hessian.double()) * difference).sum())
