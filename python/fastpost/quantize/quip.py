# SPDX-License-Identifier: Apache-2.0
"""QuIP: weight and Hessian are turned by random rotations until no entry sticks out, then rounded with feedback."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch

from .compensation import BLOCK, check_hessian, settle_dead, upper_factor
from .grid import Quantized, check_matrix

RANGE = 2.4
"""The grid reaches from -2.4 to 2.4 root mean squares."""
DAMPING = 1e-2
"""Added to the diagonal of a Hessian whose mean diagonal is 1."""


class Rotation:
    """A random orthogonal n x n matrix (A ⊗ B) P: two small rotations over a permutation, so that turning a row costs
    n (p + q) for n = p q, not n²."""

    def __init__(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32):
        p = next(d for d in range(isqrt(n), 0, -1) if n % d == 0)
        self.order = torch.randperm(n, generator=generator)
        self.left, self.right = _orthogonal(p, generator).to(dtype), _orthogonal(n // p, generator).to(dtype)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Each row of x [..., n], as a vector, times the matrix."""
        grid = x[..., self.order].unflatten(-1, (len(self.left), len(self.right)))
        return (self.left @ grid @ self.right.t()).flatten(-2)

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        grid = x.unflatten(-1, (len(self.left), len(self.right)))
        turned = (self.left.t() @ grid @ self.right).flatten(-2)
        return torch.empty_like(turned).index_copy_(-1, self.order, turned)

    def to(self, device) -> Rotation:
        self.order, self.left, self.right = self.order.to(device), self.left.to(device), self.right.to(device)
        return self


def _orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform among all rotations and reflections: QR of a normal matrix with the signs of R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def quip(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int = 2, *, seed: int = 0, passes: int = 2,
    round_values: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Quantized:  # fmt: skip
    """QuIP (Chee et al. 2023).

    ``W' = U W D Vᵀ``, ``H' = V D⁻¹ H D⁻¹ Vᵀ`` with ``D_i = (H_ii / ‖W_:i‖²)^(1/4)`` and random rotations U, V; H' is
    brought to mean diagonal 1 and gets 0.01 on its diagonal; LDLQ with greedy passes rounds W' to a grid of 2^bits
    points over ±2.4 root mean squares; then everything is undone. tr(Δ H Δᵀ) is the same before and after turning.

    Args:
        weight: [N, K].
        hessian: [K, K].
        bits: 1 to 8.
        seed: of the rotations, which are made from it again when needed.
        passes: greedy passes after LDLQ.
        round_values: what to do instead of rounding to the grid, for checks.

    Raises:
        ValueError: NaN or infinity, a Hessian that does not fit, bits outside 1 to 8.
    """
    weight = check_matrix("quip", weight)
    check_hessian("quip", weight, hessian)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"[quip] bits: expected 1 to 8, got {bits!r}.")
    n, k = weight.shape
    weight, hessian = settle_dead(weight, hessian)
    diagonal, lengths = hessian.diagonal(), weight.square().sum(0)
    stretch = (
        torch.where((lengths > 0) & (diagonal > 0), diagonal / torch.where(lengths > 0, lengths, 1.0), 1.0) ** 0.25
    )
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (Rotation(m, generator, weight.dtype).to(weight.device) for m in (n, k))
    turned = rows.rows(columns.rows(weight * stretch).t()).t().contiguous()
    hessian = columns.rows(columns.rows(hessian / stretch / stretch[:, None]).t())
    hessian = (hessian + hessian.t()) * (k / (2 * hessian.diagonal().sum()))
    hessian.diagonal().add_(DAMPING)
    round_values = round_values or even_grid(bits, RANGE * float(turned.square().mean().sqrt()))
    rounded = ldlq(turned, hessian, round_values)
    for _ in range(passes):
        rounded = greedy(rounded, turned, hessian, round_values)
    out = columns.undo(rows.undo(rounded.t()).t()) / stretch
    return Quantized(out, bits + 16 / n + (16 + 64) / (n * k), bits)


def even_grid(bits: int, reach: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rounding to 2^bits points from -reach to reach, both ends included."""
    top, reach = 2**bits - 1, reach or 1.0

    def round_values(values: torch.Tensor) -> torch.Tensor:
        return (((values / reach + 1) * (top / 2)).round().clamp(0, top) * (2 / top) - 1) * reach

    return round_values


def ldlq(weight: torch.Tensor, hessian: torch.Tensor, round_values, *, damping: float = 0.0) -> torch.Tensor:
    """Column k is rounded after the error of the columns before it has been fed back,
    ``Ŵ_k = Q(W_k + (W - Ŵ)_<k L_<k,k)`` with H = (L + I) D (L + I)ᵀ, L strictly upper (QuIP, eq. 3). Without a bounded
    range it is GPTQ, written the other way round (theorem 6 there)."""
    factor = upper_factor(hessian, damping)
    feedback = factor / factor.diagonal()
    source, out = weight.t().contiguous(), torch.empty_like(weight.t(), memory_format=torch.contiguous_format)
    errors = torch.empty_like(source)
    for lo in range(0, len(source), BLOCK):
        hi = min(lo + BLOCK, len(source))
        wanted = source[lo:hi] + feedback[:lo, lo:hi].t() @ errors[:lo]
        for j in range(lo, hi):
            out[j] = round_values(wanted[j - lo] + feedback[lo:j, j] @ errors[lo:j])
            errors[j] = source[j] - out[j]
    return out.t().contiguous()


def greedy(rounded: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor, round_values) -> torch.Tensor:
    """One pass of coordinate descent on tr(Δ H Δᵀ): each column to the grid points that are best while the others
    stay."""
    out, source = rounded.t().contiguous(), weight.t()
    errors = out - source
    slope = hessian @ errors  # of the loss, up to a factor; kept up to date within a block of columns
    for lo in range(0, len(out), BLOCK):
        hi = min(lo + BLOCK, len(out))
        before = errors[lo:hi].clone()
        for j in range(lo, hi):
            old = out[j].clone()
            out[j] = round_values(old - slope[j] / hessian[j, j])
            change = out[j] - old
            errors[j] += change
            slope[j:hi].addr_(hessian[j:hi, j], change)
        slope[hi:].addmm_(hessian[hi:, lo:hi], errors[lo:hi] - before)
    return out.t().contiguous()
