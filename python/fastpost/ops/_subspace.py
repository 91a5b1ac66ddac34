# SPDX-License-Identifier: Apache-2.0
"""The largest eigenvectors of Gram matrices: the middle of kv_factorize, in torch's own linear algebra.

Small matrices are decomposed whole. Of large ones a random subspace, somewhat wider than asked for, is multiplied by
the matrix and made orthonormal again until the energy that it holds settles. Directions whose share of the energy is
below what sums in float32 resolve are noise, and so is the order among them.
"""

from __future__ import annotations

import contextlib
import functools

import torch

SMALL = 256  # dimensions up to which the whole decomposition is the faster one
SETTLED = 5e-4  # of the truncated energy: what one more product may still win
MOST = 32  # products
FIRST = 3  # products after which it is worth looking


def leading(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(eigenvalues [B, r] descending, eigenvectors [B, D, r], energy of all others [B]), float64, of gram [B, D, D]."""
    if len(gram) == 0:
        new = functools.partial(gram.new_empty, dtype=torch.float64)
        return new(0, rank), new(0, gram.shape[1], rank), new(0)
    with _one_thread():
        parts = [_leading(matrix, rank) for matrix in gram]  # one by one: bits of one do not depend on the others
    return tuple(torch.stack(each) for each in zip(*parts))


@contextlib.contextmanager
def _one_thread():
    """BLAS and LAPACK add up in an order that depends on the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _leading(gram, rank):
    d = gram.shape[0]
    width = rank + max(16, rank // 4)
    if d <= SMALL or width > d // 2:
        values, vectors = torch.linalg.eigh(gram.double())
        return values[d - rank :].flip(0), vectors[:, d - rank :].flip(1), values[: d - rank].clamp(min=0).sum()
    q = _settle(gram, rank, torch.linalg.qr(gram @ _start(d, width, gram.device)).Q)
    wide, q = gram.double(), q.double()
    values, turn = torch.linalg.eigh(q.T @ (wide @ q))
    left = (wide.diagonal().sum() - values[width - rank :].sum()).clamp(min=0)
    return values[width - rank :].flip(0), q @ turn[:, width - rank :].flip(1), left


def _settle(gram, rank, q):
    energy, before = gram.diagonal().double().sum(), None
    for i in range(MOST):
        product = gram @ q
        if i >= FIRST:
            left = energy - torch.linalg.eigvalsh(q.T @ product)[-rank:].double().sum()
            if before is not None and before - left <= max(SETTLED * left, 1e-7 * energy):
                break
            before = left
        q = torch.linalg.qr(product).Q
    return q


@functools.lru_cache(maxsize=16)
def _start(d, width, device):
    """The same numbers in every run."""
    return torch.randn(d, width, generator=torch.Generator().manual_seed(0)).to(device)
