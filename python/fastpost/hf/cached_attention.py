# SPDX-License-Identifier: Apache-2.0
"""Attention by the cache itself, as a transformers attention function named "fastpost_cached".

transformers hands a layer's new keys and values to the cache and what comes back to the attention function, beside the
query. A cache that keeps no dense keys (paged, low-rank) needs the query too. So its layers derive from
`SelfAttendingLayer`: `update` hands on the new keys with the layer itself attached, and this attention function calls
the layer's `attend`. With any other cache, or none, it does what "fastpost_packed" does.

    take_over(model.config)      # or model.set_attn_implementation(NAME)
"""

from __future__ import annotations

import threading
import weakref
from abc import abstractmethod

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin

from fastpost.hf import attention as packed

NAME = "fastpost_cached"


_latest = threading.local()
"""`layer`: a weak reference to the one whose update was the last; for models that make other tensors of the keys before
they attend. Weak, so that a cache goes when its owner drops it."""


class CachedLength(int):
    """The length of a cache whose layers attend by themselves. Who asks for a mask of this length gets the padding mask
    [B, length] bool as it came, or None: causality is the layer's business."""


def register() -> None:
    """Make NAME known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def take_over(config) -> None:
    """Let the model that has this `config` attend through NAME from now on."""
    register()
    config._attn_implementation = NAME


class SelfAttendingLayer(CacheLayerMixin):
    """A cache layer that computes its own attention. Subclasses write `attend` and the rest of CacheLayerMixin, and
    return CachedLength from get_mask_sizes."""

    waiting = False  # between update and attend

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """[B, G, T, d] new keys (rotated) and values -> the same, for `attention` to find this layer by."""
        if self.waiting:
            self.waiting = False
            raise ValueError(
                f"[{type(self).__name__}] the model did not attend through this cache: its attention function is not "
                f"'{NAME}'. Pass the model's own config (model.config) to the cache, or call "
                f"model.set_attn_implementation('{NAME}')."
            )
        self.waiting = True
        key = key_states.detach()
        key.fastpost_layer, _latest.layer = self, weakref.ref(self)
        return key, value_states

    @abstractmethod
    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor | None, *,
               scaling: float | None, softcap: float | None, window: int | None,
               position_ids: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
        """query [B, H, T, d], new key and value [B, G, T, d], padding [B, tokens so far with these] bool or None ->
        [B, T, H, d]. Takes the new keys in."""


def mask(batch_size: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs):
    """The padding mask as it is for caches that attend by themselves, else fastpost_packed's."""
    if isinstance(kv_length, CachedLength):
        return attention_mask
    return packed.mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)


def attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              attention_mask: torch.Tensor | None, scaling: float | None = None, sliding_window: int | None = None,
              softcap: float | None = None, position_ids: torch.Tensor | None = None, **kwargs):  # fmt: skip
    """As transformers calls it -> (output [B, T, H, d], None)."""
    layer, repeats = getattr(key, "fastpost_layer", None), 1
    if layer is None and type(module).__name__ == "JetMoeAttention" and hasattr(_latest, "layer"):
        layer, repeats = _latest.layer(), module.top_k
        layer = layer if layer is not None and layer.waiting else None
    if layer is None:
        return packed.attention(module, query, key, value, attention_mask, scaling=scaling,
                                sliding_window=sliding_window, softcap=softcap, position_ids=position_ids,
                                **kwargs)  # fmt: skip
    layer.waiting = False
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"[{NAME}] {name}: {type(module).__name__} needs this term, and this attention has none.")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"[{NAME}] attention_mask: expected a padding mask [B, tokens], got shape {list(attention_mask.shape)}. A "
            "cache that attends by itself is causal and takes no other mask."
        )
    if repeats > 1:  # JetMoE has repeated its G keys, so that query head h is for key head h % G: they change places
        batch, heads, rows, dim = query.shape
        key, value = (t[:, : heads // repeats] for t in (key, value))
        query = query.view(batch, repeats, -1, rows, dim).transpose(1, 2).reshape(query.shape)
    out = layer.attend(query, key, value, attention_mask, scaling=scaling, softcap=softcap, window=sliding_window,
                       position_ids=position_ids)  # fmt: skip
    if repeats > 1:
        out = out.view(batch, rows, -1, repeats, dim).transpose(2, 3).reshape(out.shape)
    return out, None
