# SPDX-License-Identifier: Apache-2.0
"""ShadowCache: long contexts in a fraction of the memory, as a cache for transformers' `generate`."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs

from fastpost.generate.shadow.layer import ShadowLayer
from fastpost.generate.shadow.rope import Rope, rotates
from fastpost.generate.shadow.rows import WHO, Rows
from fastpost.generate.shadow.store import Sizes
from fastpost.generate.shadow.values import ValueFile
from fastpost.hf.cached_attention import take_over

SHARE = 160 / 1024  # ShadowKV's rank for eight key heads of 128


class ShadowCache(Cache):
    """Keys of a long prompt as low-rank factors, values in host memory; each new token attends to the chunks it needs.

        out = model.generate(**inputs, past_key_values=fastpost.ShadowCache(model.config))

    Source: ShadowKV (arXiv 2410.21465). The prompt is attended to densely. Then, layer by layer, its keys are turned
    back to before RoPE and factorised over all key heads together; each `chunk` of tokens gets a landmark, the mean of
    its rotated keys; chunks that their landmark stands for badly stay exact (`outliers`), and so do the last `local`
    ones. A new token chooses `budget` tokens for each key head by the landmarks, rebuilds those keys it did not have
    from the step before, and attends to [chosen | outliers | local and new tokens].

    Works for models of transformers that rotate whole keys by cos and sin (Llama, Qwen, Mistral, Phi, Gemma, SmolLM,
    Cohere, GLM, …): any number of key heads, any head size, every kind of RoPE, QK-norm, layers without RoPE. Layers
    with a sliding window keep transformers' own cache. The constructor sets the model's attention function
    (fastpost.hf.cached_attention), so pass the config of the model itself; other caches work with it as before.

    A prompt that comes in one call is compressed in that call, layer by layer. One that comes in several
    (prefill_chunk_size, turns of a chat) stays dense until the first single token. After that, inputs of up to 32
    tokens (speculation) choose chunk by chunk, each token for itself; longer ones attend to all chunks.

    Rows of unequal length are padded as usual; nothing is computed or kept for padding. Rows that came from one prompt
    (`fork`, `batch_repeat_interleave`, beams) read one compressed prompt.

    Args:
        config: `model.config`.
        rank: of the factors, at most key heads · head size. None: in the proportion 160 of 1024.
        budget: tokens that are chosen for each key head, a multiple of `chunk`.
        chunk: tokens of a chunk.
        local: chunks at the end of the prompt that stay dense.
        outliers: chunks of each key head that stay exact. None: 48 for each 2048 of budget.
        bits: 8 keeps factors and landmarks in int8 with scales; None in the model's dtype.
        value_bits: 8 keeps values in int8 with scales; None in the model's dtype.
        value_file: a path, where nothing is yet, of a file that holds the values instead of memory (CPU only). It is
            removed when the cache goes.
        generated: "keep" leaves new tokens and later inputs dense, however many. "fold" compresses them too, 8 chunks
            at a time once they leave the local window, in the directions of the prompt; a chunk that those miss by more
            than twice the prompt's own error stays exact (up to `outliers` for each key head, the worst ones). A prompt
            that was too short is then compressed when the row is long enough.
        dense_below: rows of fewer tokens stay dense. None: budget, outliers and local window together.

    Raises:
        ValueError: options out of range, rank above the width, a model that this cache does not suit; later, another
            model, other rows, or a mask that does not fit.
        OSError: the value file cannot be made, or its disk is full.
    """

    def __init__(self, config, rank: int | None = 160, budget: int = 2048, chunk: int = 8, *, local: int = 4,
                 outliers: int | None = None, bits: int | None = 8, value_bits: int | None = None, value_file=None,
                 generated: Literal["keep", "fold"] = "keep", dense_below: int | None = None) -> None:  # fmt: skip
        text = config.get_text_config(decoder=True)
        kinds, options = get_layer_types_and_kwargs(text)
        if outliers is None:
            outliers = 48 * budget // 2048
        _check(budget, chunk, local, outliers, bits, value_bits, generated, dense_below)
        if "full_attention" not in kinds:
            raise ValueError(
                f"[{WHO}] config: expected layers of full attention, got only {', '.join(sorted(set(kinds)))} in "
                f"{type(text).__name__}. There is nothing to compress; use transformers' DynamicCache."
            )
        if dense_below is None:
            dense_below = budget + (outliers + local) * chunk
        self.rows = Rows(chunk, local, dense_below, generated == "fold", Rope(text))
        file = None if value_file is None else ValueFile(value_file)
        layers = []
        for index, (kind, option) in enumerate(zip(kinds, options)):
            if kind != "full_attention":
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**option))
                continue
            heads, dim = self.shape_of(text, index)
            width = heads * dim
            r = max(1, round(width * SHARE)) if rank is None else rank
            if not 1 <= r <= width:
                raise ValueError(
                    f"[{WHO}] rank: expected 1 to {width}, the width of the keys of layer {index} ({heads} key heads "
                    f"of {dim}), got {rank}. rank=None takes {max(1, round(width * SHARE))}, ShadowKV's proportion."
                )
            sizes = Sizes(heads, dim, r, budget // chunk, chunk, local, outliers, bits, value_bits,
                          generated == "fold", rotates(text, index))  # fmt: skip
            layers.append(ShadowLayer(index, sizes, self.rows, file))
        super().__init__(layers=layers)
        self.file = file
        take_over(config)

    @staticmethod
    def shape_of(config, layer: int = 0) -> tuple[int, int]:
        """(key heads, head size) of a layer, by the model's config: their product is the width of its keys."""
        text = config.get_text_config(decoder=True).per_layer_config[layer]
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        dim = getattr(text, "head_dim", None) or getattr(text, "kv_channels", None)  # JetMoE's name
        return heads, dim or text.hidden_size // text.num_attention_heads

    @property
    def shadow_layers(self) -> list[ShadowLayer]:
        return self.rows.layers

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"[{WHO}] layer {layer_idx}: this cache was made for a model of {len(self.layers)} layers. A cache "
                "belongs to the model whose config it was made with."
            )
        layer = self.layers[layer_idx]
        if isinstance(layer, ShadowLayer) and self.file is not None and key_states.is_cuda:
            raise ValueError(f"[{WHO}] value_file: expected a model on the CPU, got {key_states.device}.")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    # ---- other rows ----

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row beam_idx[i] was. Compressed prompts stay where they are."""
        self._select(beam_idx)
        for layer in self._others():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times; they read one compressed prompt."""
        self._select(torch.arange(len(self.rows.length)).repeat_interleave(repeats))
        for layer in self._others():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only, and the prompts that they read."""
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices)
        prompts = self.rows.drop_unread()
        if prompts is not None:
            for layer in self.shadow_layers:
                layer.keep_prompts(prompts)
        for layer in self._others():
            layer.batch_select_indices(indices)

    def fork(self, rows: torch.Tensor | list[int] | None = None) -> ShadowCache:
        """A cache of its own that goes on from here with these rows (None: all). Compressed prompts are shared until
        one of the two folds into them; what is dense is copied."""
        other = copy.copy(self)
        other.rows = self.rows.forked()
        other.layers = [layer.forked(other.rows) if isinstance(layer, ShadowLayer) else copy.deepcopy(layer)
                        for layer in self.layers]  # fmt: skip
        if rows is not None:
            other.reorder_cache(torch.as_tensor(rows))
        return other

    def _select(self, rows: torch.Tensor) -> None:
        wanted = rows.tolist()
        if not self.rows.length or wanted == list(range(len(self.rows.length))):
            return
        self.rows.select(wanted)
        for layer in self.shadow_layers:
            layer.select(rows)

    def _others(self) -> list:
        return [layer for layer in self.layers if not isinstance(layer, ShadowLayer)]

    # ---- fewer tokens ----

    def crop(self, tokens_to_remove: int) -> None:
        """Take off the last tokens (a negative number, as in transformers) of all rows. In the dense tail that leaves
        no trace. Below it the prompt is cut at a chunk, and the tokens of the last, partial chunk come back as dense
        ones, with the keys that their factors make."""
        if tokens_to_remove > 0:
            raise ValueError(f"[{WHO}] crop: expected minus the number of tokens to take off, got {tokens_to_remove}.")
        columns, old = self.rows.columns, list(self.rows.counts)
        if tokens_to_remove and -tokens_to_remove >= columns:
            self.reset()
            return
        if tokens_to_remove:
            plan = self.rows.crop(-tokens_to_remove)
            for layer in self.shadow_layers:
                layer.crop(plan, old)
        for layer in self._others():
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens; the space in a value file is used again."""
        self.rows.reset()
        for layer in self.layers:
            layer.reset()

    # ---- what it costs ----

    def errors(self) -> list[torch.Tensor | None]:
        """|K - factors| / |K| of each layer's prompts [P], by the truncation to `rank` alone; None where nothing is
        compressed."""
        found = {layer.index: layer.store.error for layer in self.shadow_layers if layer.store is not None}
        return [found.get(index) for index in range(len(self.layers))]

    def memory(self) -> dict:
        """Bytes, of all layers and rows together but for `per_token_layer`.

        per_token_layer: factors and landmarks of a compressed token in one layer: what grows with the prompt on the
        model's device. dense_per_token_layer: the same of a plain cache. factors, landmarks: these as allocated.
        values: of the store in host memory. value_file: of the file. constant: bases, slots and outliers. tail: local
        and new tokens, and prompts that stay dense. rope: tables of cos and sin. sliding: layers of transformers.
        """
        result = dict.fromkeys(("factors", "landmarks", "values", "value_file", "constant", "tail", "rope"), 0)
        per_token = []
        for layer in self.shadow_layers:
            s = layer.sizes
            if layer.tail_keys is not None:
                result["tail"] += 2 * layer.tail_keys.nbytes
            if layer.store is None:
                continue
            grows = layer.store.growing_bytes()
            result["factors"] += grows["u"] + grows["u_scale"]
            result["landmarks"] += grows["landmark"] + grows["landmark_scale"]
            per_token.append(sum(grows.values()) / (layer.store.prompts * layer.store.chunks * s.chunk))
            result["value_file" if self.file is not None else "values"] += layer.store.values.bytes()
            rows = (layer.resident, layer.kept, layer.fixed, layer.slots, layer.slot_values, layer.fold_error)
            result["constant"] += layer.store.constant_bytes() + sum(t.nbytes for t in rows if t is not None)
        result["rope"] = sum(t.nbytes for pair in (self.rows.line, self.rows.own) for t in pair or ())
        result["sliding"] = sum(2 * layer.keys.nbytes for layer in self._others()
                                if getattr(layer, "keys", None) is not None)  # fmt: skip
        result["per_token_layer"] = max(per_token, default=0.0)
        first = self.shadow_layers[0]
        size = first.dtype.itemsize if first.is_initialized else 2
        result["dense_per_token_layer"] = max(2 * la.sizes.heads * la.sizes.dim * size for la in self.shadow_layers)
        return result


def _check(budget, chunk, local, outliers, bits, value_bits, generated, dense_below) -> None:
    for name, value, least in (("chunk", chunk, 1), ("budget", budget, 1), ("local", local, 0),
                               ("outliers", outliers, 0), ("dense_below", dense_below, 0)):  # fmt: skip
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"[{WHO}] {name}: expected a whole number from {least} on, got {value}.")
    if budget % chunk:
        raise ValueError(f"[{WHO}] budget: expected a multiple of chunk ({chunk}), got {budget}.")
    for name, value in (("bits", bits), ("value_bits", value_bits)):
        if value not in (None, 8):
            raise ValueError(f"[{WHO}] {name}: expected 8 or None, got {value}.")
    if generated not in ("keep", "fold"):
        raise ValueError(f"[{WHO}] generated: expected 'keep' or 'fold', got {generated!r}.")
