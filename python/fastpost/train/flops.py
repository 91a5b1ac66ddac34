# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs of a step, and how many a second the device could do: their ratio is the utilisation (MFU).

Counted is what the mathematics of the step needs: matrix products and attention, forward 2 a weight and token, gradient
of the input 2, gradient of the weight 2. So 6 for a trained weight, 4 for a frozen one with something trained below it,
2 for one without. Not counted: recomputation (that is what utilisation is to show), look-ups, norms, the optimizer. A
prompt that replies share counts once; the output matrix counts for scored tokens alone, as it is computed for them
alone; of experts those count that a token is sent to.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import torch

from fastpost.data.collate import Batch
from fastpost.nn.int4_packed import stands_for

PEAK = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "A10G": 125e12}
"""Dense bf16 FLOP/s by the vendor's data sheet, without sparsity."""


class Flops:
    """A model's FLOPs by the batch. `flops(batches)` is forward and backward over batches whose targets lie on the
    CPU."""

    def __init__(self, model: torch.nn.Module):
        config = model.config.get_text_config()
        self.per_token, self.per_scored = matrices(model)
        self.per_pair: dict[int | None, float] = {}  # by window
        for window, passes in zip(windows(config), attention_passes(model), strict=True):
            self.per_pair[window] = self.per_pair.get(window, 0.0) + passes * width(config)

    def __call__(self, batches: Sequence[Batch]) -> float:
        total = sum(self.per_token * b.tokens + self.per_scored * b.scored for b in batches)
        return total + sum(each * pairs(b, window) for window, each in self.per_pair.items() for b in batches)


def matrices(model: torch.nn.Module) -> tuple[float, float]:
    """FLOPs per token of everything but the output matrix, and per scored token of the output matrix.

    Parameters come in the order of the forward, as transformers' models define theirs. Whether a frozen matrix needs
    the gradient of its input is judged by what is trained before it in that order."""
    head = model.get_output_embeddings().weight
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    packed = stands_for(model)
    per_token, below = 0.0, False
    for _, p in model.named_parameters():
        if p.ndim > 1 and p is not head and id(p) not in lookups:
            per_token += _passes(p, below) * packed.get(id(p), p.numel()) * _active(model, p)
        below |= p.requires_grad
    return per_token, float(_passes(head, below and _trained_below_head(model, head)) * head.numel())


def attention_passes(model: torch.nn.Module) -> list[int]:
    """FLOPs per head width and pair of tokens of each layer: two products forward (4), four backward (8) when anything
    in the layer or below it is trained."""
    layers = model.config.get_text_config().num_hidden_layers
    first = layers
    for name, p in model.named_parameters():
        if p.requires_grad:
            found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
            is_head = p is model.get_output_embeddings().weight and p is not model.get_input_embeddings().weight
            first = min(first, int(found[1]) if found else layers if is_head or "norm" in name else 0)
    return [12 if layer >= first else 4 for layer in range(layers)]


def windows(config) -> list[int | None]:
    """How far back each layer's attention sees, in tokens with its own; None = all the way."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):  # Qwen writes a window that it does not use
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def width(config) -> int:
    """Width of all query heads together."""
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def pairs(batch: Batch, window: int | None = None) -> float:
    """Pairs of a token and one that it sees, itself included."""
    own = batch.cu_seqlens.diff().double()
    past = torch.zeros_like(own) if batch.cu_seqlens_k is None else batch.cu_seqlens_k.diff() - own

    def sum_to(n):  # 1 + 2 + ... + n
        return n * (n + 1) / 2

    seen = sum_to(past + own) - sum_to(past)
    if window is not None:  # token i (from 1) sees min(i, window)
        over = [torch.clamp(n - window, min=0) for n in (past + own, past)]
        seen -= sum_to(over[0]) - sum_to(over[1])
    return float(seen.sum())


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s: the data sheet's for a known GPU, None for another. On a CPU, whose data sheet says little about the
    share of it that this process has, the best plain matrix product of 0.2 s, in float32 or `dtype`, whichever is
    quicker (a CPU without bfloat16 units does better in float32). Other load at that moment makes it too small."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in PEAK.items() if key in name), None)
    return max(_measured(kind) for kind in {torch.float32, dtype})


def _measured(dtype: torch.dtype, seconds: float = 0.1) -> float:
    a, b = (torch.ones(512, 1024, dtype=dtype) for _ in range(2))
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        begin = time.perf_counter()
        a @ b.T
        best = min(best, time.perf_counter() - begin)
    return 2.0 * 512 * 512 * 1024 / best


def _passes(weight: torch.Tensor, below: bool) -> int:
    return 2 + 2 * below + 2 * weight.requires_grad


def _trained_below_head(model: torch.nn.Module, head: torch.Tensor) -> bool:
    """Whether the final hidden states need a gradient: a trained parameter other than the output matrix, or that one
    when it is the embedding, too."""
    tied = model.get_input_embeddings().weight is head
    return any(p.requires_grad and (tied or p is not head) for p in model.parameters())


def _active(model: torch.nn.Module, weight: torch.Tensor) -> float:
    """Share of a weight that one token meets: top k of n experts where they are stacked in one parameter."""
    config = model.config.get_text_config()
    experts = next((n for k in ("num_local_experts", "num_experts", "n_routed_experts")
                    if (n := getattr(config, k, None))), None)  # fmt: skip
    if weight.ndim == 3 and experts and len(weight) == experts:
        return config.num_experts_per_tok / experts
    return 1.0
