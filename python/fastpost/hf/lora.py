# SPDX-License-Identifier: Apache-2.0
"""Adapters by peft on the output head, trained without a merged weight.

A LoRA head computes hidden · Wᵀ + scaling · B(A(dropout(hidden))). Its `.weight` is W alone, so whoever takes that
trains nothing: the loss stays flat and the adapter's gradient is None. The second term is what fastpost.linear_logprob
takes as low_rank = (a, b), with a = scaling · A(dropout(hidden)) made here by the adapter's own modules and b = B.

    weight, low_rank = lora_head(model.get_output_embeddings(), hidden)
    fastpost.linear_logprob(hidden, weight, target, low_rank=low_rank)
"""

from __future__ import annotations

import torch


def lora_head(
    layer: torch.nn.Module, hidden: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """hidden [N, D] -> (weight [V, D], low_rank) for a head with or without a LoRA adapter.

    low_rank is (a [N, r], b [V, r]) in the dtype of `hidden`, or None where no adapter is active (also inside
    model.disable_adapter() and after merging). Raises ValueError for what it does not compute: see `adapter`.
    """
    return layer.weight, low_rank(layer, adapter(layer), hidden)


def adapter(layer: torch.nn.Module) -> str | None:
    """The name of the LoRA adapter that a head would apply now, or None.

    Raises ValueError for other kinds of adapters, several at once, variants (DoRA, …), and a bias on B."""
    if type(layer).__module__.partition(".")[0] != "peft":
        return None
    from peft.tuners import lora
    from peft.utils import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):  # a copy of the head that is trained whole; its weight is that one's
        return None
    if not isinstance(layer, lora.Linear) or not isinstance(layer.get_base_layer(), torch.nn.Linear):
        raise _refused(
            layer, "expected peft's lora.Linear around torch.nn.Linear", "Train the head whole or not at all."
        )
    if layer.merged:
        if layer.disable_adapters:
            raise _refused(layer, "expected an adapter that is not merged", "Call model.unmerge_adapter() first.")
        return None
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) > 1:
        raise _refused(
            layer, f"expected one active adapter, got {len(active)}", "Choose one by model.set_adapter(name)."
        )
    if not active:
        return None
    if active[0] in layer.lora_variant:
        kind = type(layer.lora_variant[active[0]]).__name__
        raise _refused(layer, f"expected plain LoRA, got {kind}", "Leave the head out of target_modules.")
    if hasattr(layer, "lora_connection_in"):
        raise _refused(layer, "expected plain LoRA, got one with connections", "Leave the head out of targets.")
    if layer.lora_B[active[0]].bias is not None:
        raise _refused(layer, "expected B without a bias", "Set lora_bias=False.")
    return active[0]


def low_rank(
    layer: torch.nn.Module, name: str | None, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(a [N, r], b [V, r]) of adapter `name`, differentiable in hidden, A and B; dropout is drawn as in peft."""
    if name is None:
        return None
    down, up = layer.lora_A[name], layer.lora_B[name]
    a = down(layer.lora_dropout[name](hidden.to(down.weight.dtype))) * layer.scaling[name]
    return a.to(hidden.dtype), up.weight.to(hidden.dtype)


def inner(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a peft model, its adapters in place; any other model as it is.

    Raises ValueError for prompt tuning and the like, which add tokens that fastpost's packed rows do not have."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise ValueError(f"[hf] {type(model).__name__}: expected adapters inside the layers, got {kind}. Use LoRA.")
    return model.get_base_model()


def _refused(layer, expected, advice):
    return ValueError(f"[head] {type(layer).__module__}.{type(layer).__name__}: {expected}. {advice}")
