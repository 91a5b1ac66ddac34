# SPDX-License-Identifier: Apache-2.0
"""kv_factorize and kv_project in plain torch; works in any float dtype, so float64 input gives the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastpost.reference._int8_rows import quantize_rows


def kv_factorize(keys, rank, *, length=None, bits=8):
    """Same signature and meaning as :func:`fastpost.kv_factorize`, by an exact singular value decomposition."""
    from fastpost.ops.kv_factorize import KVFactors

    wide = torch.promote_types(keys.dtype, torch.float32)
    rows = _valid(keys.to(wide), length)
    _, s, vt = torch.linalg.svd(rows, full_matrices=False)
    if s.shape[1] < rank:  # fewer tokens than the rank: directions that no key has
        vt = torch.linalg.qr(torch.cat([vt.mT, torch.eye(keys.shape[2], dtype=wide).expand(len(vt), -1, -1)], 2)).Q.mT
        s = torch.cat([s, s.new_zeros(len(s), vt.shape[1] - s.shape[1])], 1)
    total = s.square().sum(1)
    error = (s[:, rank:].square().sum(1) / total.clamp(min=torch.finfo(wide).tiny)).sqrt()
    kept = resolved(s[:, :rank])
    basis = kept[:, :, None] * vt[:, :rank]
    directions = (vt[:, :rank] / kept[:, :, None]).mT.contiguous()
    u, scale = kv_project(keys, directions, length=length, bits=bits)
    return KVFactors(u, scale, basis, directions, error)


def resolved(s):
    """Singular values [B, r], none below 1e-3 of the largest: a Gram matrix in float32 knows no smaller
    ones, and u would be large where directions divide by them."""
    return s.clamp(min=1e-3 * s.amax(1, keepdim=True)).clamp(min=1e-18)


def kv_project(keys, directions, *, length=None, bits=8):
    """Same signature and meaning as :func:`fastpost.kv_project`."""
    u = _valid(keys.to(directions.dtype), length) @ directions
    return quantize_rows(u) if bits == 8 else (u.to(keys.dtype), None)


def _valid(keys, length):
    if length is None:
        return keys
    there = torch.arange(keys.shape[1], device=keys.device) < length[:, None]
    return torch.where(there[..., None], keys, 0)


@dataclass(frozen=True)
class Case:
    """One shape with its options; `inputs` draws the tensors."""

    name: str
    b: int
    s: int
    d: int
    rank: int
    lengths: tuple[int, ...] | None = None
    scale: float = 1.0

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        """(keys, length): keys whose singular values fall as those of real ones do, about like 1 / j."""
        g = torch.Generator().manual_seed(seed)
        fall = 1.0 / torch.arange(1, self.d + 1)
        mix = torch.linalg.qr(torch.randn(self.d, self.d, generator=g)).Q
        keys = torch.randn(self.b, self.s, self.d, generator=g) * fall @ mix * self.scale
        length = None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int32, device=device)
        return keys.to(device, dtype), length


def cases() -> list[Case]:
    return [
        Case("one-token", 1, 1, 16, 1),
        Case("fewer-tokens-than-rank", 1, 5, 32, 8),
        Case("full-rank", 2, 50, 24, 24),
        Case("smollm2", 1, 700, 192, 30),  # 3 key heads of 64; the tail divides no block
        Case("unequal", 3, 260, 64, 10, lengths=(260, 131, 0)),
        Case("odd", 2, 77, 33, 7),
        Case("tiny-scale", 1, 100, 48, 12, scale=1e-3),
        Case("huge-scale", 1, 100, 48, 12, scale=1e3),
    ]
