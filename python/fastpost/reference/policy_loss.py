# SPDX-License-Identifier: Apache-2.0
"""policy_loss in plain torch; works in any float dtype, so float64 input gives the truth."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from fastpost import objectives
from fastpost.reference.linear_logprob import linear_logprob


class PolicyOutput(NamedTuple):
    """What policy_loss returns. S: sequences, T: tokens. The first three are differentiable, the rest is for logs."""

    loss: torch.Tensor  # [] losses.sum() / (sequences or tokens, as the objective says, or num_items); 0 if none
    losses: torch.Tensor  # [S]
    logprob: torch.Tensor  # [T] of each token, in nats; 0 where not scored
    length: torch.Tensor  # [S] int32, scored tokens
    kl: torch.Tensor  # [] mean of k3 over scored tokens; 0 without reference_logprob
    clip_low: torch.Tensor  # [] share of tokens (or sequences, which level says) with ratio < 1 - epsilon_low and A < 0
    clip_high: torch.Tensor  # [] the same for ratio > 1 + epsilon_high and A > 0; cispo: ratio > epsilon_high and A > 0
    ratio: torch.Tensor  # [] mean ratio over tokens (or sequences)


def policy_loss(hidden, weight, target, cu_seqlens, objective, *, advantage, old_logprob=None, reference_logprob=None,
                num_items=None, bias=None, low_rank=None, temperature=1.0, softcap=None, ignore_index=-100,
                memory_budget=None):  # fmt: skip
    """Same signature and meaning as :func:`fastpost.policy_loss`; stores the logits."""
    logprob = linear_logprob(hidden, weight, target, bias=bias, low_rank=low_rank, temperature=temperature,
                             softcap=softcap, ignore_index=ignore_index)  # fmt: skip
    return policy_loss_from_logprob(logprob, target, cu_seqlens, objective, advantage=advantage,
                                    old_logprob=old_logprob, reference_logprob=reference_logprob, num_items=num_items,
                                    ignore_index=ignore_index)  # fmt: skip


def policy_loss_from_logprob(logprob, target, cu_seqlens, objective, *, advantage, old_logprob=None,
                             reference_logprob=None, num_items=None, ignore_index=-100):  # fmt: skip
    """Same signature and meaning as the op's function: logprob [T] is that of each token."""
    s, scored = len(cu_seqlens) - 1, target != ignore_index
    sequence = torch.repeat_interleave(cu_seqlens.diff().long())[scored]
    length = torch.bincount(sequence, minlength=s).int()
    x = logprob[scored]
    a = advantage[sequence] if len(advantage) == s else advantage[scored]
    old, reference = (None if t is None else t[scored] for t in (old_logprob, reference_logprob))
    losses = objective(x, sequence, length, a, old, reference)
    count = torch.as_tensor(objective.count(length) if num_items is None else num_items, device=x.device).clamp(min=1)
    metrics = _metrics(objective, x.detach(), sequence, length, a, old, reference)
    return PolicyOutput(losses.sum() / count.to(losses.dtype), losses, logprob, length, *metrics)


def _metrics(objective, logprob, sequence, length, advantage, old, reference):
    """kl, clip_low, clip_high, ratio."""
    kl = logprob.new_zeros(()) if reference is None else objective.kl(logprob, reference).sum() / max(len(logprob), 1)
    ratio = objective.ratio(logprob, sequence, length, old)
    capped = ratio if objective.delta is None else ratio.clamp(max=objective.delta)
    if objective.loss_type == "cispo":
        clipped = torch.zeros_like(ratio), (ratio > objective.epsilon_high) & (advantage > 0)
    else:
        low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
        clipped = (capped < low) & (advantage < 0), (capped > high) & (advantage > 0)
    values = [x.to(ratio.dtype) for x in (*clipped, ratio)]
    if objective.level == "token":
        return kl, *(x.sum() / max(len(x), 1) for x in values)
    sums = [ratio.new_zeros(len(length)).index_add(0, sequence, x) / length.clamp(min=1) for x in values]
    sums[2] = torch.where(length > 0, sums[2], 1)  # of an empty sequence, as exp(0)
    return kl, *(x.sum() / max(len(x), 1) for x in sums)


