# SPDX-License-Identifier: Apache-2.0
"""LoRA on experts in four bits: an A and a B for each expert beside the packed matrices, computed as grouped products.

peft adds B A to a stacked parameter, which packed bytes have not. Here the module that holds them gets a wrapper, as
linear layers do: y_r += scale · B_e (A_e x_r). The matrices have the shapes that peft gives them for a parameter, A
[E·r, K] with the expert slowest and B [N, r·E] with the expert fastest, and go by the names that they would have there.
So what hf/adapter.py and hf/expert_lora.py write fits the float model, too, and what they read fits either.
"""

from __future__ import annotations

import math

import peft
import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import get_pattern_key
from torch import nn

from fastpost.hf.int4_experts import is_jetmoe, restore
from fastpost.nn.int4_experts import Int4Experts, autocast
from fastpost.ops.grouped_gemm import grouped_gemm


class Int4ExpertsLora(nn.Module, LoraLayer):
    """peft's wrapper around an Int4Experts: plain LoRA (also rsLoRA), without dropout, as peft has it on parameters."""

    multiplies = True
    """See Int4Experts."""

    def __init__(self, base_layer: Int4Experts, adapter_name: str, config: LoraConfig, r: int, lora_alpha: float,
                 **kwargs):  # fmt: skip
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.parameter_name = kwargs.get("target_name", "").rpartition(".")[2]
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    @property
    def lora_variants(self):
        return {(): None}

    @property
    def shape(self) -> torch.Size:
        return self.get_base_layer().shape

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        self.num_experts, rows, columns = module.shape
        return columns, rows

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs) -> None:
        start = config.init_lora_weights
        if config.lora_bias or config.lora_dropout or r < 1 or (isinstance(start, str) and start != "gaussian"):
            raise ValueError(
                "experts in four bits: expected a rank of at least 1, no dropout, no bias on B and B = 0 at first, "
                f"got {r}, {config.lora_dropout}, {config.lora_bias} and {start!r}."
            )
        self.resolve_lora_variant(config=config)  # refuses DoRA and the like
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r * self.num_experts, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r * self.num_experts, self.out_features, bias=False)
        self.lora_bias[adapter_name] = self.use_dora[adapter_name] = False
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        if start:
            self.reset_lora_parameters(adapter_name, start)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, offset: torch.Tensor, *, order=None, top_k: int = 1, bias=None) -> torch.Tensor:
        out = self.base_layer(x, offset, order=order, top_k=top_k, bias=bias)
        for name in [] if self.disable_adapters else [n for n in self.active_adapters if n in self.lora_A]:
            down, up = self.pair(name)
            rows, down, up = autocast(x.to(down.dtype), down, up)
            hidden = grouped_gemm(rows, down, offset, order=order, top_k=top_k) * self.scaling[name]
            out = out + grouped_gemm(hidden, up, offset).to(out.dtype)
        return out

    def pair(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [E, r, K] and B [E, N, r]."""
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        by_expert = up.view(self.out_features, -1, self.num_experts).permute(2, 0, 1).contiguous()
        return down.view(self.num_experts, -1, self.in_features), by_expert

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """[E, N, K]."""
        down, up = self.pair(adapter)
        return up @ down * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "[lora] experts in four bits hold no sum with an adapter. Use fastpost.hf.adapter.merged, which makes them "
            "floats, or keep the adapter."
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def merge_into_floats(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Every Int4Experts of `model` a parameter again, in place, with the active adapters around it in its sum."""
    wrapped = {id(m.get_base_layer()) for m in model.modules() if isinstance(m, Int4ExpertsLora)}
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, (Int4Experts, Int4ExpertsLora))]
    for name, module in (pair for pair in found if id(pair[1]) not in wrapped):
        lora = module if isinstance(module, Int4ExpertsLora) else None
        weight = (module if lora is None else lora.get_base_layer()).dequantize(torch.float32 if lora else dtype)
        for active in [] if lora is None else lora.active_adapters:
            if active in lora.lora_A:
                weight += lora.get_delta_weight(active).detach().float()
        parent, _, leaf = name.rpartition(".")
        restore(model.get_submodule(parent), leaf, weight.to(dtype))
    return model


# ---- on a model, and its names ---------------------------------------------------------------------------------------


def put_on(model: nn.Module, config: LoraConfig):
    """peft.get_peft_model, with adapters on those of config.target_parameters that are in four bits, too."""
    held = {name: m for name, m in model.named_modules() if isinstance(m, Int4Experts)}
    packed = {}
    for target in config.target_parameters or ():
        name = target.removesuffix(".weight")
        found = [h for h in held if h == name or h.endswith(f".{name}")]
        packed |= {target: found} if found else {}
    if not packed:
        return peft.get_peft_model(model, config)
    # peft takes names like "down_proj" for parameters of experts, and would find none: it gets the others alone.
    config.target_parameters = [t for t in config.target_parameters if t not in packed] or None
    alone = not config.target_modules and not config.target_parameters
    if alone:
        config.target_modules = DUMMY_TARGET_MODULES
    wrapped = peft.get_peft_model(model, config)
    if alone:
        config.target_modules = None
    config.target_parameters = sorted({*(config.target_parameters or ()), *packed})
    for name in sorted({n for names in packed.values() for n in names}):
        rank, alpha = (
            patterns.get(get_pattern_key(patterns.keys(), name), usual)
            for patterns, usual in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
        )
        parent, _, leaf = name.rpartition(".")
        made = Int4ExpertsLora(held[name], "default", config, rank, alpha, target_name=name)
        setattr(model.get_submodule(parent), leaf, made.train(model.training))
    return wrapped


def wrappers(model: nn.Module) -> dict[str, Int4ExpertsLora]:
    """Adapters on experts in four bits, by the names that their tensors would begin with upon parameters."""
    found, inside = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, Int4ExpertsLora):
            parent, _, leaf = name.rpartition(".")
            inside.setdefault(parent, {})[leaf] = module
    for parent, leaves in inside.items():
        if is_jetmoe(model.get_submodule(parent)):
            found |= {f"{parent}.{leaf}": module for leaf, module in leaves.items()}
            continue
        for depth, leaf in enumerate(reversed(leaves)):  # peft wraps in the order of parameters, the first inmost
            found[parent + ".base_layer" * depth] = leaves[leaf]
    return found


def renamed(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's tensors by those names, from the names that this model has for them."""
    own = {id(m): n for n, m in model.named_modules() if isinstance(m, Int4ExpertsLora)}
    pairs = {own[id(m)]: n for n, m in wrappers(model).items()}

    def name(key: str) -> str:
        prefix, mark, rest = key.partition(".lora_")
        return pairs.get(prefix, prefix) + mark + rest

    return {name(key): tensor for key, tensor in tensors.items()}


def fill(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy those of `tensors`, named so, that belong to experts in four bits; the others are returned."""
    rest = dict(tensors)
    for name, module in wrappers(model).items():
        for side, layers in (("A", module.lora_A), ("B", module.lora_B)):
            if (tensor := rest.pop(f"{name}.lora_{side}.weight", None)) is not None:
                layers["default"].weight.data.copy_(tensor)
    return rest
