# SPDX-License-Identifier: Apache-2.0
"""vocab_parallel_logprob: each rank holds some rows of the output weight and folds its own slice of the vocabulary.

What a slice of the vocabulary says about a row is five numbers (see row_statistics), and those of several slices
combine exactly. So one all-gather of 5·N floats is all that the forward exchanges; the backward then runs on the slice
alone, as if the rest of the vocabulary were on the same machine, and sums the gradient of hidden over ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastpost.ops._register import expect_plain
from fastpost.ops._tiles import (
    Backward,
    compute_dtype,
    forward_plan,
    kernels,
    row_statistics,
    scored_rows,
    sum_dtype,
)
from fastpost.ops.linear_logprob import autocast, check, expect_budget, low_rank_pair
from fastpost.reference.linear_logprob import combine

OP = "vocab_parallel_logprob"
NOT_SCORED = -1  # target of an ignored row, once targets count from this rank's first vocabulary entry


def vocab_parallel_logprob(
    hidden: torch.Tensor,
    weight_shard: torch.Tensor,
    target: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    hidden_sharded: bool = False,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    memory_budget: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """fastpost.linear_logprob with the weight's rows, so the vocabulary, cut over the ranks of `group`.

    Every rank of the group must call it, with the same options. The result is that of the whole weight: same bits from
    run to run, and on every rank where ranks see the same rows. Once differentiable.

    hidden_sharded=False (tensor parallelism): hidden, target and the incoming gradients are the same on every rank, and
    so are the results. Gradients: hidden's is summed over ranks (in its dtype), each shard's is its own.

    hidden_sharded=True (data parallelism): each rank brings its own rows, as many as it likes, and gets their results.
    Scored rows of hidden are gathered (world · N · D numbers, besides `memory_budget`) and their gradient is
    reduce-scattered; the weight never moves. A shard's gradient is that of the sum of all ranks' losses.

    Args:
        hidden: [N, D] float32, bfloat16, float16 (or float64, see linear_logprob).
        weight_shard: [V_rank, D]: rows vocab_start to vocab_start + V_rank of the weight; may be uneven or empty.
        target: [N] int64 in [0, V), or `ignore_index`; counts in the whole vocabulary.
        group: None for the default group.
        vocab_start: this rank's first row. None: shards follow each other in the order of ranks; finding their sizes
            costs one small collective and, on a GPU, one wait.
        bias: [V_rank], the shard's.
        low_rank: (a [N, r], b [V_rank, r]): a belongs to hidden, b to the shard.
        temperature, softcap, ignore_index, return_entropy, memory_budget: see linear_logprob.

    Returns:
        log-probabilities [N] float32, or with `return_entropy` (logprob, entropy), of this rank's `hidden`.

    Raises:
        ValueError: as linear_logprob; a target outside [0, V) is refused on CPU when vocab_start is None, and has
            log-prob NaN otherwise.
    """
    a, b = low_rank_pair(OP, low_rank)
    expect_plain(OP, hidden=hidden, weight_shard=weight_shard, target=target, bias=bias, a=a, b=b)
    memory_budget = expect_budget(OP, memory_budget, hidden)
    hidden, weight_shard, bias, a, b = autocast(hidden, weight_shard, bias, a, b)
    if vocab_start is None:
        sizes = all_gather(torch.tensor([len(weight_shard)], device=hidden.device), group).tolist()
        vocab_start = sum(sizes[: dist.get_rank(group)])
        if target.device.type == "cpu":
            _expect_targets(target, sum(sizes), ignore_index)
    local = target - vocab_start
    elsewhere = (local < 0) | (local >= len(weight_shard))
    local = local.masked_fill(elsewhere, len(weight_shard)).masked_fill(target == ignore_index, NOT_SCORED)
    # The core knows one vocabulary: for its checks, targets on other ranks are not scored.
    check(hidden, weight_shard, local.masked_fill(elsewhere, NOT_SCORED), bias, a, b, temperature, softcap or 0.0,
          NOT_SCORED)  # fmt: skip
    options = Options(group, temperature, softcap or 0.0, return_entropy, memory_budget, torch.is_grad_enabled())
    if hidden_sharded:
        outputs = _of_own_rows(hidden, weight_shard, target, bias, a, b, ignore_index, vocab_start, options)
    else:
        outputs = _VocabParallel.apply(hidden, weight_shard, bias, a, b, local, options, True)
    return outputs if return_entropy else outputs[0]


class Options(NamedTuple):
    group: dist.ProcessGroup | None
    temperature: float
    softcap: float
    with_entropy: bool
    memory_budget: int
    grad_enabled: bool  # an autograd.Function runs with it off


def all_gather(t: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[n, ...] of each rank -> [world · n, ...], in the order of ranks."""
    out = t.new_empty(dist.get_world_size(group) * len(t), *t.shape[1:])
    dist.all_gather_into_tensor(out, t.contiguous(), group=group)
    return out


