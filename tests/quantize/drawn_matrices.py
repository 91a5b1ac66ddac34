# SPDX-License-Identifier: Apache-2.0
"""Weights and inputs that the tests of the quantisers share."""

import torch

from fastpost.quantize.moments import Moments


def draw(n=24, k=256, rows=512, *, correlation=0.9, seed=0, dtype=torch.float32):
    """W [n, k] and the Hessian [k, k] of inputs whose neighbouring columns are correlated and of unequal size."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g, dtype=torch.float64)
    x = torch.randn(rows, k, generator=g, dtype=torch.float64)
    for j in range(1, k):
        x[:, j] = correlation * x[:, j - 1] + (1 - correlation**2) ** 0.5 * x[:, j]
    x *= torch.rand(k, generator=g, dtype=torch.float64) * 2 + 0.1
    return weight.to(dtype), (2 * x.T @ x / rows).to(dtype)


def moments(x):
    made = Moments(x.shape[-1])
    made.add(x)
    return made
