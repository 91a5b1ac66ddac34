# SPDX-License-Identifier: Apache-2.0
"""preference_loss in one pass over whole pairs: 6·N·V·D operations however many rows there are.

What forces logits to be made twice is only that a token's coefficient is unknown until its pair's log-probs are. So the
batch is cut at pairs; of each piece the logits are kept, its losses taken, and its gradients made at once, for the sum
of all losses. The backward then only multiplies by the incoming gradient, if that is the same for every loss (a mean or
a sum, as in training); for anything else, and for second derivatives, it runs the two ops that this replaces.
"""

from __future__ import annotations

import itertools

import torch

from fastpost import _core, objectives
from fastpost.ops import _passes
from fastpost.ops._register import register
from fastpost.ops._tiles import capturing


def is_paired(kind: int) -> bool:
    """Whether a compiled objective takes sequences two by two."""
    return objectives.ALL[objectives.KINDS[kind].partition("_")[0]].paired


def too_many_rows(hidden, weight, target, budget: int) -> bool:
    """Whether the logits of all rows would not be kept, judged by shapes alone."""
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (hidden, weight))
    if (
        not plain
        or hidden.dtype == torch.float64
        or hidden.ndim != 2
        or weight.ndim != 2
        or not len(weight)
        or capturing(target)
    ):
        return False
    n = target.numel()
    return _passes.kept_rows(n, hidden, weight, None, budget) < n


def pieces(hidden, weight, target, cu_seqlens, paired: bool, ignore_index: int, budget: int, sums: bool):
    """The sequences where pieces begin, and their number at the end; or None where this schedule does not pay: the
    logits of all scored rows fit the budget, those of one group do not, or the float32 sums of the weight gradient do
    not. The host waits for a GPU once."""
    groups = 2 if paired else 1
    scored = torch.nn.functional.pad((target != ignore_index).cumsum(0), (1, 0))
    ends = scored[cu_seqlens.long().clamp(0, len(target))][::groups].tolist()
    n, room = ends[-1], budget - (4 * weight.numel() if sums else 0)
    if not n or room <= 0 or _passes.kept_rows(n, hidden, weight, None, budget) >= n:
        return None
    most = _passes.most_kept(n, hidden, weight, None, room)
    if most < max(b - a for a, b in itertools.pairwise(ends)):
        return None
    cuts, begin = [0], 0
    for i in range(1, len(ends)):
        if ends[i] - ends[begin] > most:
            begin = i - 1
            cuts.append(begin)
    cuts.append(len(ends) - 1)
    return [groups * cut for cut in cuts]


