# SPDX-License-Identifier: Apache-2.0
"""paged_attention in plain torch; works in any float dtype, so float64 input gives the truth."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch


def paged_attention(query, keys, values, table, length, *, value_table=None, cu_seqlens=None, key_row=None,
                    value_row=None, new_keys=None, new_values=None, begun=None, scaling=None, softcap=None,
                    window=None, return_lse=False, out_dtype=None):  # fmt: skip
    """Same signature and meaning as :func:`fastpost.paged_attention`."""
    t, h, d = query.shape
    g, page = keys.shape[1], keys.shape[3]
    wide = torch.promote_types(query.dtype, torch.float32)
    value_table = table if value_table is None else value_table
    out, lse = query.new_zeros(t, h, d, dtype=wide), query.new_full((t, h), -torch.inf, dtype=wide)
    bounds = range(t + 1) if cu_seqlens is None else cu_seqlens.tolist()
    for b, (first, last) in enumerate(itertools.pairwise(bounds)):
        n, total = last - first, int(length[b])
        k_row, v_row = (0 if pool.shape[0] == 1 else b if row is None else int(row[b])
                        for pool, row in ((keys, key_row), (values, value_row)))  # fmt: skip
        position = torch.arange(total, device=query.device)
        for head in range(g):
            k_page, v_page = (p[b, head if p.shape[1] > 1 else 0].long()[position // page]
                              for p in (table, value_table))  # fmt: skip
            if new_keys is not None:
                where = slice(total - n, total)
                keys[k_row, head, k_page[where], position[where] % page] = new_keys[first:last, head]
                values[v_row, head, v_page[where], position[where] % page] = new_values[first:last, head]
            there = (k_page >= 0) & (v_page >= 0)
            k = keys[k_row, head, k_page[there], position[there] % page].to(wide)
            v = values[v_row, head, v_page[there], position[there] % page].to(wide)
            heads = slice(head * (h // g), (head + 1) * (h // g))
            q = query[first:last, heads].to(wide)
            logits = torch.einsum("nhd,sd->nhs", q, k) * (d**-0.5 if scaling is None else scaling)
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            sees = total - n + 1 + torch.arange(n, device=query.device)
            seen = position[there] < sees[:, None]
            if window:
                seen &= position[there] >= sees[:, None] - window
            logits = logits.masked_fill(~seen[:, None], -torch.inf)
            lse[first:last, heads] = logits.logsumexp(-1) if k.shape[0] else -torch.inf
            weight = (logits - lse[first:last, heads, None]).exp().nan_to_num(0)
            out[first:last, heads] = torch.einsum("nhs,sd->nhd", weight, v)
    if begun is not None:
        both = torch.logaddexp(lse, begun[1].to(wide))
        shares = ((part - both).exp().nan_to_num(0)[..., None] for part in (lse, begun[1].to(wide)))
        out = next(shares) * out + next(shares) * begun[0].to(wide).nan_to_num(0)
        lse = both
    out = out.to(out_dtype or query.dtype)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Case:
    """One shape with its options; `inputs` draws the tensors."""

    name: str
    h: int
    g: int
    d: int
    page: int
    lengths: tuple[int, ...]  # of the sequences, with their query rows
    rows: tuple[int, ...] | None = None  # query rows of each; None: one each
    per_head: bool = False  # a table for each key head, and -1 in it
    rows_of_pool: int = 1  # R; more than one: key_row and value_row say which
    append: bool = False
    begun: bool = False
    scaling: float | None = None
    softcap: float | None = None
    window: int | None = None
    scale: float = 1.0

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        """(query, keys, values, table, length) and the keyword arguments. Pages are not shared; what no table names is
        NaN."""
        g = torch.Generator().manual_seed(seed)
        b, rows = len(self.lengths), self.rows or (1,) * len(self.lengths)
        t, heads = sum(rows), self.g if self.per_head else 1
        width = max(1, max(-(-n // self.page) for n in self.lengths)) + 1
        pages = b * width + 3
        order = torch.stack([torch.randperm(pages, generator=g) for _ in range(heads)])
        table = order[:, : b * width].view(heads, b, width).transpose(0, 1).int().contiguous()
        if self.per_head:  # a hole, but not where new keys go
            for i, n in enumerate(self.lengths):
                if n - rows[i] >= 2 * self.page:
                    table[i, :, 1] = -1
        pool = (self.rows_of_pool, self.g, pages, self.page, self.d)
        keys, values = (torch.randn(pool, generator=g) * s for s in (self.scale, 1.0))
        for head in range(self.g):
            unused = order[head if self.per_head else 0, b * width :]
            keys[:, head, unused] = values[:, head, unused] = torch.nan
        length = torch.tensor(self.lengths, dtype=torch.int32)
        query = torch.randn(t, self.h, self.d, generator=g) * self.scale
        options = {}
        if self.rows:
            options["cu_seqlens"] = torch.tensor((0, *rows)).cumsum(0).int()
        if self.rows_of_pool > 1:
            options["key_row"] = torch.arange(b, dtype=torch.int32) % self.rows_of_pool
            options["value_row"] = options["key_row"].flip(0).contiguous()
        if self.append:
            options["new_keys"] = (torch.randn(t, self.g, self.d, generator=g) * self.scale).to(dtype)
            options["new_values"] = torch.randn(t, self.g, self.d, generator=g).to(dtype)
        if self.begun:
            lse = torch.randn(t, self.h, generator=g)
            lse[0, 0] = -torch.inf
            options["begun"] = torch.randn(t, self.h, self.d, generator=g).to(device), lse.to(device)
        tensors = (query.to(dtype), keys.to(dtype), values.to(dtype), table, length)
        options = {name: o if name == "begun" else o.to(device) for name, o in options.items()}
        return ([x.to(device) for x in tensors],
                options | {"scaling": self.scaling, "softcap": self.softcap, "window": self.window})  # fmt: skip


def cases() -> list[Case]:
    return [
        Case("one-token", 1, 1, 16, 8, (1,)),
        Case("nothing-to-see", 2, 1, 32, 8, (0, 3)),
        Case("smollm2", 9, 3, 64, 16, (100, 1, 37, 16)),
        Case("llama", 32, 8, 128, 16, (300,)),
        Case("selected", 8, 2, 64, 8, (77, 160), per_head=True, rows_of_pool=2),
        Case("append", 9, 3, 64, 16, (33, 16, 1), append=True),
        Case("prompt", 6, 2, 64, 16, (70, 20, 1), rows=(70, 20, 1), append=True),
        Case("prompt-after-prefix", 4, 2, 80, 16, (90, 40, 12), rows=(30, 1, 0), append=True),
        Case("long-prompt", 2, 1, 128, 32, (530,), rows=(530,), append=True),
        Case("goes-on", 4, 2, 64, 8, (50, 9), begun=True),
        Case("window", 4, 1, 64, 16, (100, 5), window=20),
        Case("prompt-window", 2, 1, 64, 16, (150,), rows=(150,), window=40),
        Case("softcap", 4, 2, 32, 16, (60,), softcap=20.0, scaling=0.3),
        Case("odd", 3, 3, 33, 5, (23, 11)),
        Case("tiny-scale", 4, 2, 64, 16, (50,), scale=1e-3),
        Case("huge-scale", 4, 2, 64, 16, (50,), scale=30.0),
    ]
