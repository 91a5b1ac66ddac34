# SPDX-License-Identifier: Apache-2.0
"""token_logprob: log-probabilities of targets from logits that exist. Kernel: cpp/ops/token_logprob.cpp."""

from __future__ import annotations

import torch

from fastpost import _core
from fastpost.ops._register import USE_REFERENCE, contiguous_float, expect_plain, register
from fastpost.reference import token_logprob as reference


def token_logprob(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target under softmax(logits): ``log p(t) = z_t - log Σ_j exp z_j``.

    One pass over the logits in float32 arithmetic, no [N, V] float32 copy; the backward writes the gradient of the
    logits in their own dtype.

    Args:
        logits: [N, V] float32, bfloat16 or float16; last dimension of stride 1.
        target: [N] int64 in [0, V), or `ignore_index`.
        temperature: divides the logits (after the softcap).
        softcap: c > 0 replaces each logit x by c·tanh(x / c) first; None for none.
        ignore_index: rows with this target get 0 and no gradient.
        return_entropy: also return H = -Σ_j p_j log p_j per row.

    Returns:
        log-probabilities [N] float32, in nats, differentiable in `logits`; with `return_entropy` a pair
        (logprob [N], entropy [N]), both differentiable.

    Raises:
        ValueError: wrong dtype, shape, device or layout, or (on CPU) a target outside [0, V). On CUDA such a row
            gets NaN, because looking would stop the host.
    """
    if USE_REFERENCE:
        return reference.token_logprob(logits, target, temperature=temperature, softcap=softcap,
                                       ignore_index=ignore_index, return_entropy=return_entropy)  # fmt: skip
    expect_plain("token_logprob", logits=logits, target=target)
    logprob, _, entropy = _forward_op(logits, target, temperature, softcap or 0.0, ignore_index, return_entropy)
    return (logprob, entropy) if return_entropy else logprob


def _forward(logits, target, temperature, softcap, ignore_index, with_entropy):
    logprob, lse, entropy = _forward_fake(logits, target, temperature, softcap, ignore_index, with_entropy)
    _core.token_logprob(logits, target, temperature, softcap, ignore_index, logprob, lse,
                        entropy if with_entropy else None)  # fmt: skip
    return logprob, lse, entropy


def _forward_fake(logits, target, temperature, softcap, ignore_index, with_entropy):
    def rows(n):
        return torch.empty(n, dtype=torch.float32, device=logits.device)

    n = logits.shape[0]
    return rows(n), rows(n), rows(n if with_entropy else 0)


def _backward(logits, target, temperature, softcap, ignore_index, logprob, lse, entropy, grad_logprob, grad_entropy):
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _core.token_logprob_backward(logits, target, temperature, softcap, ignore_index, logprob, lse, entropy,
                                 grad_logprob, grad_entropy, grad_logits)  # fmt: skip
    return grad_logits


def _backward_fake(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    logits, target, ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.with_entropy = inputs
    logprob, lse, entropy = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(logits, target, logprob, lse, entropy)


def _autograd(ctx, grad_logprob, _grad_lse, grad_entropy):
    logits, target, logprob, lse, entropy = ctx.saved_tensors
    grad_logits = _backward_op(
        logits, target, ctx.temperature, ctx.softcap, ctx.ignore_index, logprob, lse,
        entropy if ctx.with_entropy else None, contiguous_float(grad_logprob),
        contiguous_float(grad_entropy) if ctx.with_entropy else None,
    )  # fmt: skip
    return grad_logits, None, None, None, None, None


_backward_op = register(
    "token_logprob_backward(Tensor logits, Tensor target, float temperature, float softcap, int ignore_index, "
    "Tensor logprob, Tensor lse, Tensor? entropy, Tensor grad_logprob, Tensor? grad_entropy) -> Tensor",
    _backward, _backward_fake,
)  # fmt: skip
_forward_op = register(
    "token_logprob(Tensor logits, Tensor target, float temperature, float softcap, int ignore_index, "
    "bool with_entropy) -> (Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _autograd, _setup_context,
)  # fmt: skip
