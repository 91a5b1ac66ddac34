# SPDX-License-Identifier: Apache-2.0
"""The experts of a transformers model in four bits, in place (fastpost.nn.Int4Experts), computed by use_experts' path.

    done = quantize_experts(model, group_size=64, scheme="nf4", double_quant=True)
    print(done.line())

Routers stay as they are: the choice of experts is what suffers most from rounding, and they are small. So do experts
whose matrices lie transposed (their groups would run across the sums) or are no floats.
"""

from __future__ import annotations

import torch
from torch import nn

from fastpost.hf import lora
from fastpost.hf.experts import has_experts_interface, use_experts
from fastpost.nn.int4_experts import Int4Experts, QuantizedExperts, quantize_parameters

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_experts(
    model: nn.Module,
    *,
    group_size: int = 128,
    scheme: str = "symmetric",
    scales_dtype: torch.dtype | None = None,
    double_quant: bool = False,
    device: torch.device | str | None = None,
) -> QuantizedExperts | None:
    """Put Int4Experts where the experts of `model` have stacked matrices, and let fastpost compute them. Options are
    those of fastpost.int4_quantize; device: where to quantise. None where there are no experts that it can quantise.

    Raises ValueError as int4_quantize does, naming the matrix."""
    inner = lora.inner(model)
    places = find(inner)
    if not places:
        return None
    options = {"group_size": group_size, "scheme": scheme, "scales_dtype": scales_dtype, "double_quant": double_quant}
    done = quantize_parameters(places, device=device, **options)
    for module, leaf in places.values():
        getattr(module, leaf).is_concatenated = getattr(module, "is_concatenated", True)
    use_experts(inner, quiet=True)
    return done


def find(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """{name: (module, name there)} of the stacked matrices that can be quantised; what is, is not among them."""
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if has_experts_interface(module) and not module.is_transposed:
            leaves = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
            held = {leaf: module._parameters.get(leaf) for leaf in leaves}
        elif is_jetmoe(module):
            held = {leaf: getattr(m, "weight", None) for leaf, m in module.named_children() if leaf.endswith("_linear")}
        else:
            continue
        found |= {prefix + leaf: (module, leaf) for leaf, p in held.items() if p is not None and p.ndim == 3
                  and p.dtype in _FLOATS}  # fmt: skip
    return found


def is_jetmoe(module: nn.Module) -> bool:
    """Whether it is one of JetMoE's mixtures, which hold modules with a `weight` instead of parameters."""
    return any(c.__name__ in ("JetMoeMoE", "JetMoeMoA") for c in type(module).__mro__)


def stacks(model: nn.Module) -> dict[str, Int4Experts]:
    """The four-bit experts of a model by name, without those that an adapter surrounds."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Int4Experts)}


def dequantize_experts(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Parameters again in the place of all Int4Experts, in `dtype`, in place; they require no gradient."""
    for name, held in stacks(model).items():
        parent, _, leaf = name.rpartition(".")
        restore(model.get_submodule(parent), leaf, held.dequantize(dtype))
    return model


def restore(parent: nn.Module, leaf: str, weight: torch.Tensor) -> None:
    """Put `weight` [E, N, K] where `parent` has had it before it was quantised."""
    made = nn.Parameter(weight, requires_grad=False)
    delattr(parent, leaf)
    if not is_jetmoe(parent):
        parent.register_parameter(leaf, made)
        return
    from fastpost.hf.jetmoe import Matrices

    with torch.device("meta"):
        module = Matrices(*weight.shape[:1], *weight.shape[:0:-1])
    module.weight = made
    setattr(parent, leaf, module.train(parent.training))


def routers(model: nn.Module) -> set[str]:
    """Names of linear layers that choose or weigh experts, for whoever quantises linear layers."""
    if not (find(model) or stacks(model)):
        return set()
    layers = (name for name, m in model.named_modules() if type(m) is nn.Linear)
    return {n for n in layers if n.endswith((".gate", ".shared_expert_gate")) or ".router." in n}
