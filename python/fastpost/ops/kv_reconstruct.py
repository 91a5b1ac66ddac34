# SPDX-License-Identifier: Apache-2.0
"""kv_reconstruct: chosen chunks of keys, from their factors into slots. Kernel: cpp/ops/kv_reconstruct.cpp."""

from __future__ import annotations

import torch

from fastpost import _core
from fastpost.ops._register import USE_REFERENCE, expect_plain, may_skip_dispatcher, refuse_grad, register
from fastpost.reference import kv_reconstruct as reference


def kv_reconstruct(
    u: torch.Tensor,
    basis: torch.Tensor,
    chunks: torch.Tensor,
    keys: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    fresh: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    value_pool: torch.Tensor | None = None,
) -> None:
    """Write ``rotate(u[tokens] @ basis)`` for the tokens of each chosen chunk into its slot of `keys`; with `values`,
    copy theirs into `value_pool` too.

    Source: ShadowKV (arXiv 2410.21465): gather, product, RoPE at the original positions.

    Args:
        u: [P, S, r] int8 (with `scale` [P, S] float32) or a float dtype: :class:`KVFactors`.
        basis: [P, G, r, d] float32 or bfloat16.
        chunks: [B, G, N] int32, -1: none; token i of chunk c is row c · chunk + i of u and of the tables.
        keys: [B, G, M, chunk, d] float32, bfloat16 or float16, changed in place.
        cos, sin: [1 or P, S', w] float32 or bfloat16, of dimensions (k, k + w). None: no rotation.
        source: [B] int32: which of the P prompts a row looks at. None: its own.
        slots: [B, G, N] int32 below M. None: chunk j goes to slot j.
        fresh: [B, G, N] uint8: 0 skips the chunk. None: all.
        values: [P, G, C, chunk, d] in the dtype of value_pool, or int8 with `value_scale` [P, G, C, chunk] float32; may
            be on the CPU (pinned) when the rest is on a GPU.
        value_pool: [B, G, M, chunk, d] like keys, changed in place.

    Raises:
        ValueError: wrong dtype, shape, layout or device; an input that requires grad.
    """
    if USE_REFERENCE:
        return reference.kv_reconstruct(u, basis, chunks, keys, scale=scale, cos=cos, sin=sin, source=source,
                                        slots=slots, fresh=fresh, values=values, value_scale=value_scale,
                                        value_pool=value_pool)  # fmt: skip
    tensors = (u, basis, chunks, keys, scale, cos, sin, source, slots, fresh, values, value_scale, value_pool)
    if may_skip_dispatcher(*tensors):
        return _reconstruct(*tensors)
    named = dict(zip(_NAMES, tensors))
    elsewhere = {name: named.pop(name) for name in ("values", "value_scale")}
    expect_plain("kv_reconstruct", **named)
    expect_plain("kv_reconstruct", **elsewhere)
    refuse_grad("kv_reconstruct", **named, **elsewhere)
    _reconstruct_op(*tensors)
    return None


_NAMES = ("u", "basis", "chunks", "keys", "scale", "cos", "sin", "source", "slots", "fresh", "values", "value_scale",
          "value_pool")  # fmt: skip


def _reconstruct(u, basis, chunks, keys, scale, cos, sin, source, slots, fresh, values, value_scale, value_pool):
    size = _core.kv_reconstruct_bytes(u, basis, torch.get_num_threads())
    workspace = torch.empty(size, dtype=torch.uint8, device=u.device)
    _core.kv_reconstruct(u, scale, basis, cos, sin, source, chunks, slots, fresh, values, value_scale, workspace, keys,
                         value_pool)  # fmt: skip


def _reconstruct_fake(*_tensors):
    return None


_reconstruct_op = register(
    "kv_reconstruct(Tensor u, Tensor basis, Tensor chunks, Tensor(a!) keys, Tensor? scale, Tensor? cos, Tensor? sin, "
    "Tensor? source, Tensor? slots, Tensor? fresh, Tensor? values, Tensor? value_scale, Tensor(b!)? value_pool) -> ()",
    _reconstruct, _reconstruct_fake,
)  # fmt: skip
