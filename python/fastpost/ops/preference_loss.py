# SPDX-License-Identifier: Apache-2.0
"""preference_loss: a preference objective from hidden states. Kernel: cpp/ops/preference_loss.cpp.

Two differentiable ops in a row: linear_logprob makes one log-prob per token without storing the logits, then one call
of the core sums them per sequence and evaluates the objective together with its derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastpost import _core, objectives
from fastpost.ops import _one_pass
from fastpost.ops._register import USE_REFERENCE, expect_plain, register, scalar
from fastpost.ops._schedule import Schedule, schedule
from fastpost.ops.linear_logprob import autocast, check, expect_budget, linear_logprob
from fastpost.reference import preference_loss as reference
from fastpost.reference.preference_loss import PreferenceOutput


def preference_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    objective: objectives.Objective | Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    reference_logprob: torch.Tensor | None = None,
    previous_logprob: torch.Tensor | None = None,
    reward: torch.Tensor | None = None,
    kl: torch.Tensor | float | None = None,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    return_schedule: bool = False,
) -> PreferenceOutput | tuple[PreferenceOutput, Schedule]:
    """Loss of packed sequences under an objective, from the last hidden states and the output weight.

    For pair objectives sequences 2i and 2i + 1 are the chosen and the rejected reply of pair i. Log-probs of sequences
    are sums over their scored tokens, here and in `reference_logprob` and `previous_logprob`.

    Args:
        hidden: [T, D] float32, bfloat16 or float16: all sequences one after the other, no padding.
        weight: [V, D], dtype and device of `hidden`.
        target: [T] int64, already shifted: the token that hidden[t] predicts, or `ignore_index` = not scored.
        cu_seqlens: [S + 1] int32, ascending from 0 to T: sequence i holds tokens cu_seqlens[i] to cu_seqlens[i + 1].
        objective: from fastpost.objectives, or any callable f(logprob [S], length [S]) -> losses of plain torch. The
            loss is then their mean and autograd does the rest; a subclass of Objective of your own works as well.
        reference_logprob, previous_logprob, reward: [S] float32, where the objective needs them. No gradient.
        kl: KTO's estimate or BCO's delta, a number or a one-element tensor. No gradient.
        bias, low_rank, temperature, softcap, ignore_index, memory_budget: see linear_logprob.
        return_schedule: return (output, Schedule), how it was computed and what it costs. A batch whose logits exceed
            the budget is computed in one pass over whole pairs, without making logits twice, where the budget holds a
            pair's logits and float32 sums for the weight; see ops/_one_pass.py.

    Returns:
        PreferenceOutput(loss [], losses [P], logprob [S], rewards [S], length [S] int32), float32; P counts pairs, or
        sequences for objectives without pairs. loss, losses and logprob are differentiable in hidden, weight, bias
        and low_rank.

    Raises:
        ValueError: wrong dtype, shape, device or layout, a missing column, an odd number of sequences for a pair
            objective; on CPU also targets outside [0, V), cu_seqlens that do not ascend from 0 to T, and a sequence
            without scored tokens under an objective that divides by their number. On CUDA looking at values would
            stop the host: there such a sequence has mean 0.
    """
    if USE_REFERENCE:
        return reference.preference_loss(hidden, weight, target, cu_seqlens, objective,
                                         reference_logprob=reference_logprob, previous_logprob=previous_logprob,
                                         reward=reward, kl=kl, bias=bias, low_rank=low_rank, temperature=temperature,
                                         softcap=softcap, ignore_index=ignore_index)  # fmt: skip
    out = None
    if low_rank is None and not softcap:
        out = _in_one_pass(hidden, weight, target, cu_seqlens, objective, reference_logprob, previous_logprob, reward,
                           kl, bias, temperature, ignore_index, memory_budget)  # fmt: skip
    if out is None:
        logprob = linear_logprob(hidden, weight, target, bias=bias, low_rank=low_rank, temperature=temperature,
                                 softcap=softcap, ignore_index=ignore_index,
                                 memory_budget=memory_budget)  # fmt: skip
        out = preference_loss_from_logprob(logprob, target, cu_seqlens, objective, reference_logprob=reference_logprob,
                                           previous_logprob=previous_logprob, reward=reward, kl=kl,
                                           ignore_index=ignore_index)  # fmt: skip
    if not return_schedule:
        return out
    return out, schedule_of(hidden, weight, target, cu_seqlens, objective, bias=bias, low_rank=low_rank,
                            softcap=softcap, ignore_index=ignore_index, memory_budget=memory_budget)  # fmt: skip


def schedule_of(hidden, weight, target, cu_seqlens, objective, *, bias=None, low_rank=None, softcap=None,
                ignore_index=-100, memory_budget=None) -> Schedule:  # fmt: skip
    """The schedule that preference_loss takes for these arguments; of `hidden` only shape, dtype and device count, and
    whether it requires a gradient."""
    hidden, weight = autocast(hidden, weight)
    core = objective.core() if isinstance(objective, objectives.Objective) else None
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    return schedule(
        hidden, weight, target, needs=wanted[:2], frozen=wanted == [True, False, False] and low_rank is None,
        budget=expect_budget("linear_logprob", memory_budget, hidden), a=None if low_rank is None else low_rank[0],
        ignore_index=ignore_index, keeps=not softcap, cu_seqlens=None if core is None else cu_seqlens,
        paired=core is not None and _one_pass.is_paired(core[0]),
    )  # fmt: skip


def preference_loss_from_logprob(
    logprob: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    objective: objectives.Objective | Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    reference_logprob: torch.Tensor | None = None,
    previous_logprob: torch.Tensor | None = None,
    reward: torch.Tensor | None = None,
    kl: torch.Tensor | float | None = None,
    ignore_index: int = -100,
) -> PreferenceOutput:
    """The second half of preference_loss, for log-probs of tokens that exist already.

    logprob [T] float32 (on CPU also float64, then reference_logprob and the like too); everything else, the result and
    the errors are as in preference_loss.
    """
    if USE_REFERENCE:
        return reference.preference_loss_from_logprob(logprob, target, cu_seqlens, objective,
                                                      reference_logprob=reference_logprob,
                                                      previous_logprob=previous_logprob, reward=reward, kl=kl,
                                                      ignore_index=ignore_index)  # fmt: skip
    columns = {"reference_logprob": reference_logprob, "previous_logprob": previous_logprob, "reward": reward}
    expect_plain("preference_loss", logprob=logprob, target=target, cu_seqlens=cu_seqlens, **columns)
    core = objective.core() if isinstance(objective, objectives.Objective) else None
    if core is None:  # nothing compiled knows this objective: sums from the core (as for SFT), the rest by autograd
        kind, params = objectives.SFT().core()
        _, _, sums, length, _, _ = _forward_op(logprob, target, cu_seqlens, ignore_index, kind, params, *[None] * 4)
        return reference.evaluate(objective, sums, length, **columns, kl=kl)
    kl = scalar("preference_loss", "kl", kl, logprob)
    kind, params = core
    loss, losses, sums, length, rewards, _ = _forward_op(
        logprob, target, cu_seqlens, ignore_index, kind, params, reference_logprob, previous_logprob, reward, kl
    )
    return PreferenceOutput(loss, losses, sums, rewards, length)


def _in_one_pass(hidden, weight, target, cu_seqlens, objective, reference_logprob, previous_logprob, reward, kl, bias,
                 temperature, ignore_index, memory_budget):  # fmt: skip
    """The output by the one-pass schedule, or None where it is not the one to take."""
    core = objective.core() if isinstance(objective, objectives.Objective) else None
    if core is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    columns = {"reference_logprob": reference_logprob, "previous_logprob": previous_logprob, "reward": reward}
    expect_plain("preference_loss", hidden=hidden, weight=weight, target=target, cu_seqlens=cu_seqlens, bias=bias,
                 **columns)  # fmt: skip
    budget = expect_budget("linear_logprob", memory_budget, hidden)
    hidden, weight, bias = autocast(hidden, weight, bias)
    needs = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if not any(needs) or not _one_pass.too_many_rows(hidden, weight, target, budget):
        return None
    # Every argument is judged before the batch is cut, by the checks of the two ops that this stands for.
    check(hidden, weight, target, bias, None, None, temperature, 0.0, ignore_index)
    zeros = torch.zeros(len(target), device=hidden.device)
    kl = scalar("preference_loss", "kl", kl, zeros)
    _forward(zeros, target, cu_seqlens, ignore_index, *core, *columns.values(), kl)
    paired, tokens = _one_pass.is_paired(core[0]), objective.unit == "token"
    cuts = _one_pass.pieces(hidden, weight, target, cu_seqlens, paired, ignore_index, budget, needs[1])
    if cuts is None:
        return None
    loss, losses, sums, length, rewards, *_ = _one_pass.one_pass(
        hidden, weight, target, cu_seqlens, bias, *columns.values(), kl, *core, temperature, ignore_index, budget,
        tokens, needs, cuts,
    )  # fmt: skip
    return PreferenceOutput(loss, losses, sums, rewards, length)


def _forward(logprob, target, cu_seqlens, ignore_index, kind, params, reference_logprob, previous_logprob, reward, kl):
    outputs = _forward_fake(logprob, target, cu_seqlens, ignore_index, kind)
    _core.preference_loss(logprob, target, cu_seqlens, ignore_index, kind, params, reference_logprob, previous_logprob,
                          reward, kl, *outputs)  # fmt: skip
    return outputs


def _forward_fake(logprob, target, cu_seqlens, ignore_index, kind, *_):
    s = max(cu_seqlens.numel() - 1, 0)
    groups = s // 2 if _one_pass.is_paired(kind) else s
    new = logprob.new_empty
    return new(()), new(groups), new(s), new(s, dtype=torch.int32), new(s), new(s)


def _backward(target, cu_seqlens, ignore_index, kind, length, derivative, grad_loss, grad_losses, grad_sums):
    grad_logprob = _backward_fake(target, cu_seqlens, ignore_index, kind, length, derivative)
    _core.preference_loss_backward(target, cu_seqlens, ignore_index, kind, length, derivative, grad_loss, grad_losses,
                                   grad_sums, grad_logprob)  # fmt: skip
    return grad_logprob


def _backward_fake(target, cu_seqlens, ignore_index, kind, length, derivative, *_):
    return derivative.new_empty(target.shape[0])


def _setup_context(ctx, inputs, output):
    _, target, cu_seqlens, ctx.ignore_index, ctx.kind, *_ = inputs
    _, _, _, length, rewards, derivative = output
    ctx.mark_non_differentiable(length, rewards, derivative)
    ctx.set_materialize_grads(False)  # None for outputs that nobody used
    ctx.save_for_backward(target, cu_seqlens, length, derivative)


def _autograd(ctx, grad_loss, grad_losses, grad_sums, *_):
    target, cu_seqlens, length, derivative = ctx.saved_tensors
    grads = [g if g is None else g.to(derivative.dtype).contiguous() for g in (grad_loss, grad_losses, grad_sums)]
    grad_logprob = _backward_op(target, cu_seqlens, ctx.ignore_index, ctx.kind, length, derivative, *grads)
    return grad_logprob, *[None] * 9


_backward_op = register(
    "preference_loss_backward(Tensor target, Tensor cu_seqlens, int ignore_index, int kind, Tensor length, "
    "Tensor derivative, Tensor? grad_loss, Tensor? grad_losses, Tensor? grad_sums) -> Tensor",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "preference_loss(Tensor logprob, Tensor target, Tensor cu_seqlens, int ignore_index, int kind, float[] params, "
    "Tensor? reference_logprob, Tensor? previous_logprob, Tensor? reward, Tensor? kl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _autograd,
    _setup_context,
)