@dataclass(frozen=True)
class Case:
    """Packed replies with advantages; `inputs` draws the tensors."""

    name: str
    objective: objectives.GRPO
    lengths: tuple[int, ...]  # tokens of each sequence, prompt included
    d: int = 16
    v: int = 101
    scored: float = 0.6  # share of tokens that are scored, at the end of each sequence
    drift: float = 0.4  # of old log-probs: some ratios leave the clip range, none is near its ends
    on_policy: bool = False
    per_token: bool = False  # advantages
    zeros: float = 0.3  # share of advantages that are 0
    options: dict = field(default_factory=dict)

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        """(hidden, weight, target, cu_seqlens) and the keyword arguments."""
        g = torch.Generator().manual_seed(seed)
        t, s = sum(self.lengths), len(self.lengths)
        hidden = torch.randn(t, self.d, generator=g) / self.d**0.5
        weight = torch.randn(self.v, self.d, generator=g)
        target = torch.randint(0, self.v, (t,), generator=g)
        cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).int()
        for begin, n in zip(cu_seqlens.tolist(), self.lengths):
            target[begin : begin + n - round(n * self.scored)] = self.options.get("ignore_index", -100)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        logprob = linear_logprob(hidden.to(dtype), weight.to(dtype), target)
        n = t if self.per_token else s
        advantage = torch.randn(n, generator=g) * (torch.rand(n, generator=g) >= self.zeros)
        columns = {"advantage": advantage}
        columns["reference_logprob"] = logprob + 0.5 * torch.randn(t, generator=g)
        if not self.on_policy:
            steps = torch.tensor([-1.25, -0.25, 0.25, 1.25])[torch.randint(0, 4, (t,), generator=g)]
            columns["old_logprob"] = logprob + self.drift * steps
        kwargs = {name: x.to(real).to(device) for name, x in columns.items()} | self.options
        tensors = hidden.to(dtype), weight.to(dtype), target, cu_seqlens
        return tuple(x.to(device) for x in tensors), kwargs


def cases() -> list[Case]:
    o, mixed = objectives.GRPO, (7, 3, 12, 5, 1, 9, 30, 4)
    kinds = {"grpo": {}, "dr_grpo": {"max_completion_length": 64}, "dapo": {"epsilon_high": 0.28},
             "bnpo": {"delta": 1.5}, "cispo": {"epsilon_high": 1.2}}  # fmt: skip
    every = [(f"{k}-{level}", o(k, level=level, **kw)) for k, kw in kinds.items() for level in objectives.LEVELS]
    return [
        *(Case(name, objective, mixed) for name, objective in every),
        *(Case(f"{name}-kl", replace(objective, beta=0.1), mixed) for name, objective in every[::2]),
        *(Case(f"{name}-on-policy", objective, mixed, on_policy=True) for name, objective in every[::3]),
        *(Case(f"{name}-per-token", objective, mixed, per_token=True) for name, objective in every),
        Case("no-sequences", o(), ()),
        Case("nothing-scored", o("grpo", beta=0.1), (4, 6), scored=0.0),
        Case("empty-segments", o("grpo", level="sequence"), (0, 6, 5, 0)),
        Case("all-zero", o("grpo"), mixed, zeros=1.0),
        Case("num-items", o("dapo"), mixed, options={"num_items": 1000}),
        Case("options", o("dapo"), mixed, options={"temperature": 0.7, "softcap": 20.0}),
        Case("long", o("grpo"), (700, 400, 300, 650), v=2001, d=32, options={"memory_budget": 1 << 20}),
    ]  # fmt: skip
