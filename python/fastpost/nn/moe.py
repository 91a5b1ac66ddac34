# SPDX-License-Identifier: Apache-2.0
"""MoE: a feed-forward layer of which each token uses only the experts that its router chooses. Nothing is dropped.

    layer = fastpost.nn.MoE(hidden=2048, inner=5632, experts=8, top_k=2, bias=True)         # JetMoE's
    out, routing = layer(x)
    loss = loss + fastpost.nn.router_loss([routing, ...])              # of all such layers of the model

A layer keeps nothing of a call: what its router did is returned (fastpost.moe_route's Routing), so that checkpointing,
compilation, several calls of one layer and threads have nothing to get wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from fastpost.nn.int4_experts import InFourBits, autocast, matrices, mix
from fastpost.ops.moe_route import Routing, moe_route
from fastpost.reference.grouped_gemm import GATED
from fastpost.reference.moe_route import SCORINGS


class Router(nn.Module):
    """Which experts each token gets: logits = x Wᵀ, as a float32 product whatever the dtype of x and W.

    x [T, hidden] -> fastpost.Routing. The options are those of fastpost.moe_route. correction=True: a buffer
    `correction` [experts], added to the scores for the choice alone, which stays float32 when the model is converted;
    whoever trains moves it, as DeepSeek-V3 does:

        load = routing.plan.offset.diff().float()
        router.correction += 0.001 * (load.mean() - load).sign()
    """

    def __init__(
        self,
        hidden: int,
        experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        correction: bool = False,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if min(hidden, experts) < 1 or not 1 <= top_k <= experts:
            raise ValueError(f"[Router] top_k: expected 1 to {experts} of {experts} experts for {hidden} columns, got "
                             f"{top_k}.")  # fmt: skip
        if scoring not in SCORINGS:
            raise ValueError(f"[Router] scoring: expected {' or '.join(SCORINGS)}, got {scoring!r}.")
        self.top_k, self.scoring, self.normalize, self.scale = top_k, scoring, normalize, scale
        self.weight = nn.Parameter(torch.empty(experts, hidden, device=device, dtype=dtype))
        start = torch.zeros(experts, device=device, dtype=torch.float32) if correction else None
        self.register_buffer("correction", start)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        spread(self.weight)
        if self.correction is not None:
            nn.init.zeros_(self.correction)

    def forward(self, x: torch.Tensor) -> Routing:
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            logits = F.linear(x.float(), self.weight.float())
        options = {"scoring": self.scoring, "normalize": self.normalize, "scale": self.scale}
        return moe_route(logits, self.top_k, correction=self.correction, **options)

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        words = f"hidden={hidden}, experts={experts}, top_k={self.top_k}, {self.scoring}"
        words += "" if self.normalize else ", normalize=False"
        words += "" if self.scale == 1 else f", scale={self.scale}"
        return words + ", corrected" * (self.correction is not None)

    def _apply(self, fn, recurse=True):
        kept = self.correction
        super()._apply(fn, recurse)
        if kept is not None and self.correction.dtype != kept.dtype:  # steps of 0.001 are lost in bfloat16
            self.correction = kept.to(self.correction.device)
        return self


class MoE(InFourBits, nn.Module):
    """``out[t] = Σ_k gate[t, k] · down_e act(up_e x_t) (+ bias)`` with e the k-th expert of token t.

    x [..., hidden] -> (out [..., hidden], Routing); under autocast in its dtype. With top_k = experts and the gates
    all equal it is the dense layer of width experts · inner. Parameters: up [experts, 2 inner, hidden] (first the half
    that goes through the activation), down [experts, hidden, inner], router.weight [experts, hidden], bias [hidden].

    Args:
        hidden, inner, experts, top_k: sizes.
        activation: "swiglu", "geglu", "geglu_tanh" or "reglu".
        scoring, normalize, scale, correction: the router's; see Router and fastpost.moe_route.
        bias: a vector added after the experts' outputs are put together, as in JetMoE.
        recompute: the backward pass makes the hidden rows of the experts again, so that only x is kept.

    Raises:
        ValueError: sizes below 1, top_k above experts, an activation or scoring that does not exist.
    """

    expert_names = ("up", "down")

    def __init__(
        self,
        hidden: int,
        inner: int,
        experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        scoring: str = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        correction: bool = False,
        bias: bool = False,
        recompute: bool = False,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if min(hidden, inner) < 1:
            raise ValueError(f"[MoE] expected at least one column, got hidden {hidden}, inner {inner}.")
        if activation not in GATED:
            raise ValueError(f"[MoE] activation: expected one of {', '.join(GATED)}, got {activation!r}.")
        made = {"device": device, "dtype": dtype}
        self.activation, self.recompute = activation, recompute
        self.router = Router(
            hidden, experts, top_k, scoring=scoring, normalize=normalize, scale=scale, correction=correction, **made
        )
        self.up = nn.Parameter(torch.empty(experts, 2 * inner, hidden, **made))
        self.down = nn.Parameter(torch.empty(experts, hidden, inner, **made))
        self.bias = nn.Parameter(torch.empty(hidden, **made)) if bias else None
        self._reset()

    def reset_parameters(self) -> None:
        """As nn.Linear does for each expert; the bias is 0."""
        self.router.reset_parameters()
        self._reset()

    def _reset(self) -> None:
        spread(self.up, self.down)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        rows = as_rows("MoE", x, self.up.shape[2])
        routing = self.router(rows)
        rows, up, down = autocast(rows, matrices(self.up), matrices(self.down))
        out = mix(rows, routing.plan, routing.gate, up, down, activation=self.activation, recompute=self.recompute)
        return biased(out, self.bias).view(x.shape), routing

    def extra_repr(self) -> str:
        experts, hidden, inner = self.down.shape
        words = f"hidden={hidden}, inner={inner}, experts={experts}, {self.activation}, bias={self.bias is not None}"
        return words + ", recompute" * self.recompute


def router_loss(routings: Iterable[Routing], *, load_balance: float = 0.01, z: float = 0.001) -> torch.Tensor:
    """``Σ load_balance · L_balance + z · L_z`` over the layers, a float32 scalar. Defaults: JetMoE's, which counts its
    mixtures of attention heads as layers of their own.

    Raises ValueError when there are none."""
    parts = [load_balance * r.load_balance + z * r.z for r in routings]
    if not parts:
        raise ValueError("[router_loss] routings: expected at least one Routing, got none.")
    return torch.stack(parts).sum()


# ---- what MoE and MoA share ------------------------------------------------------------------------------------------


def as_rows(who: str, x: torch.Tensor, columns: int) -> torch.Tensor:
    """x [..., columns] -> [T, columns], in memory row by row."""
    if x.ndim < 1 or x.shape[-1] != columns:
        raise ValueError(f"[{who}] x: expected [..., {columns}], got {list(x.shape)}.")
    return x.reshape(-1, columns).contiguous()


def biased(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return out if bias is None else out + bias.to(out.dtype)


def spread(*weights: torch.Tensor | nn.Module) -> None:
    """Uniform in ±1/√fan_in, as nn.Linear's own. There are no random four-bit weights to begin from."""
    for weight in (w for w in weights if isinstance(w, torch.Tensor)):
        bound = weight.shape[-1] ** -0.5
        nn.init.uniform_(weight, -bound, bound)
