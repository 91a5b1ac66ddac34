# SPDX-License-Identifier: Apache-2.0
"""JetMoE's two mixtures by fastpost: classes that instances of transformers' own are given (fastpost.hf.use_experts).

They hold the same parameters under the same names, hooks stay on, and the routers still return their logits where
transformers records them, so generation, caches, checkpointing, adapters and folders work as before. What changes:
gates stay float32, sums are float32, and no list of counts has to reach the CPU before the experts can begin.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.jetmoe import modeling_jetmoe as theirs

from fastpost.hf.experts import activation_name
from fastpost.nn.int4_experts import autocast, matrices, mix
from fastpost.nn.moa import map_heads, reduce_heads
from fastpost.ops.moe_route import Plan, moe_route


class Gating(theirs.JetMoeTopKGating):
    """hidden_states [T, H] -> (expert [T, K], gate [T, K], plan, routing, logits [T, E]): the logits where theirs has
    them, in fifth place."""

    def forward(self, hidden_states: torch.Tensor):
        logits = self.layer(hidden_states).float()
        routing = moe_route(logits, self.top_k)
        return routing.expert, routing.gate, routing.plan, routing, logits


class Matrices(theirs.JetMoeParallelExperts):
    """Called with inputs alone: the weight [E, N, K]. It is asked for by a call because a wrapper around this module
    (peft's, for target_parameters) changes the weight only during one."""

    def forward(self, inputs, expert_size=None):
        return self.weight if expert_size is None else super().forward(inputs, expert_size)


def _weight(held: torch.nn.Module, rows: torch.Tensor):
    """What `mix` and `multiply` take: see Matrices; in four bits the module holds an Int4Weight."""
    return held(rows) if isinstance(held, Matrices) or not hasattr(held, "multiplies") else matrices(held)


class MoE(theirs.JetMoeMoE):
    def forward(self, layer_input: torch.Tensor) -> torch.Tensor:
        rows = layer_input.reshape(-1, layer_input.shape[-1]).contiguous()
        _, gate, plan, _, _ = self.router(rows)
        x, up, down = autocast(rows, _weight(self.input_linear, rows), _weight(self.output_linear, rows))
        out = mix(x, plan, gate, up, down, activation=activation_name(self.activation))
        return out.to(layer_input.dtype).view(layer_input.shape) + self.bias


class MoA(theirs.JetMoeMoA):
    def map(self, layer_input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, Plan]]:
        """[B, S, H] -> (queries [B, S, K, D], router logits, what `reduce` needs)."""
        rows = layer_input.reshape(-1, layer_input.shape[-1]).contiguous()
        _, gate, plan, _, logits = self.router(rows)
        queries = map_heads(*autocast(rows, _weight(self.input_linear, rows)), plan)
        return queries.view(*layer_input.shape[:-1], *queries.shape[1:]), logits, (gate, plan)

    def reduce(self, layer_input: torch.Tensor, topo_info: tuple[torch.Tensor, Plan]) -> torch.Tensor:
        """[B, S, K, D] -> [B, S, H]."""
        gate, plan = topo_info
        rows = layer_input.reshape(-1, layer_input.shape[-1]).contiguous()
        values, output = autocast(rows, _weight(self.output_linear, rows))
        out = reduce_heads(values, output, plan, gate).to(layer_input.dtype)
        return out.view(*layer_input.shape[:2], self.input_size) + self.bias


_OURS = {
    theirs.JetMoeTopKGating: Gating,
    theirs.JetMoeParallelExperts: Matrices,
    theirs.JetMoeMoE: MoE,
    theirs.JetMoeMoA: MoA,
}


def take_over(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Give JetMoE's mixtures in `model` the classes above -> ({name: class as transformers calls it}, {name: class and
    why it was left}). What has them already is among the first."""
    found, left = {}, {}
    for name, mixture in model.named_modules():
        theirs_kind = next((k for k in (theirs.JetMoeMoE, theirs.JetMoeMoA) if type(mixture) in (k, _OURS[k])), None)
        if theirs_kind is None:
            continue
        parts = [m for m in mixture.modules() if type(m) in _OURS]
        if any("forward" in vars(m) for m in parts):  # a device map's, which would go on calling transformers' code
            left[name] = f"{theirs_kind.__name__} (its forward has been replaced)"
        elif theirs_kind is theirs.JetMoeMoE and activation_name(mixture.activation) is None:
            left[name] = f"{theirs_kind.__name__} ({type(mixture.activation).__name__})"
        else:
            found[name] = theirs_kind.__name__
            for part in parts:
                part.__class__ = _OURS[type(part)]
    return found, left
