# SPDX-License-Identifier: Apache-2.0
"""kv_reconstruct in plain torch; works in any float dtype, so float64 input gives the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastpost.reference._int8_rows import quantize_rows, widen_rows


def rotate(x, cos, sin):
    """RoPE of the first 2w dimensions of x [..., d], halves paired, by cos and sin [..., w]; the others stay."""
    w = cos.shape[-1]
    a, b = x[..., :w], x[..., w : 2 * w]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * w :]], -1)


def kv_reconstruct(u, basis, chunks, keys, *, scale=None, cos=None, sin=None, source=None, slots=None, fresh=None,
                   values=None, value_scale=None, value_pool=None):  # fmt: skip
    """Same signature and meaning as :func:`fastpost.kv_reconstruct`."""
    b, g, _n = chunks.shape
    chunk = keys.shape[3]
    wide = torch.promote_types(keys.dtype, torch.float32)
    for i in range(b):
        p = i if source is None else int(source[i])
        for j in range(g):
            wanted = chunks[i, j] >= 0
            if fresh is not None:
                wanted = wanted & (fresh[i, j] != 0)
            k = wanted.nonzero().flatten()
            if not len(k):
                continue
            which = chunks[i, j, k].long()
            place = k if slots is None else slots[i, j, k].long()
            token = (which[:, None] * chunk + torch.arange(chunk, device=which.device)).flatten()
            rows = widen_rows(u[p, token], None if scale is None else scale[p, token], wide)
            out = rows @ basis[p, j].to(wide)
            if cos is not None:
                table = p if cos.shape[0] > 1 else 0
                out = rotate(out, cos[table, token].to(wide), sin[table, token].to(wide))
            keys[i, j, place] = out.view(len(k), chunk, -1).to(keys.dtype)
            if values is not None:
                where = which.to(values.device)
                found = values[p, j, where].to(place.device)
                by = None if value_scale is None else value_scale[p, j, where].to(place.device)
                value_pool[i, j, place] = widen_rows(found, by, wide).to(value_pool.dtype)


@dataclass(frozen=True)
class Case:
    """One shape with its options; `inputs` draws the tensors."""

    name: str
    b: int
    g: int
    s: int
    d: int
    rank: int
    n: int
    chunk: int = 8
    width: int | None = None  # of RoPE's tables; None: d / 2, 0: no rotation
    prompts: int | None = None
    bits: int | None = 8
    values: str | None = None  # "float" or "int8"
    part_fresh: bool = False

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        """(u, basis, chunks, keys) and the keyword arguments; keys and value_pool are full of NaN."""
        g = torch.Generator().manual_seed(seed)
        p = self.b if self.prompts is None else self.prompts
        count = self.s // self.chunk
        factor = torch.float32 if dtype == torch.float16 else dtype
        u = torch.randn(p, self.s, self.rank, generator=g)
        options = {}
        if self.bits == 8:
            u, options["scale"] = quantize_rows(u)
        else:
            u = u.to(dtype)
        basis = torch.randn(p, self.g, self.rank, self.d, generator=g) * self.rank**-0.5
        picked = [torch.randperm(count, generator=g)[: self.n].sort().values for _ in range(self.b * self.g)]
        chunks = torch.full((self.b * self.g, self.n), -1, dtype=torch.int32)
        slots = torch.stack([torch.randperm(self.n, generator=g) for _ in picked]).int()
        for row, found in enumerate(picked):
            chunks[row, : len(found)] = found
        shape = (self.b, self.g, self.n)
        options["slots"] = slots.view(shape)
        width = self.d // 2 if self.width is None else self.width
        if width:
            angle = torch.arange(self.s)[:, None] * 10000.0 ** -(torch.arange(width) / width)
            options |= {"cos": angle.cos().to(factor)[None], "sin": angle.sin().to(factor)[None]}
        if self.prompts is not None:
            options["source"] = torch.arange(self.b, dtype=torch.int32) % p
        if self.part_fresh:
            options["fresh"] = (torch.rand(shape, generator=g) < 0.5).to(torch.uint8)
        pool = torch.full((self.b, self.g, self.n + 2, self.chunk, self.d), torch.nan).to(dtype)
        options = {name: t.to(device) for name, t in options.items()}
        if self.values:
            values = torch.randn(p, self.g, count, self.chunk, self.d, generator=g).to(dtype)
            if self.values == "int8":
                values, options["value_scale"] = quantize_rows(values)
            options |= {"values": values, "value_pool": pool.to(device, copy=True)}
            if torch.device(device).type == "cuda":
                options |= {name: options[name].pin_memory() for name in ("values", "value_scale") if name in options}
        tensors = (u, basis.to(factor), chunks.view(shape), pool)
        return [t.to(device) for t in tensors], options


def cases() -> list[Case]:
    return [
        Case("one-chunk", 1, 1, 8, 64, 16, 1),
        Case("llama", 1, 8, 640, 128, 160, 24, values="float"),
        Case("smollm2", 2, 3, 200, 64, 30, 17, part_fresh=True),
        Case("fewer-chunks-than-slots", 1, 2, 40, 32, 8, 9, values="int8"),
        Case("shared-prompt", 3, 2, 96, 64, 24, 5, prompts=1, values="int8", part_fresh=True),
        Case("partial-rotation", 1, 2, 64, 80, 24, 6, width=16),
        Case("no-rotation", 1, 2, 64, 64, 24, 6, width=0),
        Case("float-factors", 2, 2, 80, 64, 20, 7, bits=None, values="float"),
        Case("odd", 1, 2, 35, 34, 7, 5, chunk=5),
    ]
