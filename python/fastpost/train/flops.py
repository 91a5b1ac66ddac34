# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs of a step, and how many a second the device could do: their ratio is the utilisation (MFU)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from fastpost.data.collate import Batch

PEAK = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "A10G": 125e12}
"""Dense bf16 FLOP/s by the vendor's data sheet, without sparsity."""


def step_flops(model: torch.nn.Module, batches: Sequence[Batch]) -> float:
    """Forward and backward: 6 per trained and 4 per frozen matrix weight and token, 12 * layers * width of the heads
    per pair of a token and one that it sees. A prompt that replies share is computed and counted once.

    An embedding that is not also the output matrix is a look-up and counts nothing; recomputation counts nothing.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    unused = {id(ends[0])} - {id(ends[1])}
    each = sum(
        p.numel() * (6.0 if p.requires_grad else 4.0)
        for name, p in model.named_parameters()
        if p.ndim > 1 and id(p) not in unused and "original_module" not in name  # peft's spare of what is trained whole
    )
    tokens = sum(b.tokens for b in batches)
    pairs = 0.0
    for b in batches:
        own = b.cu_seqlens.diff().double()
        seen = own if b.cu_seqlens_k is None else b.cu_seqlens_k.diff()
        pairs += float((own * (seen - own / 2)).sum())
    return each * tokens + 12.0 * config.num_hidden_layers * width * pairs


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s: the data sheet's for a known GPU (None for another), a measured plain matrix product on a CPU (0.1 s)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in PEAK.items() if key in name), None)
    a, b = (torch.ones(512, 1024, dtype=dtype) for _ in range(2))
    best, stop = float("inf"), time.perf_counter() + 0.1
    while time.perf_counter() < stop:
        begin = time.perf_counter()
        a @ b.T
        best = min(best, time.perf_counter() - begin)
    return 2.0 * 512 * 512 * 1024 / best
