# SPDX-License-Identifier: Apache-2.0
"""Attention over packed rows, as a transformers attention function named "fastpost_packed".

Sequences lie end to end in one row of T tokens and `cu_seqlens` says where each begins, so no padding is computed and
no token sees another sequence, but for a prompt that several replies share and that is there once. On CUDA (half
precision, no softcap) this is one call of torch's varlen kernel; elsewhere one scaled_dot_product_attention per
sequence. Without cu_seqlens (transformers' own generate, padded batches) it behaves like "sdpa".

    register()                                                 # once; import of fastpost.hf.folder does it
    AutoModelForCausalLM.from_pretrained(path, attn_implementation=NAME)
    model(input_ids, position_ids=..., **packed_arguments(batch.cu_seqlens, batch.longest, batch.cu_seqlens_k, ...))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "fastpost_packed"


def register() -> None:
    """Make NAME known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def packed_arguments(
    cu_seqlens: torch.Tensor,
    longest: int,
    cu_seqlens_k: torch.Tensor | None = None,
    key_rows: torch.Tensor | None = None,
) -> dict:
    """The keyword arguments by which transformers' models hand packing down to their attention: its flash-attention
    names, and key_rows for sequences with a shared prompt (fastpost.data.collate.Batch says what each holds)."""
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    arguments = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens_k}
    return arguments | {"max_length_q": longest, "max_length_k": longest, "key_rows": key_rows}


def mask(batch_size: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs):
    """The mask for `attention`: none for one unpadded row (causality and packing are in the kernel), else sdpa's [B, 1,
    Q, K]."""
    if attention_mask is None and batch_size == 1 and q_length == kv_length:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    key_rows: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """query [B, H, T, d]; key, value [B, G, T, d] with H a multiple of G -> (output [B, T, H, d], None).

    With cu_seq_lens_q (int32 [S+1], B = 1) each sequence attends causally to itself, at most `sliding_window` tokens
    back. With key_rows (int64 [K]) sequence s sees key_rows[cu_seq_lens_k[s] : cu_seq_lens_k[s+1]], of which the last
    are its own and those before them the first of the nearest sequence before it that has only its own.

    softcap: logits become softcap * tanh(logits / softcap). Raises ValueError for what it does not compute (attention
    sinks, bidirectional attention, a mask beside packing) instead of leaving it out."""
    who = type(module).__name__
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"[{NAME}] {name}: {who} needs this term, and packed attention does not have it.")
    if not (kwargs.get("is_causal", True) and getattr(module, "is_causal", True)):
        raise ValueError(f"[{NAME}] is_causal: {who} attends in both directions; only causal models are packed.")
    options = {"scale": scaling, "window": sliding_window, "softcap": softcap, "dropout": dropout}
    if cu_seq_lens_q is None:
        _refuse_unmarked_packing(kwargs.get("position_ids"), query, key)
        return _dense(query, key, value, attention_mask, **options).transpose(1, 2).contiguous(), None
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            f"[{NAME}] attention_mask: packed rows come as one row with cu_seq_lens and no mask, got "
            f"batch {query.shape[0]} and mask {'none' if attention_mask is None else list(attention_mask.shape)}."
        )
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and softcap is None and dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn

        # transformers counts the window with the token itself, the kernel without.
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        if key_rows is not None:
            key, value = (t.index_select(2, key_rows) for t in (key, value))
        out = varlen_attn(
            *(t[0].transpose(0, 1) for t in (query, key, value)),
            cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k, max_length_q, max_length_q,
            scale=scaling, window_size=window, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out[None], None
    # split rather than slice: its backward is one concatenation instead of one full-size gradient per sequence.
    lengths = cu_seq_lens_q.diff().tolist()
    queries, keys, values = (t.split(lengths, dim=2) for t in (query, key, value))
    shared = [0] * len(lengths) if key_rows is None else (cu_seq_lens_k.diff() - cu_seq_lens_q.diff()).tolist()
    out = []
    for q, k, v, n in zip(queries, keys, values, shared, strict=True):
        if n == 0:
            prompt = k, v
        else:
            k, v = (torch.cat([first[:, :, :n], own], dim=2) for first, own in zip(prompt, (k, v), strict=True))
        out.append(_dense(q, k, v, None, **options))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _dense(q, k, v, allowed, *, scale, window, softcap, dropout) -> torch.Tensor:
    """Attention of [B, H, Q, d] on [B, G, K, d]; `allowed` bool [B, 1, Q, K] or None = causal, aligned at the end."""
    queries, keys = q.shape[2], k.shape[2]
    if allowed is None and (keys > queries > 1 or (window is not None and keys > window) or softcap is not None):
        back = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
        allowed = (back >= 0) & (back < (window or keys))
    grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        causal = allowed is None and queries > 1
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = (softcap * torch.tanh(logits / softcap)).float()
    logits = logits.masked_fill(~allowed, torch.finfo(torch.float32).min)  # not -inf: a row of padding sees nothing
    return F.dropout(logits.softmax(-1).to(q.dtype), dropout) @ v


def _refuse_unmarked_packing(position_ids: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> None:
    """Positions that restart mean packed rows. Without cu_seq_lens these would silently see each other."""
    if position_ids is None or query.shape[0] != 1 or query.shape[2] == 1 or query.shape[2] != key.shape[2]:
        return
    if position_ids.dim() == 2 and bool((position_ids.diff() < 0).any()):
        raise ValueError(
            f"[{NAME}] cu_seq_lens_q: position_ids restart, so this row holds several sequences, but no "
            "cu_seq_lens came. Pass **packed_arguments(cu_seqlens, longest)."
        )
