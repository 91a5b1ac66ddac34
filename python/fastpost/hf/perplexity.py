# SPDX-License-Identifier: Apache-2.0
"""Perplexity of one long text under a model, in windows that overlap as much as one likes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch

from fastpost.hf import adapter, folder, lora
from fastpost.hf.model import head
from fastpost.ops.linear_logprob import linear_logprob
from fastpost.train.progress import progress


class Perplexity(NamedTuple):
    """loss: sum of negative log-probs, in nats, of `tokens` scored tokens in `windows` windows."""

    loss: float
    tokens: int
    windows: int

    @property
    def mean(self) -> float:
        return self.loss / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean) if self.mean < 700 else math.inf


def spans(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first scored, end) of each window: a window begins `stride` tokens after the one before it and scores
    what no earlier one has. No token is scored twice, and none without a token before it in its window."""
    found, scored = [], 1
    for begin in range(0, max(tokens - 1, 0), stride):
        end = min(begin + window, tokens)
        first = max(scored, begin + 1)  # without an overlap a window's first token has nothing before it in the window
        if first < end:
            found.append((begin, first, end))
        scored = end
        if end == tokens:
            break
    return found


@torch.no_grad()
def perplexity(
    model: torch.nn.Module, tokens: torch.Tensor, window: int = 2048, stride: int | None = None
) -> Perplexity:
    """Perplexity of tokens int64 [T].

    window: tokens that the model is given at once. stride: how far the next window begins after this one. None:
    window - 1, so that each window begins with the last token of the one before and every token but the very first is
    scored; less gives each token a longer past, at more work. stride = window is how tables of quantised models are
    made: the first token of each window is not scored.

    Raises:
        ValueError: fewer than two tokens, a window below 2, a stride outside 1 to window, a head that is not linear.
    """
    stride = window - 1 if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(
            f"[perplexity] window, stride: expected 2 or more and 1 to window, got {window} and {stride}. Change them."
        )
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(
            f"[perplexity] tokens: expected two or more in a row, got {list(tokens.shape)}. Give more text."
        )
    parts, loss, count = head(model), 0.0, 0
    device, backbone = next(model.parameters()).device, lora.inner(model).base_model
    found = spans(len(tokens), window, stride)
    for begin, first, end in progress(found, "perplexity", unit="windows"):
        ids = tokens[begin:end].to(device)
        hidden = backbone(input_ids=ids[None], use_cache=False).last_hidden_state[0, first - begin - 1 : -1]
        logprob = linear_logprob(
            hidden.to(parts.weight.dtype), parts.weight, ids[first - begin :], bias=parts.bias,
            softcap=parts.softcap, temperature=parts.temperature,
        )  # fmt: skip
        loss -= float(logprob.double().sum())
        count += end - first
    return Perplexity(loss, count, len(found))


def load(path: str | Path, dtype: torch.dtype) -> torch.nn.Module:
    """A model, adapter or run folder, quantised or not, in eval mode. What its note says of rounded activations
    (SmoothQuant) is done."""
    from fastpost.quantize.output import read_note
    from fastpost.quantize.smoothquant import round_activations

    place = folder.locate(path)
    model = adapter.load_place(place, dtype, "sdpa", check=False)
    note = read_note(place.base)
    if note and note.get("activation_bits"):
        layers = {name for name, _ in lora.inner(model).named_modules()} & set(note["activation_layers"])
        round_activations(lora.inner(model), note["activation_bits"], sorted(layers))
    return model
