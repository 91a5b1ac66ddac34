# SPDX-License-Identifier: Apache-2.0
"""paged_attention: attention on keys and values that lie in pages. Kernel: cpp/ops/paged_attention.cpp."""

from __future__ import annotations

import torch

from fastpost.reference import paged_attention as reference


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    length: torch.Tensor,
    *,
    value_table: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    key_row: torch.Tensor | None = None,
    value_row: torch.Tensor | None = None,
    new_keys: torch.Tensor | None = None,
    new_values: torch.Tensor | None = None,
    begun: tuple[torch.Tensor, torch.Tensor] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scaling · q · K) · V for decoding, for prompts after a cached prefix, and for whole prompts.

    Args:
        query: [T, H, d] float32, bfloat16 or float16: the rows of B sequences, one after the other.
        keys, values: [R, G, P, page, d] pools of pages, any strides but along the last dimension; H a multiple of G.
        table: [B, 1 or G, N] int32: the page of positions [i · page, (i + 1) · page) of each sequence (and key head);
            -1: not there, its positions count but are not seen.
        length: [B] int32: positions of each sequence, those of its query rows included; they are the last. Row i of n
            sees the first length - (n - 1 - i).
        value_table: the same for values. None: `table`.
        cu_seqlens: [B + 1] int32, bounds of each sequence's rows. None: one row each.
        key_row, value_row: [B] int32, which of the R pools. None: the only one, or row b.
        new_keys, new_values: [T, G, d]: written into the pools first, at the positions of their rows.
        begun: (out [T, H, d] float32, lse [T, H] float32) of keys attended to elsewhere; the softmax goes on.
        scaling: None: d^-0.5. softcap: c · tanh(logits / c). window: a row sees at most so many positions, itself
            included.
        return_lse: also [T, H] float32, log Σ exp of the logits (-inf where nothing is seen; out is 0 there).
        out_dtype: float32, or None: the dtype of query.

    Sums are float32. The bits of a row do not depend on other sequences, nor on the number of threads.

    Raises:
        ValueError: wrong dtype, shape, layout or device; an input that requires grad.
    """
    return reference.paged_attention(
        query, keys, values, table, length, value_table=value_table, cu_seqlens=cu_seqlens, key_row=key_row,
        value_row=value_row, new_keys=new_keys, new_values=new_values, begun=begun, scaling=scaling, softcap=softcap,
        window=window, return_lse=return_lse, out_dtype=out_dtype,
    )  # fmt: skip
