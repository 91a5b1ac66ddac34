# SPDX-License-Identifier: Apache-2.0
"""policy_loss: a policy-gradient loss from hidden states. Kernel: cpp/ops/policy_loss.cpp.

Two differentiable ops in a row: linear_logprob makes one log-prob per token without storing the logits, then one call
of the core makes losses, their derivative for every token, and what one wants to log. Tokens that are clipped or have
advantage 0 get a gradient of exactly 0, which linear_logprob's backward then leaves out of its GEMMs.
"""

from __future__ import annotations

import torch

from fastpost import _core, objectives
from fastpost.ops._register import USE_REFERENCE, expect_plain, register, scalar
from fastpost.ops.linear_logprob import linear_logprob
from fastpost.reference import policy_loss as reference
from fastpost.reference.policy_loss import PolicyOutput


def policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    objective: objectives.GRPO,
    *,
    advantage: torch.Tensor,
    old_logprob: torch.Tensor | None = None,
    reference_logprob: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
) -> PolicyOutput:
    """Policy-gradient loss of packed replies, from the last hidden states and the output weight.

    `loss = Σ_s losses[s] / count`, losses and count as objectives.GRPO defines them.

    Args:
        hidden: [T, D] float32, bfloat16 or float16: all sequences one after the other, no padding.
        weight: [V, D], dtype and device of `hidden`.
        target: [T] int64, already shifted: the token that hidden[t] predicts, or `ignore_index` = not scored.
        cu_seqlens: [S + 1] int32, ascending from 0 to T: sequence i holds tokens cu_seqlens[i] to cu_seqlens[i + 1].
        objective: objectives.GRPO(...). A subclass of it is evaluated in plain torch.
        advantage: [S] float32, one per sequence, or [T], one per token (if S = T: one per sequence). No gradient.
            objectives.group_advantage and leave_one_out_advantage make them from rewards.
        old_logprob: [T] float32, log-probs of the targets under the policy that wrote them, at the same temperature.
            None: on-policy, every ratio is 1. No gradient.
        reference_logprob: [T] float32, the same under the reference of the KL penalty; needed with beta > 0, otherwise
            only for the logged kl. No gradient.
        num_items: a number or a one-element tensor that replaces what the loss divides by (this call's scored tokens or
            sequences): that of all micro-batches and ranks of a step, so that their losses add up.
        bias, low_rank, temperature, softcap, ignore_index, memory_budget: see linear_logprob.

    Returns:
        PolicyOutput(loss [], losses [S], logprob [T], length [S] int32, kl [], clip_low [], clip_high [], ratio []),
        float32. loss, losses and logprob are differentiable in hidden, weight, bias and low_rank.

    Raises:
        ValueError: wrong dtype, shape, device or layout, beta > 0 without reference_logprob; on CPU also targets
            outside [0, V) and cu_seqlens that do not ascend from 0 to T.
    """
    if USE_REFERENCE:
        return reference.policy_loss(hidden, weight, target, cu_seqlens, objective, advantage=advantage,
                                     old_logprob=old_logprob, reference_logprob=reference_logprob, num_items=num_items,
                                     bias=bias, low_rank=low_rank, temperature=temperature, softcap=softcap,
                                     ignore_index=ignore_index)  # fmt: skip
    logprob = linear_logprob(hidden, weight, target, bias=bias, low_rank=low_rank, temperature=temperature,
                             softcap=softcap, ignore_index=ignore_index, memory_budget=memory_budget)  # fmt: skip
    return policy_loss_from_logprob(logprob, target, cu_seqlens, objective, advantage=advantage,
                                    old_logprob=old_logprob, reference_logprob=reference_logprob, num_items=num_items,
                                    ignore_index=ignore_index)  # fmt: skip


