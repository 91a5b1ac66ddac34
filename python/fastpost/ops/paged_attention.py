# SPDX-License-Identifier: Apache-2.0
"""paged_attention: attention on keys and values that lie in pages. Kernel: cpp/ops/paged_attention.cpp."""

from __future__ import annotations

import torch

from fastpost import _core
from fastpost.ops._register import USE_REFERENCE, expect_plain, may_skip_dispatcher, refuse_grad, register
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
        value_table: the same for values. None: `table`. What one of the two lacks is not seen.
        cu_seqlens: [B + 1] int32, bounds of each sequence's rows. None: one row each.
        key_row, value_row: [B] int32, which of the R pools. None: the only one, or row b.
        new_keys, new_values: [T, G, d]: written into the pools first, at the positions of their rows.
        begun: (out [T, H, d] float32, lse [T, H] float32) of keys attended to elsewhere; the softmax goes on.
        scaling: None: d^-0.5. softcap: c · tanh(logits / c). window: a row sees at most so many positions, itself
            included.
        return_lse: also [T, H] float32, log Σ exp of the logits (-inf where nothing is seen; out is 0 there).
        out_dtype: float32, or None: the dtype of query.

    Sums are float32. The bits of a row do not depend on other sequences' values, nor on the number of threads; on a
    GPU they do depend on shapes: how many rows there are to a sequence, and how many positions the table has room for.
    Where a sequence has many rows (a prompt), exponentials are rounded to bfloat16 before they multiply bfloat16
    values, as in torch's own attention; single rows keep float32 (on a CPU).

    Raises:
        ValueError: wrong dtype, shape, layout or device; an input that requires grad.
    """
    if USE_REFERENCE:
        return reference.paged_attention(
            query, keys, values, table, length, value_table=value_table, cu_seqlens=cu_seqlens, key_row=key_row,
            value_row=value_row, new_keys=new_keys, new_values=new_values, begun=begun, scaling=scaling,
            softcap=softcap, window=window, return_lse=return_lse, out_dtype=out_dtype,
        )  # fmt: skip
    if not (begun is None or (isinstance(begun, tuple) and len(begun) == 2)):
        raise ValueError(f"[paged_attention] begun: expected a pair (out, lse), got {type(begun).__name__}.")
    tensors = (query, keys, values, table, length, value_table, cu_seqlens, key_row, value_row, new_keys, new_values,
               *(begun or (None, None)))  # fmt: skip
    skip = may_skip_dispatcher(*tensors)
    if not skip:
        _explain(*tensors)
    if out_dtype not in (None, query.dtype, torch.float32):
        raise ValueError(f"[paged_attention] out_dtype: expected None, {query.dtype} or float32, got {out_dtype}.")
    if scaling is None:
        scaling = (query.shape[-1] or 1) ** -0.5 if query.ndim else 1.0
    rest = (scaling, softcap or 0.0, window or 0, return_lse, out_dtype == torch.float32)
    if skip:
        out, lse = _forward(*tensors, *rest)
        return (out, lse) if return_lse else out
    if new_keys is None and new_values is None:
        out, lse = _op(*tensors[:9], *tensors[11:], *rest)
    else:
        out, lse = _append_op(*tensors, *rest)
    return (out, lse) if return_lse else out


def _explain(query, keys, values, table, length, value_table, cu_seqlens, key_row, value_row, new_keys, new_values,
             begun_out, begun_lse):  # fmt: skip
    """Say what is wrong with the tensors, if anything is."""
    floats = {"query": query, "keys": keys, "values": values, "new_keys": new_keys, "new_values": new_values,
              "begun": begun_out, "begun lse": begun_lse}  # fmt: skip
    expect_plain("paged_attention", **floats, table=table, length=length, value_table=value_table,
                 cu_seqlens=cu_seqlens, key_row=key_row, value_row=value_row)  # fmt: skip
    refuse_grad("paged_attention", **floats)


def _forward(query, keys, values, table, length, value_table, cu_seqlens, key_row, value_row, new_keys, new_values,
             begun_out, begun_lse, scaling, softcap, window, with_lse, wide):  # fmt: skip
    """lse is None without with_lse."""
    out = torch.empty_like(query, dtype=torch.float32 if wide else None, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32) if with_lse else None
    bytes = _core.paged_attention_bytes(query, keys, table, torch.get_num_threads())
    workspace = query.new_empty(bytes, dtype=torch.uint8)
    _core.paged_attention(query, keys, values, table, value_table, length, cu_seqlens, key_row, value_row, new_keys,
                          new_values, begun_out, begun_lse, scaling, softcap, window, workspace, out, lse)  # fmt: skip
    return out, lse


def _read_only(*args):
    return _append(*args[:9], None, None, *args[9:])


def _append(query, *rest):
    out, lse = _forward(query, *rest)
    return out, query.new_empty(0, dtype=torch.float32) if lse is None else lse


def _fake(query, *rest):
    with_lse, wide = rest[-2:]
    return (query.new_empty(query.shape, dtype=torch.float32 if wide else query.dtype),
            query.new_empty(query.shape[:2] if with_lse else (0,), dtype=torch.float32))  # fmt: skip


# Two ops, because an op says in its schema whether it writes into its arguments.
_SCHEMA = (
    "(Tensor query, Tensor{} keys, Tensor{} values, Tensor table, Tensor length, Tensor? value_table, "
    "Tensor? cu_seqlens, Tensor? key_row, Tensor? value_row, {}Tensor? begun_out, Tensor? begun_lse, float scaling, "
    "float softcap, int window, bool with_lse, bool wide) -> (Tensor, Tensor)"
)
_op = register("paged_attention" + _SCHEMA.format("", "", ""), _read_only, _fake)
_append_op = register(
    "paged_attention_append" + _SCHEMA.format("(a!)", "(b!)", "Tensor? new_keys, Tensor? new_values, "), _append, _fake
)