class _VocabParallel(torch.autograd.Function):
    """(logprob [N], entropy [N] or [0]) of rows that all ranks share."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, a, b, target, options, sum_hidden):
        group, temperature, softcap, with_entropy, budget, grad_enabled = options
        rows = scored_rows(target != NOT_SCORED)
        n = len(target) if rows is None else len(rows)
        p = forward_plan(n, hidden, weight, a, budget)
        keep = grad_enabled and any(ctx.needs_input_grad)
        kept = torch.empty(p.kept if keep else 0, len(weight), dtype=compute_dtype(hidden), device=hidden.device)
        exact = sum_dtype(hidden.dtype)
        stats = torch.empty(5, n, dtype=exact, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for begin, end, part in row_statistics(
                hidden, weight, target, bias, a, b, temperature, softcap, with_entropy, rows, p, kept
            ):
                stats[:, begin:end] = part
        stats = combine(all_gather(stats[None], group))
        found = [torch.empty(n, dtype=exact, device=hidden.device) for _ in range(3 if with_entropy else 2)]
        if n:
            kernels(hidden).linear_logprob_finish(stats, *found[:2], found[2] if with_entropy else None)
        if rows is not None:
            found = [t.new_zeros(len(target)).index_copy_(0, rows, t) for t in found]
        logprob, lse, entropy = found if with_entropy else (*found, stats.new_empty(0))
        ctx.save_for_backward(hidden, weight, bias, a, b, target, logprob, lse, entropy, kept)
        ctx.options, ctx.sum_hidden = options, sum_hidden
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, bias, a, b, target, logprob, lse, entropy, kept = ctx.saved_tensors
        group, temperature, softcap, with_entropy, budget, _ = ctx.options
        grad_logprob = grad_logprob.contiguous()
        grad_entropy = grad_entropy.contiguous() if with_entropy else None
        scored = target != NOT_SCORED
        active = scored & ((grad_logprob != 0) if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0))
        with torch.autocast(hidden.device.type, enabled=False):
            grads = Backward(
                hidden, weight, target, bias, a, b, temperature, softcap, scored, active, budget, logprob, lse,
                entropy if with_entropy else None, kept, grad_logprob, grad_entropy, list(ctx.needs_input_grad[:5]),
            ).run()  # fmt: skip
        if ctx.sum_hidden:
            for grad, needed in ((grads[0], ctx.needs_input_grad[0]), (grads[3], ctx.needs_input_grad[3])):
                if needed:
                    dist.all_reduce(grad, group=group)
        return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad)), None, None, None


# ---- rows that are each rank's own -----------------------------------------------------------------------------------


class _GatherRows(torch.autograd.Function):
    """[n, D] of each rank -> [world · n, D]; backward: the sum over ranks of each rank's part."""

    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return all_gather(t, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        own = grad.new_empty(len(grad) // dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


class _OwnRows(torch.autograd.Function):
    """[world · n] -> this rank's [n]; backward: everyone's gradients, which each rank needs for its shard."""

    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return t.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone() if len(t) else t.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return all_gather(grad, ctx.group), None


def _of_own_rows(hidden, weight, target, bias, a, b, ignore_index, vocab_start, options):
    group, rows = options.group, (target != ignore_index).nonzero()[:, 0]
    n = len(rows)
    most = int(all_gather(torch.tensor([n], device=hidden.device), group).max())

    def gather(t):
        return None if t is None else _GatherRows.apply(F.pad(t[rows], (0, 0, 0, most - n)), group)

    y = all_gather(F.pad(target[rows], (0, most - n), value=ignore_index), group)
    local = y - vocab_start
    local = local.masked_fill((local < 0) | (local >= len(weight)), len(weight)).masked_fill(
        y == ignore_index, NOT_SCORED
    )
    outputs = _VocabParallel.apply(gather(hidden), weight, bias, gather(a), b, local, options, False)

    def own(t):
        return t.new_zeros(len(target)).index_copy(0, rows, _OwnRows.apply(t, group)[:n])

    return own(outputs[0]), own(outputs[1]) if options.with_entropy else None


def _expect_targets(target, v, ignore_index):
    bad = ((target < 0) | (target >= v)) & (target != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"[{OP}] target: expected indices in [0, {v}) or ignore_index {ignore_index}, got {int(target[row])} at "
            f"row {row}. Targets count in the whole vocabulary, not in the shard."
        )
