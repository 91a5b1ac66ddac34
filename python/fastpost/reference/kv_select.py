# SPDX-License-Identifier: Apache-2.0
"""kv_select in plain torch; works in any float dtype, so float64 input gives the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastpost.reference._int8_rows import quantize_rows, widen_rows


def scores(query, landmark, count, *, scale=None, source=None, kept=None, scaling=None):
    """[B, G, C]: the largest probability of each chunk among the query heads of a key head; -1 for no candidates."""
    b, h, d = query.shape
    _, g, c, _ = landmark.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = slice(None) if source is None else source.long()
    wide_landmark = widen_rows(landmark, scale, wide)[rows]
    logits = torch.einsum("bgqd,bgcd->bgqc", query.to(wide).view(b, g, h // g, d), wide_landmark)
    logits = logits * (d**-0.5 if scaling is None else scaling)
    open_ = (torch.arange(c, device=query.device) < count[:, None])[:, None].expand(b, g, c).clone()
    if kept is not None:
        # a column more, for the -1 of "nothing" to fall on
        closed = torch.zeros(b, g, c + 1, dtype=torch.bool, device=query.device)
        closed.scatter_(2, torch.where((kept < 0) | (kept >= c), c, kept).long(), True)
        open_ &= ~closed[..., :c]
    logits = torch.where(open_[:, :, None], logits, -torch.inf)
    return torch.where(open_, logits.softmax(-1).nan_to_num(0).amax(2), -1.0)


def kv_select(query, landmark, count, resident, *, scale=None, source=None, kept=None, scaling=None):
    """Same signature and meaning as :func:`fastpost.kv_select`."""
    from fastpost.ops.kv_select import Selection

    best = scores(query, landmark, count, scale=scale, source=source, kept=kept, scaling=scaling)
    b, g, n = resident.shape
    chunks = torch.full_like(resident, -1)
    slots = torch.full_like(resident, -1)
    fresh = torch.zeros(b, g, n, dtype=torch.uint8, device=resident.device)
    for i in range(b):
        for j in range(g):
            order = torch.sort(best[i, j], descending=True, stable=True)
            wanted = sorted(order.indices[:n][order.values[:n] >= 0].tolist())
            old = resident[i, j].tolist()
            slot_of = {chunk: slot for slot, chunk in enumerate(old) if chunk in wanted}
            free = iter(sorted(set(range(n)) - set(slot_of.values())))
            new = [-1] * n
            for k, chunk in enumerate(wanted):
                fresh[i, j, k] = chunk not in slot_of
                slot = slot_of[chunk] if chunk in slot_of else next(free)
                chunks[i, j, k], slots[i, j, k], new[slot] = chunk, slot, chunk
            resident[i, j] = torch.tensor(new, dtype=resident.dtype, device=resident.device)
    return Selection(chunks, slots, fresh)


@dataclass(frozen=True)
class Case:
    """One shape with its options; `inputs` draws the tensors."""

    name: str
    b: int
    h: int
    g: int
    c: int
    d: int
    n: int
    counts: tuple[int, ...] | None = None
    prompts: int | None = None  # fewer prompts than rows: rows share them
    kept: int = 0
    bits: int | None = 8
    scale: float = 1.0

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        """(query, landmark, count, resident) and the keyword arguments."""
        g = torch.Generator().manual_seed(seed)
        p = self.b if self.prompts is None else self.prompts
        query = torch.randn(self.b, self.h, self.d, generator=g) * self.scale
        landmark, scale = torch.randn(p, self.g, self.c, self.d, generator=g), None
        landmark, scale = quantize_rows(landmark) if self.bits == 8 else (landmark.to(dtype), None)
        count = torch.tensor(self.counts or [self.c] * self.b, dtype=torch.int32)
        resident = torch.full((self.b, self.g, self.n), -1, dtype=torch.int32)
        source = None if self.prompts is None else torch.arange(self.b, dtype=torch.int32) % p
        kept = None
        if self.kept:
            kept = torch.stack([torch.randperm(self.c, generator=g)[: self.kept] for _ in range(self.b * self.g)])
            kept = kept.view(self.b, self.g, -1).int()
            kept[..., -1] = -1
        tensors = [query.to(dtype), landmark, count, resident]
        options = {"scale": scale, "source": source, "kept": kept}
        return ([t.to(device) for t in tensors],
                {name: None if t is None else t.to(device) for name, t in options.items()})  # fmt: skip


def cases() -> list[Case]:
    return [
        Case("one-chunk", 1, 1, 1, 1, 16, 1),
        Case("fewer-chunks-than-slots", 2, 4, 2, 5, 32, 8),
        Case("none-open", 1, 2, 1, 6, 32, 4, counts=(0,)),
        Case("llama", 1, 32, 8, 512, 128, 32),
        Case("smollm2", 2, 9, 3, 333, 64, 24, counts=(333, 100), kept=7),
        Case("shared-prompt", 4, 6, 2, 90, 64, 12, prompts=2, kept=5),
        Case("float-landmarks", 2, 8, 4, 130, 80, 16, bits=None),
        Case("odd", 1, 3, 3, 70, 33, 9),
        Case("tiny-scale", 1, 4, 2, 100, 64, 10, scale=1e-3),
        Case("huge-scale", 1, 4, 2, 100, 64, 10, scale=1e2),
    ]
