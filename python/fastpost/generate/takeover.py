# SPDX-License-Identifier: Apache-2.0
"""A model in the engine's hands: what it must know of it, what it changes and puts back."""

from __future__ import annotations

import os

import torch

from fastpost.generate.lean_layers import restore_layers, use_lean_layers
from fastpost.hf import cached_attention
from fastpost.nn.decode_linear import DecodeLinear, use_decode_linear

STRETCHED = ("dynamic", "longrope")
"""RoPE whose frequencies depend on the longest sequence of a batch: one sequence would change the others."""


class Takeover:
    """Eval mode, attention through caches, lean layers and, on a CPU, linear layers for few rows: from apply() until
    undo()."""

    def __init__(self, model):
        self.model = model
        self._applied = False
        self._training = self._linear = self._layers = self._attention = ()  # what undo() puts back

    def apply(self) -> None:
        if self._applied:
            return
        self._applied = True
        model = self.model
        self._training = [module for module in model.modules() if module.training]
        model.eval()
        plain = [module for module in model.modules() if type(module) is torch.nn.Linear]
        if model.device.type == "cpu":
            use_decode_linear(model)
        self._linear = [module for module in plain if type(module) is DecodeLinear]
        self._layers = use_lean_layers(model)
        configs = {id(c): c for c in (model.config, model.config.get_text_config())}
        self._attention = [(config, config._attn_implementation) for config in configs.values()]
        for config in configs.values():
            cached_attention.take_over(config)

    def undo(self) -> None:
        if not self._applied:
            return
        self._applied = False
        for config, name in self._attention:
            config._attn_implementation = name
        for module in self._training:
            module.training = True
        for module in self._linear:
            module.__class__ = torch.nn.Linear
        restore_layers(self._layers)

    def check(self) -> None:
        """Raises ValueError when the model is not as apply() left it."""
        name = self._attention[0][0]._attn_implementation
        if not self._applied or name != cached_attention.NAME:
            raise ValueError(
                f"[Engine] model: expected it as this engine set it up, got its attention function back at '{name}'. "
                "After pause() call resume(), and let no two engines have a model at the same time."
            )


def end_tokens(model, tokenizer) -> frozenset[int]:
    """Ids that end an answer: the generation config's, else the model config's, else the tokenizer's."""
    for holder in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        found = getattr(holder, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def longest(model) -> int:
    """Positions that the model has; those of its first stretch where RoPE would stretch the batch."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 2**31 - 1
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for kind in kinds:
        if kind.get("rope_type") in STRETCHED:
            first = kind.get("original_max_position_embeddings")
            limit = min(limit, first or getattr(config, "original_max_position_embeddings", None) or limit)
    return limit


def pages_for(device: torch.device, bytes_of_page: int, page: int, sequences: int, usual: int, most: int) -> int:
    """Pages for `sequences` of `usual` tokens in a quarter of what memory is free, but for one of `most` in three."""
    free = free_memory(device) // 4 // bytes_of_page
    return max(1, min(-(-usual // page) * sequences, free), min(-(-most // page), 3 * free))


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
