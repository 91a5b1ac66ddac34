# SPDX-License-Identifier: Apache-2.0
"""Numbers about a row of logits that linear_logprob does not return, made without the logits: O((N + V) D) work."""

from __future__ import annotations

import torch
from torch import Tensor


class _TargetDot(torch.autograd.Function):
    """hidden[i] · weight[target[i]] in float32. Autograd's own backward would sum the rows of a repeated target in the
    weight's dtype; here bfloat16 is rounded to once."""

    @staticmethod
    def forward(ctx, hidden, weight, target):
        ctx.save_for_backward(hidden, weight, target)
        return (hidden.float() * weight[target].float()).sum(-1)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target = ctx.saved_tensors
        grad = grad.float()[:, None]
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (grad * weight[target].float()).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            classes, row = target.unique(return_inverse=True)
            sums = torch.zeros(len(classes), weight.shape[1], dtype=torch.float32, device=weight.device)
            sums = sums.index_add(0, row, grad * hidden.float())
            grad_weight = torch.zeros_like(weight).index_copy(0, classes, sums.to(weight.dtype))
        return grad_hidden, grad_weight, None


def target_logit(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None,
                 softcap: float | None = None, ignore_index: int = -100) -> Tensor:  # fmt: skip
    """softcap(hidden · weight[target] + bias[target]) per row: [N] float32, differentiable; 0 for ignored rows.

    hidden [N, D], weight [V, D], target [N] int64. With it the log-sum-exp of a row is target_logit - logprob. Where
    linear_logprob rounds logits (bfloat16 products), that difference is off by the rounding of one logit.
    """
    scored = target != ignore_index
    target = torch.where(scored, target, 0)
    z = _TargetDot.apply(hidden, weight, target)
    if bias is not None:
        z = z + bias.float()[target]
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return torch.where(scored, z, 0)


def sum_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, coefficient: Tensor | None = None):
    """Σ_j coefficient[j] · z[i, j] for z = hidden · weightᵀ + bias (no softcap): [N] float32, differentiable.

    The sum over the vocabulary is taken first: hidden · (Σ_j coefficient[j] weight[j]). coefficient [V] float32, all
    ones when None; otherwise a half-precision weight is copied to float32 once.
    """
    if coefficient is None:
        total = weight.sum(0, dtype=torch.float32)
        constant = None if bias is None else bias.sum(dtype=torch.float32)
    else:
        total = coefficient @ weight.float()
        constant = None if bias is None else coefficient @ bias.float()
    z = hidden.float() @ total
    return z if constant is None else z + constant
