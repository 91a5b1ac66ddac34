# SPDX-License-Identifier: Apache-2.0
"""cut-cross-entropy's linear_cross_entropy on fastpost's ops; it runs on CPUs, too.

from cut_cross_entropy import linear_cross_entropy        # before
from fastpost.compat.cce import linear_cross_entropy      # after
loss = linear_cross_entropy(embeddings, classifier, labels, shift=True)
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from fastpost.compat.logits import in_float32, target_logit
from fastpost.ops.linear_logprob import linear_logprob

OP = "linear_cross_entropy"
IMPLEMENTATIONS = (
    *("cce", "torch_compile", "cce_exact"),
    *("cce_kahan_full", "cce_kahan_full_c", "cce_kahan_full_e", "cce_kahan_full_c_full_e"),
)


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | enum.IntEnum = "cce",
    vocab_parallel_options: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``cross_entropy(softcap(e @ c.T + bias).float(), targets)`` without the logits.

    The argument order is that of cut-cross-entropy's main branch; in its release 25.1.1 `ignore_index` came fourth.

    Args:
        e: [..., D] float32, bfloat16 or float16.
        c: [V, D], dtype of `e`.
        targets: [...] int64 in [0, V), or `ignore_index`.
        bias: [V], dtype of `e`.
        softcap: s > 0 replaces each logit x by s·tanh(x / s).
        reduction: "mean" over the rows that are not ignored (NaN when there are none), "sum" or "none".
        shift: n > 0 scores targets[..., n:] from e[..., :-n, :], within each row of the batch; True is 1.
        return_lse: also return the log-sum-exp of the logits, differentiable, for a z-loss. Half precision is then
            computed in float32, with a float32 copy of `c`.
        filter_eps, accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad, impl: how much gradient the original may
            drop and how it adds up. Here nothing is dropped and sums are float32, whatever they say.
        vocab_parallel_options: must be None.

    Returns:
        loss float32: [] or, with "none", [..., T - shift], 0 where ignored. With `return_lse` a pair (loss, lse
        [..., T - shift]), lse 0 where ignored.

    Raises:
        ValueError: shift outside [0, T), unknown reduction or impl, vocab_parallel_options, wrong shapes or dtypes.
    """
    _check(e, c, targets, bias, reduction, shift, impl, vocab_parallel_options)
    shift = int(shift)
    if shift:
        e, targets = e[..., :-shift, :], targets[..., shift:]
    hidden, y = e.reshape(-1, e.shape[-1]), targets.reshape(-1).contiguous()
    if not return_lse:
        return _reduce(linear_logprob(hidden, c, y, bias=bias, softcap=softcap, ignore_index=ignore_index),
                       targets, ignore_index, reduction)  # fmt: skip
    with torch.autocast(e.device.type, enabled=False):
        hidden, c, bias = in_float32(hidden, c, bias)
        logprob = linear_logprob(hidden, c, y, bias=bias, softcap=softcap, ignore_index=ignore_index)
        lse = target_logit(hidden, c, y, bias, softcap, ignore_index) - logprob
    return _reduce(logprob, targets, ignore_index, reduction), lse.view(targets.shape)


def _reduce(logprob, targets, ignore_index, reduction):
    if reduction == "none":
        return -logprob.view(targets.shape)
    loss = -logprob.sum()
    return loss / (targets != ignore_index).sum() if reduction == "mean" else loss


def _check(e, c, targets, bias, reduction, shift, impl, vocab_parallel_options):
    if bias is not None and not isinstance(bias, Tensor):
        raise ValueError(
            f"[{OP}] bias: expected a tensor or None, got {bias!r}. Older releases of cut-cross-entropy have "
            "ignore_index in this place: pass it by name."
        )
    if targets.shape != e.shape[:-1]:
        raise ValueError(f"[{OP}] targets: expected shape {list(e.shape[:-1])}, got {list(targets.shape)}.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"[{OP}] reduction: expected 'mean', 'sum' or 'none', got {reduction!r}.")
    length = targets.shape[-1] if targets.ndim else 1
    if shift and not 0 <= shift < length:
        raise ValueError(f"[{OP}] shift: expected a number in [0, {length}), got {shift}.")
    name = impl.name.lower() if isinstance(impl, enum.Enum) else impl
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"[{OP}] impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {name!r}.")
    if vocab_parallel_options is not None:
        raise ValueError(
            f"[{OP}] vocab_parallel_options: expected None, got {type(vocab_parallel_options).__name__}. With a "
            "classifier in shards call fastpost.parallel.vocab_parallel_logprob."
        )
