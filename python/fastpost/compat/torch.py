# SPDX-License-Identifier: Apache-2.0
"""torch.nn.functional.linear_cross_entropy on fastpost's ops.

from torch.nn.functional import linear_cross_entropy      # before
from fastpost.compat.torch import linear_cross_entropy    # after
loss = linear_cross_entropy(hidden, head.weight, target, label_smoothing=0.1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.compat.logits import in_float32, sum_of_logits, target_logit
from fastpost.ops.linear_logprob import linear_logprob

OP = "linear_cross_entropy"


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`` without the [N, V] logits.

    With log p the log-probability of the target t, z its logit, V classes and smoothing e, a row costs

        w[t] · (1 - e) · (-log p) + e / V · Σ_j w[j] · (lse - z[j])            lse = z[t] - log p

    and "mean" divides the sum by Σ w[t] over the rows that are not ignored (NaN when there are none), as in torch.

    Args:
        input: [N, D] or [D] float32, bfloat16 or float16.
        linear_weight: [V, D], dtype of `input`.
        target: [N] or [] int64 in [0, V), or `ignore_index`.
        linear_bias: [V], dtype of `input`.
        weight: [V] rescaling of classes.
        reduction: "mean", "sum" or "none".
        ignore_index: None means -100.
        label_smoothing: in [0, 1]. Above 0, half precision is computed in float32, with a float32 copy of
            `linear_weight`.
        options: torch's chunking options, without effect here: memory is bounded and the graph may be kept either way.

    Returns:
        float32 (torch returns the dtype of `input`): [] or, with "none", the shape of `target`; 0 where ignored.

    Raises:
        ValueError: class probabilities as target, K-dimensional weights (torch takes both), or a wrong shape or dtype.
    """
    _check(input, linear_weight, target, weight, reduction, label_smoothing)
    ignore_index = -100 if ignore_index is None else ignore_index
    hidden, y = input.reshape(-1, input.shape[-1]), target.reshape(-1).contiguous()
    scored = y != ignore_index
    class_weight = None if weight is None else weight.float()
    share = scored.float() if weight is None else torch.where(scored, class_weight[torch.where(scored, y, 0)], 0)
    if label_smoothing:
        with torch.autocast(input.device.type, enabled=False):
            hidden, linear_weight, linear_bias = in_float32(hidden, linear_weight, linear_bias)
            logprob = linear_logprob(hidden, linear_weight, y, bias=linear_bias, ignore_index=ignore_index)
            lse = target_logit(hidden, linear_weight, y, linear_bias, ignore_index=ignore_index) - logprob
            total = len(linear_weight) if weight is None else class_weight.sum()
            spread = total * lse - sum_of_logits(hidden, linear_weight, linear_bias, class_weight)
        even = torch.where(scored, spread, 0) / len(linear_weight)
        losses = (1 - label_smoothing) * -share * logprob + label_smoothing * even
    else:
        losses = -share * linear_logprob(hidden, linear_weight, y, bias=linear_bias, ignore_index=ignore_index)
    if reduction == "none":
        return losses.reshape(target.shape)
    return losses.sum() / share.sum() if reduction == "mean" else losses.sum()


def _check(input, linear_weight, target, weight, reduction, label_smoothing):
    if input.ndim not in (1, 2):
        raise ValueError(f"[{OP}] input: expected [N, D] or [D], got {list(input.shape)}.")
    if linear_weight.ndim != 2:
        raise ValueError(
            f"[{OP}] linear_weight: expected [V, D], got {list(linear_weight.shape)}. Losses over further dimensions "
            "have no counterpart here: use torch's function."
        )
    if target.is_floating_point():
        raise ValueError(
            f"[{OP}] target: expected int64 class indices, got {target.dtype} {list(target.shape)}. Probabilities have "
            "no counterpart here: use torch's function."
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(f"[{OP}] target: expected shape {list(input.shape[:-1])}, got {list(target.shape)}.")
    if weight is not None and weight.shape != linear_weight.shape[:1]:
        raise ValueError(f"[{OP}] weight: expected shape [{len(linear_weight)}], got {list(weight.shape)}.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"[{OP}] reduction: expected 'mean', 'sum' or 'none', got {reduction!r}.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"[{OP}] label_smoothing: expected a number in [0, 1], got {label_smoothing!r}.")