def policy_loss_from_logprob(
    logprob: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    objective: objectives.GRPO,
    *,
    advantage: torch.Tensor,
    old_logprob: torch.Tensor | None = None,
    reference_logprob: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
    ignore_index: int = -100,
) -> PolicyOutput:
    """The second half of policy_loss, for log-probs of tokens that exist already.

    logprob [T] float32 (on CPU also float64, then advantage and the like too); everything else, the result and the
    errors are as in policy_loss.
    """
    columns = {"advantage": advantage, "old_logprob": old_logprob, "reference_logprob": reference_logprob}
    if USE_REFERENCE:
        return reference.policy_loss_from_logprob(logprob, target, cu_seqlens, objective, **columns,
                                                  num_items=num_items, ignore_index=ignore_index)  # fmt: skip
    expect_plain("policy_loss", logprob=logprob, target=target, cu_seqlens=cu_seqlens, **columns)
    if not isinstance(objective, objectives.GRPO):
        raise ValueError(
            f"[policy_loss] objective: expected objectives.GRPO, got {type(objective).__name__}. Objectives of whole "
            "sequences belong to preference_loss."
        )
    core = objective.core()
    if core is None:
        return reference.policy_loss_from_logprob(logprob, target, cu_seqlens, objective, **columns,
                                                  num_items=num_items, ignore_index=ignore_index)  # fmt: skip
    num_items = scalar("policy_loss", "num_items", num_items, logprob)
    columns = [None if x is None else x.detach() for x in columns.values()]
    loss, losses, length, _, _, metrics, _ = _forward_op(
        logprob, target, cu_seqlens, ignore_index, *core, *columns, num_items
    )
    return PolicyOutput(loss, losses, logprob, length, *metrics.unbind())


def _forward(logprob, target, cu_seqlens, ignore_index, kind, level, params, advantage, old_logprob, reference_logprob,
             num_items):  # fmt: skip
    outputs = _forward_fake(logprob, target, cu_seqlens)
    _core.policy_loss(logprob, target, cu_seqlens, ignore_index, kind, level, params, advantage, old_logprob,
                      reference_logprob, num_items, *outputs)  # fmt: skip
    return outputs


def _forward_fake(logprob, target, cu_seqlens, *_):
    """loss, losses, length, derivative, count, metrics, workspace."""
    s, new = max(cu_seqlens.numel() - 1, 0), logprob.new_empty
    return (new(()), new(s), new(s, dtype=torch.int32), new(logprob.shape[0]), new(()), new(4),
            new((s, 7), dtype=torch.float64))  # fmt: skip


def _backward(cu_seqlens, derivative, count, grad_loss, grad_losses):
    grad_logprob = torch.empty_like(derivative)
    _core.policy_loss_backward(cu_seqlens, derivative, count, grad_loss, grad_losses, grad_logprob)
    return grad_logprob


def _backward_fake(cu_seqlens, derivative, *_):
    return torch.empty_like(derivative)


def _setup_context(ctx, inputs, output):
    _, _, length, derivative, count, metrics, sums = output
    ctx.mark_non_differentiable(length, derivative, count, metrics, sums)
    ctx.set_materialize_grads(False)  # None for outputs that nobody used
    ctx.save_for_backward(inputs[2], derivative, count)


def _autograd(ctx, grad_loss, grad_losses, *_):
    cu_seqlens, derivative, count = ctx.saved_tensors
    grads = [g if g is None else g.to(derivative.dtype).contiguous() for g in (grad_loss, grad_losses)]
    return _backward_op(cu_seqlens, derivative, count, *grads), *[None] * 10


_backward_op = register(
    "policy_loss_backward(Tensor cu_seqlens, Tensor derivative, Tensor count, Tensor? grad_loss, Tensor? grad_losses) "
    "-> Tensor",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "policy_loss(Tensor logprob, Tensor target, Tensor cu_seqlens, int ignore_index, int kind, int level, "
    "float[] params, Tensor advantage, Tensor? old_logprob, Tensor? reference_logprob, Tensor? num_items) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _autograd,
    _setup_context,
)
