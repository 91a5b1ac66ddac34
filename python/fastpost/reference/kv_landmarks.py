# SPDX-License-Identifier: Apache-2.0
"""kv_landmarks in plain torch; works in any float dtype, so float64 input gives the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastpost.reference._int8_rows import quantize_rows


def kv_landmarks(keys, *, chunk=8, length=None, bits=8):
    """Same signature and meaning as :func:`fastpost.kv_landmarks`."""
    from fastpost.ops.kv_landmarks import KVLandmarks

    b, g, s, d = keys.shape
    count = s // chunk
    wide = torch.promote_types(keys.dtype, torch.float32)
    members = keys[:, :, : count * chunk].to(wide).view(b, g, count, chunk, d)
    mean = members.mean(3)
    cosine = torch.nn.functional.cosine_similarity(members, mean[:, :, :, None], dim=-1, eps=1e-20)
    similarity = cosine.amin(-1) if count else mean.new_empty(b, g, 0)
    if length is not None:
        whole = (torch.arange(1, count + 1, device=keys.device) * chunk <= length[:, None])[:, None]
        mean = torch.where(whole[..., None], mean, 0)
        similarity = torch.where(whole, similarity, 1)
    landmark, scale = quantize_rows(mean) if bits == 8 else (mean.to(keys.dtype), None)
    return KVLandmarks(landmark, scale, similarity)


@dataclass(frozen=True)
class Case:
    """One shape with its options; `inputs` draws the tensors."""

    name: str
    b: int
    g: int
    s: int
    d: int
    chunk: int = 8
    lengths: tuple[int, ...] | None = None
    scale: float = 1.0

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        """(keys [B, G, S, d] as transformers has them, a transposed view, and length): neighbours alike."""
        g = torch.Generator().manual_seed(seed)
        keys = torch.randn(self.b, self.s, self.g, self.d, generator=g)
        keys = (keys + 2 * torch.randn(self.b, 1, self.g, self.d, generator=g)) * self.scale
        length = None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int32, device=device)
        return keys.to(device, dtype).transpose(1, 2), length


def cases() -> list[Case]:
    return [
        Case("no-chunk", 1, 2, 7, 16),
        Case("one-chunk", 1, 1, 8, 64),
        Case("remainder", 2, 3, 61, 64),
        Case("llama", 1, 8, 160, 128),
        Case("unequal", 3, 2, 48, 32, lengths=(48, 23, 0)),
        Case("other-chunk", 1, 2, 50, 80, chunk=5),  # 80: no multiple of a register
        Case("odd", 1, 1, 24, 33),
        Case("tiny-scale", 1, 2, 32, 64, scale=1e-3),
        Case("huge-scale", 1, 2, 32, 64, scale=1e3),
    ]
