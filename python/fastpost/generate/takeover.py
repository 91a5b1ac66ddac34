# SPDX-License-Identifier: Apache-2.0
"""A model in the engine's hands: what it must know of it, what it changes and puts back."""

from __future__ import annotations

import os

import torch

from fastpost.hf import cached_attention

STRETCHED = ("dynamic", "longrope")
"""RoPE whose frequencies depend on the longest sequence of a batch: one sequence would change the others."""


class Takeover:
    """Eval mode and attention through caches, from now until undo()."""

    def __init__(self, model):
        self._training = [module for module in model.modules() if module.training]
        configs = {id(c): c for c in (model.config, model.config.get_text_config())}
        self._attention = [(config, config._attn_implementation) for config in configs.values()]
        model.eval()
        for config in configs.values():
            cached_attention.take_over(config)

    def undo(self) -> None:
        for config, name in self._attention:
            config._attn_implementation = name
        for module in self._training:
            module.training = True


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


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
