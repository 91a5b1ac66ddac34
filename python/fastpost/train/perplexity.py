# SPDX-License-Identifier: Apache-2.0
"""Perplexity of texts under a model, through the packed forward of training."""

from __future__ import annotations

from array import array

import torch

from fastpost.data.collate import Example, Sequence, collate
from fastpost.hf import folder
from fastpost.objectives import SFT

from .config import Config
from .device import pick_device
from .forward import forward
from .optim import COMPUTE_DTYPE


class ModelScorer:
    """Scores by the recipe's model, as fastpost.data.score wants it. Every token of a text is scored but the first, and
    that, too, where the tokenizer puts a BOS in front. A text longer than data.max_length is read in windows: each
    begins with the last token of the one before it, so every token is still scored once."""

    def __init__(self, cfg: Config, tokenizer):
        device, dtype = pick_device(cfg.train.device), COMPUTE_DTYPE[cfg.optim.precision]
        if cfg.train.threads:
            torch.set_num_threads(cfg.train.threads)
        self.model = folder.load_model(cfg.model.path, dtype, cfg.model.attention).to(device)
        self.device, self.tokenizer = device, tokenizer
        self.window, self.room = cfg.data.max_length, cfg.train.max_tokens_per_micro_batch
        bos = tokenizer.bos_token_id
        self.start = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> list[tuple[int, float | None]]:
        """(tokens without BOS, mean negative log-prob or None for a text with nothing to score) of each text."""
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        windows = [(i, w) for i, ids in enumerate(found) for w in self._windows([*self.start, *ids])]
        losses, counts = [0.0] * len(texts), [0] * len(texts)
        for part in self._parts(windows):
            batch = collate([Example(i, (Sequence(w, b"\0" + b"\1" * (len(w) - 1)),)) for i, w in part])
            out = forward(self.model, batch.to(self.device), SFT())
            for (i, w), logprob in zip(part, out.logprob.double().tolist(), strict=True):
                losses[i] -= logprob
                counts[i] += len(w) - 1
        return [(len(ids), loss / n if n else None) for ids, loss, n in zip(found, losses, counts)]

    def _windows(self, ids: list[int]) -> list[array]:
        step = self.window - 1
        return [array("i", ids[at : at + self.window]) for at in range(0, len(ids) - 1, step)]

    def _parts(self, windows: list[tuple[int, array]]) -> list[list[tuple[int, array]]]:
        parts, room = [], 0
        for i, window in windows:
            if not parts or len(window) > room:
                parts.append([])
                room = self.room
            parts[-1].append((i, window))
            room -= len(window)
        return parts
