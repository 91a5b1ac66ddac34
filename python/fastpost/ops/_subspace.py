# SPDX-License-Identifier: Apache-2.0
"""The space of the largest eigenvectors of Gram matrices: the middle of kv_factorize, in torch's own linear algebra.

A random subspace, somewhat wider than asked for, is multiplied by the matrix and made orthonormal again: on a CPU until
the energy that it holds settles; then an eigenproblem of its own width says which part to keep. Small matrices are
decomposed whole. On a GPU nothing waits for a result: the number of products is fixed, and the part to keep is found
without an eigenproblem, which takes longer there than all the rest. (Unless the rank is most of the dimensions.)

All in float64: users may have told torch to multiply float32 less exactly, and orthonormalising by Cholesky squares
the condition number. What the matrix lost when its sums were made in float32 stays lost.
"""

from __future__ import annotations

import contextlib
import functools

import torch

SMALL = 256  # dimensions up to which the whole decomposition is the faster one
SETTLED = 5e-4  # of the truncated energy: what one more product may still win
MOST = 32  # products
FIRST = 3  # products after which it is worth looking
PRODUCTS = 5  # on a GPU; tests/ops/test_kv_factorize.py has the spectra for which that must do
SHARPER = 12  # steps of Newton and Schulz towards the sign of a matrix
NOISE = 2.0**-22  # of the energy: what sums in float32 do not resolve


def leading(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(energy of each direction [B, r], directions [B, D, r], share of the energy that they leave [B]), float64.

    Of gram [B, D, D]. Directions are orthonormal; on a CPU they are eigenvectors, the largest first, and the energies
    eigenvalues; on a GPU they span the same space.
    """
    wide = gram.double()
    energy = wide.diagonal(dim1=1, dim2=2).sum(1)
    unit = wide / energy.clamp(min=torch.finfo(torch.float32).tiny)[:, None, None]
    if len(gram) and not gram.is_cuda:
        with _one_thread():  # one by one: the bits of a sequence do not depend on the others
            values, vectors, left = (torch.stack(x) for x in zip(*(_eigenvectors(g, rank) for g in unit)))
    elif rank == gram.shape[1] or _width(rank) <= gram.shape[1] * 3 // 4:
        values, vectors, left = without_waiting(unit, rank)
    else:
        values, vectors = torch.linalg.eigh(unit)
        left = values[:, :-rank].clamp(min=0).sum(1)
        values, vectors = values[:, -rank:].flip(1), vectors[:, :, -rank:].flip(2)
    return values.clamp(min=0) * energy[:, None], vectors, left.clamp(min=0)


@contextlib.contextmanager
def _one_thread():
    """BLAS and LAPACK add up in an order that depends on the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _eigenvectors(gram, rank):
    d = gram.shape[0]
    width = _width(rank)
    if d <= SMALL or width > d // 2:
        values, vectors = torch.linalg.eigh(gram)
        return values[d - rank :].flip(0), vectors[:, d - rank :].flip(1), values[: d - rank].clamp(min=0).sum()
    q, before = _start(d, width, gram.device), None
    for i in range(MOST):
        product = gram @ q
        if i >= FIRST:
            values, turn = torch.linalg.eigh(q.mT @ product)
            left = float(gram.trace() - values[width - rank :].sum())
            if before is not None and before - left <= max(SETTLED * left, NOISE):
                break
            before = left
        q = _orthonormal(product.add_(q, alpha=NOISE))
    values = values[width - rank :].flip(0)
    return values, q @ turn[:, width - rank :].flip(1), gram.trace() - values.sum()


def without_waiting(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of matrices [B, D, D] whose trace is 1, by a fixed number of products, Cholesky factors and solves."""
    d = gram.shape[1]
    if rank == d:
        q = torch.eye(d, dtype=gram.dtype, device=gram.device).expand_as(gram)
    else:
        q = _start(d, _width(rank), gram.device).expand(len(gram), -1, -1)
        for _ in range(PRODUCTS):
            q = _orthonormal(torch.add(gram @ q, q, alpha=NOISE))
        q = _orthonormal(q)
        q = q @ _upper_part(q.mT @ (gram @ q), rank)
    values = (q * (gram @ q)).sum(1)
    return values, q, gram.diagonal(dim1=1, dim2=2).sum(1) - values.sum(1)


def _upper_part(t, rank):
    """An orthonormal basis [B, n, r] of the space of the r largest eigenvectors of t [B, n, n], or of one that loses
    next to nothing: where eigenvalues on both sides of the cut are nearly equal, either will do."""
    first = _above(t, rank, t.shape[1], SHARPER // 2)  # in this basis the diagonal says well where to cut
    return first @ _above(first.mT @ t @ first, rank, rank, SHARPER)


def _above(t, rank, columns, steps):
    """Columns of the projector on the eigenvectors above the cut between the r-th and the next, made orthonormal.

    (1 + sign(t - μ)) / 2 with μ at the cut. The iteration of Newton and Schulz towards the sign starts from
    (t - μ) / (t + μ): the same eigenvectors, and eigenvalues in (-1, 1) that are the further from 0 the further their
    logarithms are from the cut's. Stopped early, it is a soft filter."""
    diagonal, order = t.diagonal(dim1=1, dim2=2).sort(1, descending=True)  # nearly the eigenvalues
    cut = diagonal[:, rank - 1 : rank + 1].clamp(min=NOISE).prod(1).sqrt()[:, None, None]
    one = torch.eye(t.shape[1], dtype=t.dtype, device=t.device)
    sign = torch.cholesky_solve(t - cut * one, torch.linalg.cholesky_ex(t + cut * one).L)
    for _ in range(steps):
        sign = torch.baddbmm(sign, sign, sign @ sign, beta=1.5, alpha=-0.5)
    upper = (0.5 + NOISE) * one + 0.5 * sign  # not singular where fewer than that are above noise
    order = order[:, None, :columns].expand(-1, t.shape[1], -1)
    return _orthonormal(_orthonormal(upper.gather(2, order)))


def _width(rank):
    return rank + max(16, 2 * rank // 5)


def _orthonormal(y):
    """By Cholesky: products instead of reflections one after the other, and no result that the host has to see.
    Columns of equal length first, or the largest would hide the others."""
    y = y / torch.linalg.vector_norm(y, dim=-2, keepdim=True)
    factor = torch.linalg.cholesky_ex(y.mT @ y).L
    return torch.linalg.solve_triangular(factor.mT, y, upper=True, left=False)


@functools.lru_cache(maxsize=16)
def _start(d, width, device):
    """The same numbers in every run."""
    return torch.randn(d, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
