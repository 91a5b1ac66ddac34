# SPDX-License-Identifier: Apache-2.0
"""How a transformers model rotates its keys: the tables it uses, and the way back from a rotated key.

The model's own rotary class computes the tables, so every variant of RoPE (linear, dynamic, yarn, longrope, llama3,
partial, one per layer type) is the model's. Which dimensions its function turns together is found by trying.
"""

from __future__ import annotations

import inspect
import sys

import torch

from fastpost.reference.kv_reconstruct import rotate

WHO = "ShadowCache"


class Rope:
    """The rotation of one model's full-attention layers.

    width: w, so that dimension k of a key turns with k + w, once `order` has put the key's dimensions in place.
    order: None, or the order [2w] of a model that turns dimensions 2k and 2k + 1.
    changing: whether the table of a position depends on how long the input is (dynamic, longrope).
    """

    def __init__(self, config) -> None:
        if getattr(config, "kv_lora_rank", None):
            _refuse(config, "keys that are factors already (multi-head latent attention)")
        if config.model_type == "diffllama":  # a cache that attends by itself would never hear of it
            _refuse(config, "values that are rearranged between cache and attention")
        module = _modeling_module(config)
        apply = getattr(module, "apply_rotary_pos_emb", None)
        names = [n for n in vars(module) if n.endswith("RotaryEmbedding") and "Vision" not in n]
        if apply is None or not names:
            _refuse(config, "no rotary embedding as Llama's")
        with torch.device("cpu"):
            self.rotary = getattr(module, names[0])(config)
        self.options = {}
        if "layer_type" in inspect.signature(self.rotary.forward).parameters:
            self.options["layer_type"] = "full_attention"
        kinds = getattr(self.rotary, "rope_type", "default")
        kind = kinds.get("full_attention", "default") if isinstance(kinds, dict) else kinds
        self.changing = "dynamic" in kind or kind == "longrope"
        self.order: torch.Tensor | None = None
        with torch.device("cpu"):
            self._find_layout(config, apply)

    def _find_layout(self, config, apply) -> None:
        """Which half of the model's table counts, and which dimensions it turns together."""
        found = self._raw(torch.arange(1, 4)[None], torch.zeros((), dtype=torch.float32))
        if not isinstance(found, tuple) or found[0].is_complex():
            _refuse(config, "a rotary embedding of complex numbers")
        cos, sin = found
        wide = cos.shape[-1]
        for width, columns in ((wide // 2, slice(0, wide // 2)), (wide // 2, slice(0, None, 2)), (wide, slice(None))):
            key = torch.randn(1, 1, 3, 2 * width, generator=torch.Generator().manual_seed(0))
            try:
                want = apply(key, key, cos, sin)[1]
            except RuntimeError:  # made for keys of another width
                continue
            c, s = cos[:, None, :, columns], sin[:, None, :, columns]
            pairs = torch.arange(2 * width).view(width, 2).T.flatten()
            for order in (None, pairs):
                got = rotate(key if order is None else key[..., order], c, s)
                if torch.allclose(got, want if order is None else want[..., order], atol=1e-5):
                    self.width, self.columns, self.order = width, columns, order
                    return
        _refuse(config, "a rotation that is neither of halves nor of neighbours")

    def _raw(self, position_ids: torch.Tensor, like: torch.Tensor):
        return self.rotary(like, position_ids, **self.options)

    @torch.no_grad()
    def tables(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [..., w] of position_ids [R, T], rounded to `dtype` as the model has them. The model's changing
        variants look at the largest position, so pass what the model was called with."""
        like = torch.zeros((), dtype=dtype, device=position_ids.device)
        self.rotary.to(position_ids.device)
        cos, sin = self._raw(position_ids, like)
        cos, sin = cos[..., self.columns], sin[..., self.columns]
        if dtype == torch.float16:  # kv_reconstruct takes float32 or bfloat16
            cos, sin = cos.float(), sin.float()
        return cos.contiguous(), sin.contiguous()

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        """The dimensions of x [..., d] as `width` has them. Queries and keys alike, so products stay."""
        if self.order is None:
            return x
        self.order = self.order.to(x.device)
        return torch.cat([x[..., : 2 * self.width][..., self.order], x[..., 2 * self.width :]], -1)


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., S, d] before its rotation by cos and sin [S, w]: the exact inverse for tables that were scaled or rounded
    too, where cos² + sin² is not 1. In float32, returned in the dtype of x."""
    c, s = cos.float(), sin.float()
    norm = c * c + s * s
    return rotate(x.float(), c / norm, -s / norm).to(x.dtype)


def rotates(config, layer: int) -> bool:
    """Whether this full-attention layer rotates its keys at all. (A wrong answer would cost rank, not correctness.)"""
    flags = getattr(config, "no_rope_layers", None)
    if flags:
        return bool(flags[layer])
    hybrid = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return not (config.model_type in ("cohere2", "cohere2_moe", "exaone4", "exaone_moe") and hybrid)


def _modeling_module(config):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return sys.modules[(found[0] if isinstance(found, tuple) else found).__module__]
    _refuse(config, "a configuration that transformers has no causal model for")


def _refuse(config, why: str):
    raise ValueError(
        f"[{WHO}] config: expected a Llama-like model that rotates keys by cos and sin, got {why} in "
        f"{type(config).__name__} (model_type '{config.model_type}'). Use transformers' DynamicCache for this model."
    )
