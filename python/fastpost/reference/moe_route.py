# SPDX-License-Identifier: Apache-2.0
"""moe_route and moe_plan in plain torch; works in any float dtype, so float64 input gives the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

SCORINGS = ("softmax", "sigmoid")


class Plan(NamedTuple):
    """Which expert works on which slot. T tokens, K slots a token, E experts, R = T·K. All int32, made on the device.

    Rows in "grouped order" are sorted by expert; within an expert they ascend in slot t·K + k, so nothing depends on
    timing. A slot whose expert is E (nobody here: expert parallelism) comes after all others and counts for none.
    """

    offset: torch.Tensor  # [E + 1]: rows offset[e] to offset[e + 1] are expert e's; offset[E] = rows that somebody has
    order: torch.Tensor  # [R]: grouped row r is slot order[r] = t·K + k
    place: torch.Tensor  # [T, K]: the inverse, the grouped row of each slot; -1 for nobody's


class Routing(NamedTuple):
    """What moe_route returns. gate, load_balance, z and probability are differentiable, float32."""

    expert: torch.Tensor  # [T, K] int64, best first; between equals the lower number
    gate: torch.Tensor  # [T, K]
    plan: Plan
    load_balance: torch.Tensor  # [] E·Σ_e f_e·P_e with f_e the share of slots and P = probability; 1 when balanced
    z: torch.Tensor  # [] mean over tokens of logsumexp(logits)²
    probability: torch.Tensor  # [E] mean over tokens of each expert's probability (sigmoid: s / Σ s)


def moe_route(logits, top_k, *, scoring="softmax", normalize=True, scale=1.0, correction=None):
    """Same signature and meaning as :func:`fastpost.moe_route`."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z, (t, e) = logits.to(wide), logits.shape
    score, log_score = (z.softmax(-1), z) if scoring == "softmax" else (z.sigmoid(), F.logsigmoid(z))
    ranked = z  # the same order as scores, and finer where these underflow
    if correction is not None:  # which does not bring back an expert that is masked
        ranked = torch.where(z == -torch.inf, z, score + correction.to(wide))
    expert = ranked.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    # score / Σ score, over the chosen or over all, is softmax(log score): nothing underflows
    gate = log_score.gather(1, expert).softmax(-1) if normalize else score.gather(1, expert)
    probability = log_score.softmax(-1).sum(0) / max(t, 1)
    plan = moe_plan(expert, e)
    share = plan.offset.diff().to(wide) / max(t * top_k, 1)
    load_balance = e * (share * probability).sum()
    z_loss = z.logsumexp(-1).square().sum() / max(t, 1)
    return Routing(expert, gate * scale, plan, load_balance, z_loss, probability)


def moe_plan(expert, experts):
    """Same signature and meaning as :func:`fastpost.moe_plan`."""
    flat = expert.reshape(-1).long()
    offset = torch.bincount(flat, minlength=experts + 1)[:experts].cumsum(0)
    offset = torch.cat([offset.new_zeros(1), offset]).int()
    order = flat.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    place = torch.where(flat < experts, place, -1).view(expert.shape)
    return Plan(offset, order.int(), place.int())


@dataclass(frozen=True)
class Case:
    """Logits [T, E] and how they are routed."""

    name: str
    t: int
    e: int
    top_k: int
    scoring: str = "softmax"
    normalize: bool = True
    route_scale: float = 1.0
    correction: bool = False
    spread: float = 1.0  # of the logits
    favourite: bool = False  # every token's best expert is number 1
    masked: float = 0.0  # share of logits that are -inf

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        """(logits, top_k) and the keyword arguments."""
        g = torch.Generator().manual_seed(seed)
        logits = self.spread * torch.randn(self.t, self.e, generator=g)
        if self.favourite:
            logits[:, 1] += 50
        if self.masked:
            hidden = torch.rand(self.t, self.e, generator=g) < self.masked
            hidden[:, self.e // 2] = False
            logits[hidden] = -torch.inf
        options = {"scoring": self.scoring, "normalize": self.normalize, "scale": self.route_scale}
        if self.correction:
            options["correction"] = torch.randn(self.e, generator=g).to(device)
        return (logits.to(dtype).to(device), self.top_k), options


def cases() -> list[Case]:
    return [
        Case("jetmoe", 300, 8, 2),
        Case("softmax-first", 77, 8, 2, normalize=False),
        Case("sigmoid", 200, 16, 4, "sigmoid", route_scale=2.5),
        Case("sigmoid-corrected", 64, 64, 8, "sigmoid", correction=True),
        Case("sigmoid-plain", 64, 6, 3, "sigmoid", normalize=False),
        Case("corrected", 50, 8, 2, correction=True),
        Case("top-1", 100, 8, 1, normalize=False),
        Case("all-experts", 33, 4, 4),
        Case("one-expert", 9, 1, 1),
        Case("one-token", 1, 8, 2),
        Case("no-tokens", 0, 8, 2),
        Case("all-on-one", 130, 8, 2, favourite=True),
        Case("empty-experts", 3, 60, 2),
        Case("many-experts", 500, 128, 8),
        Case("large-logits", 40, 8, 2, spread=1e3),
        Case("small-logits", 40, 8, 2, spread=1e-3),
        Case("large-sigmoid", 40, 8, 2, "sigmoid", spread=1e3),
        Case("masked", 90, 8, 2, masked=0.3),
        Case("masked-sigmoid", 90, 8, 2, "sigmoid", masked=0.3, correction=True),
        Case("masked-most", 60, 8, 3, normalize=False, masked=0.9),
        Case("long-lists", 70, 200, 40),
        Case("most-experts", 20, 512, 64, "sigmoid", correction=True),
        Case("many-tokens", 4099, 8, 2),
    ]
