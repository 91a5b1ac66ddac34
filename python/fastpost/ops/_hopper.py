# SPDX-License-Identifier: Apache-2.0
"""linear_logprob on Hopper GPUs with the GEMM inside the core (cuda/ops/linear_logprob_sm90.cu): logits never reach
memory. What the backward reads are exponentials, e^(z - m) with m the row's maximum in a tile of columns, kept by the
forward or made again: float16 holds them to 1/4096, where a logit of 20 in bfloat16 is off by 1/16, and p with it.
"""

from __future__ import annotations

import torch

from fastpost import _core


def tile_columns(hidden, weight, a) -> int:
    """Columns of a tile, or 0 where this path cannot run: it has bfloat16 and no low_rank."""
    return (
        0 if a is not None or hidden.dtype != torch.bfloat16 else _core.linear_logprob_forward_columns(hidden, weight)
    )


def forward(x, weight, bias, target, vocab_start, temperature, softcap, with_entropy, stats, exponentials, columns):
    """Folds x · weightᵀ into stats; exponentials? [n, v] are filled. Returns the maxima [tiles, n]."""
    tiles = -(-len(weight) // columns)
    partials = torch.empty(4 if with_entropy else 3, tiles, len(x), dtype=torch.float32, device=x.device)
    _core.linear_logprob_forward(x, weight, bias, target, vocab_start, temperature, softcap, with_entropy, exponentials,
                                 partials, stats)  # fmt: skip
    return partials[0]


# ---- what is kept: one tensor [·, V], so that the op's results look the same on every path ----


def kept_like(hidden, rows: int, v: int, columns: int) -> torch.Tensor:
    return hidden.new_empty(-(-_elements(rows, v, columns) // v), v)


def unpack(kept, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """exponentials [k, V] float16 and maxima [tiles, k] float32."""
    v = kept.shape[1]
    rows = kept.numel() // (v + 2 * -(-v // columns))
    rows -= _elements(rows, v, columns) > kept.numel()
    flat, tiles = kept.view(-1), -(-v // columns)
    begin = _elements(rows, v, columns) - rows * v
    exponentials = flat[begin : begin + rows * v].view(torch.float16).view(rows, v)
    return exponentials, flat[: 2 * tiles * rows].view(torch.float32).view(tiles, rows)


def _elements(rows: int, v: int, columns: int) -> int:
    """Maxima first, as float32, then exponentials from the next multiple of 16 bytes on."""
    return -(-2 * -(-v // columns) * rows // 8) * 8 + rows * v
