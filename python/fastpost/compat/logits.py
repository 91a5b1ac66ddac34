# SPDX-License-Identifier: Apache-2.0
"""Numbers about a row of logits that linear_logprob does not return, made without the logits: O((N + V) D) work."""

from __future__ import annotations

import torch
from torch import Tensor


def in_float32(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Float32 copies of what is half precision.

    A gradient that is the difference of two passes (p of a log-sum-exp = onehot - (onehot - p)) loses its digits when
    each is rounded to bfloat16 first, most of all near convergence. In float32 it keeps them; the sum is rounded once,
    on its way through these copies.
    """
    half = (torch.bfloat16, torch.float16)
    return tuple(t.float() if t is not None and t.dtype in half else t for t in (hidden, weight, bias))


def target_logit(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None,
                 softcap: float | None = None, ignore_index: int = -100) -> Tensor:  # fmt: skip
    """softcap(hidden · weight[target] + bias[target]) per row: [N] float32, differentiable; 0 for ignored rows.

    hidden [N, D] and weight [V, D] float32, target [N] int64. target_logit - logprob is the row's log-sum-exp.
    """
    scored = target != ignore_index
    target = torch.where(scored, target, 0)
    z = (hidden * weight[target]).sum(-1)
    if bias is not None:
        z = z + bias[target]
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return torch.where(scored, z, 0)


def sum_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, coefficient: Tensor | None = None):
    """Σ_j coefficient[j] · z[i, j] for z = hidden · weightᵀ + bias (no softcap): [N] float32, differentiable.

    The sum over the vocabulary is taken first: hidden · (Σ_j coefficient[j] weight[j]). coefficient: [V] float32, then
    weight and bias must be float32, too; or None for all ones.
    """
    if coefficient is None:
        total = weight.sum(0, dtype=torch.float32)
        constant = 0.0 if bias is None else bias.sum(dtype=torch.float32)
    else:
        total = coefficient @ weight
        constant = 0.0 if bias is None else coefficient @ bias
    return hidden.float() @ total + constant
