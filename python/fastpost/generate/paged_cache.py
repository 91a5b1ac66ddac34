# SPDX-License-Identifier: Apache-2.0
"""The tensors of the paged cache, as a transformers Cache whose layers attend by themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from fastpost.hf import cached_attention
from fastpost.hf.cached_attention import CachedLength, SelfAttendingLayer
from fastpost.ops.paged_attention import paged_attention


class UnsupportedModel(ValueError):
    """A model whose attention is not a paged cache's business."""


@dataclass(frozen=True)
class LayerShape:
    """What a layer keeps of a token: `heads` keys and values of `dim`."""

    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return 2 * self.heads * self.dim * self.dtype.itemsize


@dataclass
class Step:
    """Who is in the packed row of one forward. Sequence b owns rows cu_seqlens[b] : cu_seqlens[b + 1] of it and has
    length[b] positions with them, in the pages table[b]."""

    table: torch.Tensor  # [B, 1, N] int32
    length: torch.Tensor  # [B] int32
    cu_seqlens: torch.Tensor | None  # [B + 1] int32; None: one row each
    rotation: tuple | None = None  # of lean_layers: what all layers turn queries and keys by


class _Layer(SelfAttendingLayer):
    is_sliding = False

    def __init__(self):
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states) -> None:
        pass

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return CachedLength(query_length), 0

    def get_seq_length(self) -> int:
        return 0  # positions come with every call, as position_ids

    def get_max_length(self) -> int:
        return -1


class _Recorder(_Layer):
    """Sees what a model keeps, keeps nothing."""

    shape = None

    def attend(self, query, key, value, padding, *, scaling, softcap, window, position_ids):
        if key.shape != value.shape or key.shape[3] != query.shape[3]:
            raise UnsupportedModel(
                f"[Engine] model: expected keys, values and queries of one head size, got {list(key.shape)}, "
                f"{list(value.shape)} and {list(query.shape)}. Use the model's own generate()."
            )
        self.shape = LayerShape(key.shape[1], key.shape[3], key.dtype, key.device)
        return torch.zeros_like(query).transpose(1, 2)


class PagedLayer(_Layer):
    """One layer's pages: keys and values [1, G, P, page, d]."""

    def __init__(self, cache: PagedCache, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.cache, self.keys, self.values = cache, keys, values

    def attend(self, query, key, value, padding, *, scaling, softcap, window, position_ids):
        rows = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
        return self.attend_rows(*rows, scaling=scaling, softcap=softcap, window=window)[None]

    def attend_rows(self, query, key, value, *, scaling, softcap=None, window=None):
        """query [T, H, d], key and value [T, G, d] -> [T, H, d]."""
        step = self.cache.step
        return paged_attention(
            query, self.keys, self.values, step.table, step.length, cu_seqlens=step.cu_seqlens, new_keys=key,
            new_values=value, scaling=scaling, softcap=softcap, window=window,
        )  # fmt: skip


class PagedCache(Cache):
    """`pages` pages of `page` positions for all `layers`. Set `step` before each forward of a packed row."""

    def __init__(self, shapes: list[LayerShape], pages: int, page: int):
        self.step: Step | None = None
        # One tensor for all layers of a shape, so that copying a page is one operation.
        self.stores: list[torch.Tensor] = []
        layers: list = [None] * len(shapes)
        for shape in dict.fromkeys(shapes):
            which = [i for i, s in enumerate(shapes) if s == shape]
            size = (len(which), 2, pages, shape.heads, page, shape.dim)
            store = torch.empty(size, dtype=shape.dtype, device=shape.device)
            self.stores.append(store)
            for n, i in enumerate(which):
                layers[i] = PagedLayer(self, *(pool.transpose(0, 1)[None] for pool in store[n]))
        super().__init__(layers=layers)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy pages (from, to) of every layer."""
        source, target = ([pair[i] for pair in pairs] for i in (0, 1))
        for store in self.stores:
            store[:, :, target] = store[:, :, source]


def layer_shapes(model) -> list[LayerShape]:
    """What each layer of the model keeps, by a forward of one token. The model must attend through cached_attention.
    Raises UnsupportedModel."""
    text = model.config.get_text_config()
    name = type(model).__name__
    kinds = {*(getattr(text, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedModel(
            f"[Engine] model: expected layers of full or sliding-window attention, got {name} with "
            f"{', '.join(sorted(kinds))}. Use the model's own generate()."
        )
    cache = Cache(layers=[_Recorder() for _ in range(text.num_hidden_layers)])
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model(input_ids=ids, position_ids=ids, past_key_values=cache, use_cache=True)
    if any(layer.shape is None for layer in cache.layers):
        raise UnsupportedModel(
            f"[Engine] model: {name} does not attend through its cache in layer "
            f"{next(i for i, layer in enumerate(cache.layers) if layer.shape is None)} ('{cached_attention.NAME}' was "
            "not called with the cache's keys). Use the model's own generate()."
        )
    return [layer.shape for layer in cache.layers]