def _forward(hidden, weight, target, cu_seqlens, bias, reference, previous, reward, kl, kind, params, temperature,
             ignore_index, budget, count_tokens, needs, cuts):  # fmt: skip
    paired = is_paired(kind)
    loss, losses, sums, length, rewards, grad_hidden, grad_weight, grad_bias = _forward_fake(
        hidden, weight, target, cu_seqlens, bias, reference, previous, reward, kl, kind, params, temperature,
        ignore_index, budget, count_tokens, needs, cuts,
    )  # fmt: skip
    new, exact = hidden.new_empty, torch.float32
    weight_sum = hidden.new_zeros(weight.shape, dtype=exact) if needs[1] else None
    bias_sum = hidden.new_zeros(len(weight) if needs[2] else 0, dtype=exact)
    room = budget - (4 * weight.numel() if needs[1] else 0)
    starts = cu_seqlens.tolist()
    for first, last in itertools.pairwise(cuts):
        tokens, sequences = slice(starts[first], starts[last]), slice(first, last)
        groups = slice(first // 2, last // 2) if paired else sequences
        tensors = (hidden[tokens], weight, target[tokens], bias, None, None, temperature, 0.0, ignore_index)
        logprob, lse, _, kept = _passes.forward(*tensors, False, room, True)
        y, cu = target[tokens], cu_seqlens[first : last + 1] - starts[first]
        columns = [None if t is None else t[sequences] for t in (reference, previous, reward)]
        derivative, own_loss = new(last - first, dtype=exact), new((), dtype=exact)
        _core.preference_loss(logprob, y, cu, ignore_index, kind, params, *columns, kl, own_loss, losses[groups],
                              sums[sequences], length[sequences], rewards[sequences], derivative)  # fmt: skip
        grad_logprob, ones = new(len(y), dtype=exact), hidden.new_ones(groups.stop - groups.start, dtype=exact)
        _core.preference_loss_backward(y, cu, ignore_index, kind, length[sequences], derivative, None, ones, None,
                                       grad_logprob)  # fmt: skip
        of_piece = _passes.backward(*tensors, room, logprob, lse, None, kept, grad_logprob, None,
                                    [*needs, False, False], weight_sum=weight_sum)  # fmt: skip
        if needs[0]:
            grad_hidden[tokens] = of_piece[0]
        if needs[2]:
            bias_sum += of_piece[2]
    torch.div(losses.sum(), float(_count(length, losses, count_tokens)), out=loss)
    if needs[1]:
        grad_weight.copy_(weight_sum)
    if needs[2]:
        grad_bias.copy_(bias_sum)
    return loss, losses, sums, length, rewards, grad_hidden, grad_weight, grad_bias


def _count(length, losses, count_tokens):
    """What the mean divides by, as the core does: scored tokens, or losses."""
    return max(int(length.sum()) if count_tokens else len(losses), 1)


def _forward_fake(hidden, weight, target, cu_seqlens, bias, reference, previous, reward, kl, kind, params, temperature,
                  ignore_index, budget, count_tokens, needs, cuts):  # fmt: skip
    s = cu_seqlens.numel() - 1
    paired = is_paired(kind)

    def new(*shape, dtype=torch.float32):
        return hidden.new_empty(shape, dtype=dtype)

    grads = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)
        for t, needed in zip((hidden, weight, bias), needs)
    )
    return new(), new(s // 2 if paired else s), new(s), new(s, dtype=torch.int32), new(s), *grads


def _setup_context(ctx, inputs, output):
    (*tensors, ctx.kind, ctx.params, ctx.temperature, ctx.ignore_index, ctx.budget, ctx.count_tokens, ctx.needs,
     _) = inputs  # fmt: skip
    _, losses, _, length, rewards, *grads = output
    ctx.mark_non_differentiable(length, rewards, *grads)
    ctx.set_materialize_grads(False)  # None for outputs that nobody used
    ctx.save_for_backward(*tensors, losses, length, *grads)


def _autograd(ctx, grad_loss, grad_losses, grad_sums, *_):
    *inputs, losses, length, grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
    factor = torch.zeros_like(losses) if grad_losses is None else grad_losses.clone()
    if grad_loss is not None:
        factor += grad_loss / _count(length, losses, ctx.count_tokens)
    found = grad_hidden, grad_weight, grad_bias
    if torch.is_grad_enabled() or grad_sums is not None or not bool((factor == factor[:1]).all()):
        found = _two_ops(ctx, inputs, grad_loss, grad_losses, grad_sums)
    elif factor[0] != 1:
        found = [g * factor[0].to(g.dtype) if needed else None for g, needed in zip(found, ctx.needs)]
    hidden, weight, bias = (g if needed else None for g, needed in zip(found, ctx.needs))
    return hidden, weight, None, None, bias, *[None] * 12


def _two_ops(ctx, inputs, *grads):
    """The gradient through linear_logprob and preference_loss_from_logprob, for what one factor cannot express."""
    from fastpost.ops.linear_logprob import linear_logprob
    from fastpost.ops.preference_loss import _forward_op

    hidden, weight, target, cu_seqlens, bias, reference, previous, reward, kl = inputs
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        logprob = linear_logprob(hidden, weight, target, bias=bias, temperature=ctx.temperature,
                                 ignore_index=ctx.ignore_index, memory_budget=ctx.budget)  # fmt: skip
        outputs = _forward_op(logprob, target, cu_seqlens, ctx.ignore_index, ctx.kind, ctx.params, reference, previous,
                              reward, kl)  # fmt: skip
    used = [(o, g) for o, g in zip(outputs, grads) if g is not None]
    wanted = [t for t, needed in zip((hidden, weight, bias), ctx.needs) if needed]
    outputs, upstream = zip(*used)
    found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=create_graph))
    return [next(found) if needed else None for needed in ctx.needs]


one_pass = register(
    "preference_loss_one_pass(Tensor hidden, Tensor weight, Tensor target, Tensor cu_seqlens, Tensor? bias, "
    "Tensor? reference, Tensor? previous, Tensor? reward, Tensor? kl, int kind, float[] params, float temperature, "
    "int ignore_index, int budget, bool count_tokens, bool[] needs, int[] cuts) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _autograd, _setup_context,
)  # fmt: skip
