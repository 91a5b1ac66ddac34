# SPDX-License-Identifier: Apache-2.0
"""kv_select: the chunks of the cache that a query needs most. Kernel: cpp/ops/kv_select.cpp."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastpost import _core
from fastpost.ops._register import USE_REFERENCE, expect_plain, may_skip_dispatcher, refuse_grad, register
from fastpost.reference import kv_select as reference


class Selection(NamedTuple):
    chunks: torch.Tensor  # [B, G, N] int32: chosen chunks in ascending order, then -1
    slots: torch.Tensor  # [B, G, N] int32: the slot of each, then -1
    fresh: torch.Tensor  # [B, G, N] uint8: 1 where the chunk was not resident before


def kv_select(
    query: torch.Tensor,
    landmark: torch.Tensor,
    count: torch.Tensor,
    resident: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    scaling: float | None = None,
) -> Selection:
    """Choose N chunks for each key head, and say which of them are not there yet.

    ``p_h = softmax(scaling · q_h · landmark)`` over the candidates; a chunk's score is its largest p_h among the query
    heads of a key head. Of equal scores the lower chunk wins. Source: ShadowKV (arXiv 2410.21465).

    Args:
        query: [B, H, d] float32, bfloat16 or float16, one token a row.
        landmark: [P, G, C, d] int8 (with `scale` [P, G, C] float32) or a float dtype.
        count: [B] int32: chunks of each row that may be chosen, the first ones.
        resident: [B, G, N] int32, changed in place: the chunk in each slot, -1 for none. What stays keeps its slot.
        source: [B] int32: which of the P prompts a row looks at. None: its own.
        kept: [B, G, O] int32: chunks that are there anyway and are never chosen; -1: none.
        scaling: of the logits; None: d^-0.5.

    Raises:
        ValueError: wrong dtype, shape, layout or device; an input that requires grad.
    """
    tensors = (query, landmark, count, resident, scale, source, kept)
    if USE_REFERENCE:
        return reference.kv_select(
            query, landmark, count, resident, scale=scale, source=source, kept=kept, scaling=scaling
        )
    plain = may_skip_dispatcher(*tensors)
    if not plain:
        named = dict(zip(("query", "landmark", "count", "resident", "scale", "source", "kept"), tensors))
        expect_plain("kv_select", **named)
        refuse_grad("kv_select", **named)
    if scaling is None:
        scaling = (query.shape[-1] or 1) ** -0.5 if query.ndim else 1.0
    return Selection(*(_select if plain else _select_op)(*tensors, scaling))


def _select(query, landmark, count, resident, scale, source, kept, scaling):
    chunks, slots, fresh = _select_fake(query, landmark, count, resident, scale, source, kept, scaling)
    size = _core.kv_select_bytes(query, landmark, torch.get_num_threads())
    workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
    _core.kv_select(query, landmark, scale, source, count, kept, scaling, workspace, resident, chunks, slots, fresh)
    return chunks, slots, fresh


def _select_fake(_query, _landmark, _count, resident, _scale, _source, _kept, _scaling):
    return (torch.empty_like(resident), torch.empty_like(resident), torch.empty_like(resident, dtype=torch.uint8))


_select_op = register(
    "kv_select(Tensor query, Tensor landmark, Tensor count, Tensor(a!) resident, Tensor? scale, Tensor? source, "
    "Tensor? kept, float scaling) -> (Tensor, Tensor, Tensor)",
    _select, _select_fake,
)  # fmt: skip
