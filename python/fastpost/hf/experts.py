# SPDX-License-Identifier: Apache-2.0
"""fastpost's mixture of experts in transformers' models, as an experts implementation named "fastpost".

    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="fastpost")   # after import fastpost.hf
    fastpost.hf.use_experts(model)                        # any model, at any time; also JetMoE, which has no such door

Weights stay where and as they are: state_dict, save_pretrained, peft and FSDP2 see no difference. The routers stay the
model's own, so that what is recorded as router_logits and its loss do, too. Experts whose matrices lie as Mixtral's
(gate and up one after the other, no bias, silu, gelu or relu) take one fused node; others, with biases, interleaved or
transposed matrices, a gate of their own or none, take the same grouped products around the model's own activation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import activations
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fastpost.hf import lora
from fastpost.nn.int4_experts import matrices, mix, multiply
from fastpost.ops.moe_combine import moe_combine
from fastpost.ops.moe_route import moe_plan

NAME = "fastpost"
_ACTIVATIONS = {  # functions and classes of modules that compute what grouped_gemm has
    F.silu: "swiglu",
    F.gelu: "geglu",
    F.relu: "reglu",
    nn.SiLU: "swiglu",
    activations.SiLUActivation: "swiglu",
    activations.GELUActivation: "geglu",
    activations.GELUTanh: "geglu_tanh",
    activations.NewGELUActivation: "geglu_tanh",
    nn.ReLU: "reglu",
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MARKS = ("has_gate", "has_bias", "is_transposed", "config")


def register() -> None:
    """Make NAME known to transformers. Calling it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


# ---- the function ----------------------------------------------------------------------------------------------------


def experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [T, H], top_k_index and top_k_weights [T, K] -> [T, H], in the dtype of hidden_states.

    `self` is a module whose class transformers has decorated with use_experts_implementation. Its weights are read as
    attributes, which is how peft's adapters on parameters (target_parameters) come in. An index of num_experts stands
    for an expert that is nowhere, or on another rank.
    """
    up, down = matrices(self.gate_up_proj if self.has_gate else self.up_proj), matrices(self.down_proj)
    dtype = _compute_dtype(hidden_states, up)
    x, up, down = (t.to(dtype) if isinstance(t, torch.Tensor) else t for t in (hidden_states.contiguous(), up, down))
    gate = top_k_weights.to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous()
    if getattr(self, "_is_expert_parallel", False):
        top_k_index = top_k_index.clamp(max=self.num_experts)
    plan = moe_plan(top_k_index.contiguous(), self.num_experts)
    activation = fused_activation(self)
    if is_fused(self):
        out = mix(x, plan, gate, up, down, activation=activation)
        return out.to(hidden_states.dtype)

    biases = [None, None]
    if self.has_bias:
        names = ("gate_up_proj_bias" if self.has_gate else "up_proj_bias", "down_proj_bias")
        biases = [getattr(self, name).to(dtype) for name in names]
    if self.is_transposed:
        up, down = up.mT, down.mT
    k = plan.place.shape[1]
    rows = multiply(x, up, plan.offset, order=plan.order, top_k=k, bias=biases[0], activation=activation)
    if activation is None:
        rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = multiply(rows.to(dtype).contiguous(), down, plan.offset, bias=biases[1])
    if getattr(self, "has_post_expert_norm", False):
        rows = self.post_expert_norm(rows).to(dtype).contiguous()
    return moe_combine(rows, plan, gate).to(hidden_states.dtype)


def fused_activation(module: nn.Module) -> str | None:
    """What grouped_gemm calls the gate of `module`, or None where only the module itself can compute it."""
    own = getattr(module._apply_gate, "__module__", "") != type(ALL_EXPERTS_FUNCTIONS).__module__
    if own or not module.has_gate or not getattr(module, "is_concatenated", True):
        return None
    return activation_name(module.act_fn)


def activation_name(act) -> str | None:
    """What grouped_gemm calls act(first half) · second half, or None where it has no name for it."""
    if type(act) is nn.GELU:
        return "geglu" if act.approximate == "none" else "geglu_tanh"
    return _ACTIVATIONS.get(type(act) if isinstance(act, nn.Module) else act)


def is_fused(module: nn.Module) -> bool:
    """Whether experts_forward takes the fused node for `module`."""
    other = module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False)
    return not other and fused_activation(module) is not None


def _compute_dtype(x: torch.Tensor, weight) -> torch.dtype:
    """That of the weights, which transformers' own functions convert x to, or of x where they are in four bits; under
    autocast that of autocast."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype if isinstance(weight, torch.Tensor) else x.dtype


# ---- switching it on -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experts:
    """What use_experts did: names of modules and their classes, by the path that they take. `left` has those that keep
    transformers' own function, and why."""

    fused: dict[str, str]
    general: dict[str, str]
    left: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.fused or self.general)

    def line(self) -> str:
        """One line, such as "experts by fastpost: 24 JetMoeMoE, 24 JetMoeMoA"."""
        if not (self or self.left):
            return "experts by fastpost: none, the model has no experts that it knows"
        parts = [_counted(self.fused), _counted(self.general, " around the model's own gate")]
        words = [f"experts by fastpost: {', '.join(p for p in parts if p) or 'none'}"]
        words += [f"left to transformers: {_counted(self.left)}"] if self.left else []
        return "; ".join(words)


def _counted(found: dict[str, str], remark: str = "") -> str:
    return ", ".join(f"{n} {kind}{remark}" for kind, n in Counter(found.values()).items())


def use_experts(model: nn.Module, *, quiet: bool = False) -> Experts:
    """Let fastpost compute the experts of `model`, a transformers model or peft's wrapper of one, and say which.

        >>> fastpost.hf.use_experts(model)
        experts by fastpost: 32 MixtralExperts

    Where the class has transformers' experts interface the model's config is told; model.set_experts_implementation
    takes it back. JetMoE's two mixtures get the classes of hf/jetmoe.py on the instance. No class of a library is
    changed, no parameter moves. Left as they are: experts in eight bits, JetMoE's with an unusual activation
    or with a forward that a device map has replaced. quiet: nothing is printed.
    """
    register()
    inner = lora.inner(model)
    fused, general, left = {}, {}, {}
    for name, module in inner.named_modules():
        if not has_experts_interface(module):
            continue
        kind = type(module).__name__
        weight = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
        floats = isinstance(weight, torch.Tensor) and weight.dtype in _FLOATS
        if not (floats or hasattr(weight, "multiplies")) or not _has_door(module):
            left[name] = f"{kind} ({_why(weight)})"
            continue
        module.config._experts_implementation = NAME
        (fused if is_fused(module) else general)[name] = kind
    if any(type(m).__name__.startswith("JetMoe") for m in inner.modules()):
        from fastpost.hf import jetmoe

        for into, names in zip((fused, left), jetmoe.take_over(inner), strict=True):
            into |= names
    found = Experts(fused, general, left)
    if not quiet:
        print(found.line())
    return found


def has_experts_interface(module: nn.Module) -> bool:
    """Whether its class is one that transformers has decorated with use_experts_implementation."""
    return all(hasattr(module, mark) for mark in _MARKS)


def _has_door(module: nn.Module) -> bool:
    """Whether the forward of its class asks the experts interface, and not one of its own as for weights in float8."""
    return hasattr(type(module).forward, "__wrapped__")


def _why(weight) -> str:
    return str(weight.dtype).removeprefix("torch.") if isinstance(weight, torch.Tensor) else "other weights"
