# SPDX-License-Identifier: Apache-2.0
"""Decoder layers of Llama's form in a third of the operations, for rows that come packed with a PagedCache.

At one token a layer of SmolLM2 is 0.6 ms of weights to read and 0.4 ms of small operations and calls in transformers'
own code. The instances are given these classes while the engine holds the model; parameters, names and hooks stay, and
so do the bits: each operation is rounded where transformers rounds. Without a PagedCache they do what they did.
"""

from __future__ import annotations

import functools
import sys

import torch
import torch.nn.functional as F
from torch import nn

from fastpost.generate.paged_cache import PagedCache
from fastpost.nn.decode_linear import DecodeLinear
from fastpost.ops import _few_rows

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""transformers' folder -> what its classes' names begin with."""


def use_lean_layers(model: nn.Module) -> list[nn.Module]:
    """Change the classes of the layers that are known, in place -> those layers."""
    found = [module for module in model.modules() if _known(module)]
    for module in found:
        module.__class__ = _lean(type(module))
    return found


def restore_layers(layers: list[nn.Module]) -> None:
    for layer in layers:
        layer.__class__ = type(layer).__bases__[1]


def _known(layer: nn.Module) -> bool:
    """Whether it is one of FAMILIES' layers made of its family's parts, none of them wrapped, hooked or replaced.
    (Linear layers may be of any class.)"""
    where = type(layer).__module__
    family = FAMILIES.get(where.rsplit("modeling_", 1)[-1])
    if family is None or not where.startswith("transformers.") or type(layer).__name__ != f"{family}DecoderLayer":
        return False
    theirs = sys.modules[where]
    parts = {
        "self_attn": "Attention",
        "mlp": "MLP",
        "input_layernorm": "RMSNorm",
        "post_attention_layernorm": "RMSNorm",
    }
    return all(
        type(getattr(layer, name)) is getattr(theirs, family + kind) for name, kind in parts.items()
    ) and not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in layer.modules())


@functools.cache
def _lean(kind: type) -> type:
    return type(f"Lean{kind.__name__}", (_LeanLayer, kind), {})


class _LeanLayer:
    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
                position_embeddings=None, **kwargs):  # fmt: skip
        if not isinstance(past_key_values, PagedCache) or torch.is_grad_enabled():
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs,
            )  # fmt: skip
        x = hidden_states[0]
        attention, mlp = self.self_attn, self.mlp
        rows = _norm(self.input_layernorm, x)
        dim = attention.head_dim
        query, key, value = (_linear(project, rows).view(x.shape[0], -1, dim)
                             for project in (attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
        cos, sin = _rotation(past_key_values.step, position_embeddings)
        both = torch.cat((query, key), 1)
        turned = both.roll(dim // 2, -1).mul_(sin)
        both.mul_(cos).add_(turned)
        heads = query.shape[1]
        out = past_key_values.layers[attention.layer_idx].attend_rows(
            both[:, :heads], both[:, heads:], value, scaling=attention.scaling,
            window=_window(attention),
        )  # fmt: skip
        x = _linear(attention.o_proj, out.view(x.shape[0], -1)).add_(x)
        rows = _norm(self.post_attention_layernorm, x)
        gate = mlp.act_fn(_linear(mlp.gate_proj, rows)).mul_(_linear(mlp.up_proj, rows))
        return _linear(mlp.down_proj, gate).add_(x)[None]


def _window(attention: nn.Module) -> int | None:
    """Mistral's attention reads it from the config, Qwen's has it, Llama's has none whatever the config says."""
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)


def _norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], None, norm.variance_epsilon).mul_(norm.weight)


def _linear(linear: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    if type(linear) is DecodeLinear and _few_rows.fits(rows, linear.weight):
        return _few_rows.linear(rows, linear.weight, linear.bias)
    return linear(rows)


def _rotation(step, embeddings) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, d], once a step; sin with the sign of rotate_half, which then is only a roll."""
    cos, sin = embeddings
    if step.rotation is None or step.rotation[0] is not cos:
        half = cos.shape[-1] // 2
        signed = torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)[:, None]
        step.rotation = cos, cos[0][:, None], signed
    return step.rotation[1:]
