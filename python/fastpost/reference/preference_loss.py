# SPDX-License-Identifier: Apache-2.0
"""preference_loss in plain torch; works in any float dtype, so float64 input gives the truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastpost import objectives
from fastpost.reference.linear_logprob import linear_logprob


class PreferenceOutput(NamedTuple):
    """What preference_loss returns. P: pairs, or sequences (TPO: triples) for objectives without. S: sequences.

    The first three are differentiable.
    """

    loss: torch.Tensor  # [] mean of `losses` over pairs, sequences or tokens, as the objective says; 0 if none
    losses: torch.Tensor  # [P]
    logprob: torch.Tensor  # [S] sum over scored tokens, in nats
    rewards: torch.Tensor  # [S] the objective's implied rewards; logprob where the objective is a plain callable
    length: torch.Tensor  # [S] int32, scored tokens


def preference_loss(hidden, weight, target, cu_seqlens, objective, *, reference_logprob=None, previous_logprob=None,
                    reward=None, kl=None, bias=None, low_rank=None, temperature=1.0, softcap=None,
                    ignore_index=-100, memory_budget=None):  # fmt: skip
    """Same signature and meaning as :func:`fastpost.preference_loss`; stores the logits."""
    logprob = linear_logprob(hidden, weight, target, bias=bias, low_rank=low_rank, temperature=temperature,
                             softcap=softcap, ignore_index=ignore_index)  # fmt: skip
    return preference_loss_from_logprob(logprob, target, cu_seqlens, objective, reference_logprob=reference_logprob,
                                        previous_logprob=previous_logprob, reward=reward, kl=kl,
                                        ignore_index=ignore_index)  # fmt: skip


def preference_loss_from_logprob(logprob, target, cu_seqlens, objective, *, reference_logprob=None,
                                 previous_logprob=None, reward=None, kl=None, ignore_index=-100):  # fmt: skip
    """Same signature and meaning as the op's function: logprob [T] is that of each token."""
    scored = target != ignore_index
    sequence = torch.repeat_interleave(cu_seqlens.diff().long())
    zeros = torch.zeros(len(cu_seqlens) - 1, dtype=logprob.dtype, device=logprob.device)
    sums = zeros.index_add(0, sequence, torch.where(scored, logprob, 0))
    length = zeros.int().index_add(0, sequence, scored.int())
    return evaluate(objective, sums, length, reference_logprob, previous_logprob, reward, kl)


def evaluate(objective, logprob, length, reference_logprob=None, previous_logprob=None, reward=None, kl=None):
    """An objective, or any callable f(logprob [S], length [S]) -> losses, on sequences: a PreferenceOutput."""
    if isinstance(objective, objectives.Objective):
        losses = objective(logprob, length, reference_logprob, previous_logprob, reward, kl)
        rewards = objective.rewards(logprob, length, reference_logprob, previous_logprob)
        count = objective.count(length)
    else:
        losses = objective(logprob, length)
        if not isinstance(losses, torch.Tensor):
            raise ValueError(
                "[preference_loss] objective: expected an Objective or a callable f(logprob [S], length [S]) that "
                f"returns a tensor of losses, got one that returns {type(losses).__name__}."
            )
        rewards, count = logprob.detach(), losses.numel()
    count = count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
    return PreferenceOutput(losses.sum() / count, losses, logprob, rewards, length)


@dataclass(frozen=True)
class Case:
    """Packed sequences with an objective; `inputs` draws the tensors."""

    name: str
    objective: objectives.Objective
    lengths: tuple[int, ...]  # tokens of each sequence, prompt included
    d: int = 16
    v: int = 101
    scored: float = 0.6  # share of tokens that are scored, at the end of each sequence
    scale: float = 1.0  # of the logits
    bias: bool = False
    options: dict = field(default_factory=dict)

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        """(hidden, weight, target, cu_seqlens) and the keyword arguments."""
        g = torch.Generator().manual_seed(seed)
        t, s = sum(self.lengths), len(self.lengths)
        hidden = torch.randn(t, self.d, generator=g) * (self.scale / self.d**0.5)
        weight = torch.randn(self.v, self.d, generator=g)
        target = torch.randint(0, self.v, (t,), generator=g)
        cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).int()
        for begin, n in zip(cu_seqlens.tolist(), self.lengths):
            target[begin : begin + n - round(n * self.scored)] = self.options.get("ignore_index", -100)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        # Near what the policy gives, as after some training: the objectives' interesting range.
        logprob = linear_logprob(hidden.to(dtype), weight.to(dtype), target)
        ends = torch.cat([torch.zeros(1), logprob.cumsum(0)])[cu_seqlens.long()]
        columns = {
            "reference_logprob": ends.diff() + torch.randn(s, generator=g),
            "previous_logprob": ends.diff() + torch.randn(s, generator=g),
            "reward": torch.randn(s, generator=g),
        }
        kwargs = {name: x.to(real).to(device) for name, x in columns.items()} | self.options
        if self.bias:
            kwargs["bias"] = torch.randn(self.v, generator=g).to(dtype).to(device)
        tensors = hidden.to(dtype), weight.to(dtype), target, cu_seqlens
        return tuple(t.to(device) for t in tensors), kwargs


def cases() -> list[Case]:
    o, mixed = objectives, (7, 3, 12, 5, 1, 9, 30, 4)
    every = [o.SFT(), o.DPO(), o.DPO(label_smoothing=0.1, sft_weight=0.1), o.IPO(), o.SimPO(), o.CPO(), o.ORPO(),
             o.KTO(), o.LNDPO(), o.INPO(eta=0.5), o.REBEL(), o.REFUEL(eta=2.0)]  # fmt: skip
    every += [o.DPO(loss_type=t) for t in o.DPO_LOSS_TYPES if t != "exo_pair"]
    every += [o.DPO(loss_type="exo_pair", label_smoothing=1e-3), o.IPO(normalization="sum"), o.SimPO(loss_type="hinge")]
    every += [o.BCO(), o.XPO(alpha=0.1), o.XPO(alpha=0.1, loss_type="ipo"), o.AlphaPO(), o.RDPO(), o.DPOP(0.1, 2.0)]
    return [
        *(Case(f"{x.name}-{i}", x, mixed) for i, x in enumerate(every)),
        Case("no-sequences", o.SimPO(), ()),
        Case("one-pair", o.SimPO(), (5, 8)),
        Case("nothing-scored", o.SFT(), (4, 6), scored=0.0),
        Case("empty-segments", o.DPO(), (0, 6, 5, 0)),
        Case("all-scored", o.SimPO(), mixed, scored=1.0),
        Case("large-logits", o.SimPO(), mixed, scale=30.0),
        Case("options", o.SimPO(), mixed, bias=True, options={"temperature": 0.7, "softcap": 20.0}),
        Case("kl", o.KTO(), mixed, options={"kl": 0.5}),
        Case("triples", o.TPO(), mixed[:6]),
        Case("delta", o.BCO(), mixed, options={"kl": -0.5}),
        Case("long", o.SimPO(), (700, 400, 300, 650), v=2001, d=32, options={"memory_budget": 1 << 20}),
    ]  # fmt: skip
