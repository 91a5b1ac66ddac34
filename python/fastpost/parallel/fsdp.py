# SPDX-License-Identifier: Apache-2.0
"""fsdp_head_logprob: the output head under fully_shard, moved or left where it is, whichever takes fewer bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Shard

from fastpost.ops._register import expect_plain
from fastpost.ops.linear_logprob import linear_logprob
from fastpost.parallel.vocab import all_gather, vocab_parallel_logprob

OP = "fsdp_head_logprob"


class Traffic(NamedTuple):
    """Bytes that a rank exchanges for the head in one step, each way."""

    gather_weight: int
    gather_hidden: int


def traffic(
    world: int, n: int, v: int, d: int, itemsize: int, *, weight_grad: bool = True, hidden_grad: bool = True
) -> Traffic:
    """For a weight [V, D] on `world` ranks with n scored rows each (of the rank that has most: the others are padded).

    Gathering the weight moves V·D numbers and as many for its gradient (reduce-scatter); gathering the hidden states
    of all ranks moves world·n·D and as many for theirs."""
    return Traffic(v * d * itemsize * (1 + weight_grad), world * n * d * itemsize * (1 + hidden_grad))


def fsdp_head_logprob(
    hidden: torch.Tensor,
    weight: DTensor,
    target: torch.Tensor,
    *,
    gather: str = "auto",
    gradient: str = "mean",
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    memory_budget: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """fastpost.linear_logprob of this rank's rows with a weight that FSDP2 (fully_shard) has cut over ranks.

    Two ways to the same numbers. Gathering the weight: each rank then holds all of it from forward to backward.
    Gathering the scored hidden states of all ranks (vocab_parallel_logprob): neither the weight nor its gradient ever
    exists whole. "auto" takes the way with less `traffic`; ranks agree on it by one number each. Few rows per rank and
    a large vocabulary speak for hidden (n < V / world where both are trained).

    Give the head a group of its own, fully_shard(model.lm_head) before fully_shard(model), and do not call it: then its
    weight is the sharded DTensor when this function sees it. Every rank must call this, and run backward through it.

    Args:
        hidden: [N, D], this rank's rows. The weight is cast to its dtype (mixed precision keeps float32 shards).
        weight: DTensor [V, D] sharded on dim 0 over a mesh of one dimension.
        target: [N] int64 in [0, V), or ignore_index.
        gather: "auto", "hidden" or "weight".
        gradient: "mean": the weight's gradient is that of the mean of all ranks' losses, as fully_shard makes it for
            every other parameter; "sum": of their sum.
        temperature, softcap, ignore_index, return_entropy, memory_budget: see linear_logprob.

    Returns:
        As linear_logprob, of this rank's rows; differentiable in hidden and weight, whose gradient is a DTensor.

    Raises:
        ValueError: weight is no DTensor, or sharded in another way; then as linear_logprob.
    """
    mesh = _expect_rows_sharded(weight)
    expect_plain(OP, hidden=hidden, target=target)
    _expect_one_of("gather", gather, ("auto", "hidden", "weight"))
    _expect_one_of("gradient", gradient, ("mean", "sum"))
    options = {"temperature": temperature, "softcap": softcap, "ignore_index": ignore_index,
               "return_entropy": return_entropy, "memory_budget": memory_budget}  # fmt: skip
    group, world, (v, d) = mesh.get_group(), mesh.size(), weight.shape
    if gather == "auto":
        n = int(all_gather((target != ignore_index).sum().reshape(1), group).max())
        bytes_of = traffic(
            world, n, v, d, hidden.itemsize, weight_grad=weight.requires_grad, hidden_grad=hidden.requires_grad
        )
        gather = "hidden" if bytes_of.gather_hidden < bytes_of.gather_weight else "weight"
    weight = weight.to(hidden.dtype)
    scale = 1.0 / world if gradient == "mean" else 1.0
    if gather == "weight":
        # Partial: each rank's gradient is its own part of a sum, which autograd then reduce-scatters.
        whole = _ScaleGradient.apply(weight.full_tensor(grad_placements=[Partial()]), scale)
        return linear_logprob(hidden, whole, target, **options)
    start = min(dist.get_rank(group) * -(-v // world), v)  # DTensor cuts as torch.chunk does
    shard = _ScaleGradient.apply(weight.to_local(), scale)
    return vocab_parallel_logprob(hidden, shard, target, group=group, vocab_start=start, hidden_sharded=True, **options)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, scale):
        ctx.scale = scale
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None


def _expect_rows_sharded(weight):
    if not isinstance(weight, DTensor):
        raise ValueError(
            f"[{OP}] weight: expected a DTensor, got {type(weight).__name__}. If fully_shard has gathered it (a head "
            "without a group of its own), pass it to fastpost.linear_logprob; FSDP then reduces its gradient."
        )
    if weight.device_mesh.ndim != 1 or weight.placements != (Shard(0),):
        raise ValueError(
            f"[{OP}] weight: expected Shard(0) over a mesh of one dimension, got {list(weight.placements)} over "
            f"{weight.device_mesh.ndim}. Shard the head by fully_shard over one dimension."
        )
    return weight.device_mesh


def _expect_one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"[{OP}] {name}: expected one of {', '.join(allowed)}, got {value!r}.")
