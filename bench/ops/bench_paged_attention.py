# SPDX-License-Identifier: Apache-2.0
"""paged_attention: a token of a long sequence is bound by reading keys and values once, a prompt by the multipliers.
Pages lie in order, as in a cache that one sequence has to itself, or scattered. Peers get keys and values in one
piece."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

import fastpost
from bench import limits, peers
from bench.case import TOLERANCE, Case, Options

LLAMA, SMOLLM2 = (32, 8, 128), (9, 3, 64)  # H, G, d
PAGE = 16


def cases(options: Options):
    scale = 64 if options.quick else 1
    yield decode(options, *SMOLLM2, 8192 // scale, torch.bfloat16)
    yield decode(options, *SMOLLM2, 8192 // scale, torch.bfloat16, scattered=True)
    yield decode(options, *LLAMA, 32768 // scale, torch.bfloat16)
    yield decode(options, *LLAMA, 32768 // scale, torch.bfloat16, scattered=True)
    yield decode(options, *LLAMA, 8192 // scale, torch.float32)
    yield prompt(options, *SMOLLM2, 8192 // scale, torch.bfloat16)
    yield prompt(options, *LLAMA, 2048 // scale, torch.bfloat16)
    yield prompt(options, *SMOLLM2, 2048 // scale, torch.float32)


def inputs(options, rows, h, g, d, s, dtype, scattered):
    seed = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(n, heads, d, generator=seed).to(dtype).to(options.device)
               for n, heads in ((rows, h), (s, g), (s, g)))  # fmt: skip
    pages = s // PAGE
    order = torch.randperm(pages, generator=seed) if scattered else torch.arange(pages)
    order = order.to(options.device)

    def pool(x):
        paged = torch.empty(1, g, pages, PAGE, d, dtype=dtype, device=options.device)
        paged[:, :, order] = x.view(1, pages, PAGE, g, d).permute(0, 3, 1, 2, 4)
        return paged

    def numbers(*values):
        return torch.tensor(values, dtype=torch.int32, device=options.device)

    return SimpleNamespace(
        q=q, keys=pool(k), values=pool(v), table=order.int()[None, None], length=numbers(s), cu=numbers(0, rows),
        new=(k, v), qhead=q.transpose(0, 1)[None], khead=k.transpose(0, 1)[None].contiguous(),
        vhead=v.transpose(0, 1)[None].contiguous(), repeat=h // g, causal=rows > 1,
    )  # fmt: skip


def decode(options, h, g, d, s, dtype, scattered=False) -> Case:
    size = 2 * g * s * d * dtype.itemsize
    found = {"eager": eager, "aten sdpa": sdpa, "aten sdpa, heads repeated": sdpa_repeated}
    return Case(
        name=f"one token at {s} H={h} G={g} d={d} {str(dtype)[6:]}{' scattered pages' if scattered else ''}",
        make=lambda: inputs(options, 1, h, g, d, s, dtype, scattered),
        runs={"fastpost": one_token} | peers.pick(found, options.peers),
        limits=limits.copy(size, options.device),
        reference=lambda x: {"out": exact(x)},
        tolerance=tolerance(dtype),
        flops=4 * h * d * s,
        bytes=size,
        bound="memory",
    )


def prompt(options, h, g, d, s, dtype) -> Case:
    flops = 2 * h * d * s * (s + 1)
    side = max(16, round((flops / 2) ** (1 / 3)))  # a product of as many operations
    square = torch.randn(side, side).to(dtype).to(options.device)
    found = {"aten sdpa": sdpa, "aten sdpa, heads repeated": sdpa_repeated}
    if s <= 2048:
        found["eager"] = eager
    return Case(
        name=f"prompt of {s} H={h} G={g} d={d} {str(dtype)[6:]}",
        make=lambda: inputs(options, s, h, g, d, s, dtype, False),
        runs={"fastpost": whole_prompt} | peers.pick(found, options.peers),
        limits={limits.GEMM: lambda x: torch.mm(square, square)},
        reference=lambda x: {"out": exact(x)},
        tolerance=tolerance(dtype),
        flops=flops,
    )


def tolerance(dtype):
    """Twice the usual where shares are rounded to 16 bits, as they are by torch."""
    return TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2)


def one_token(x):
    return {"out": fastpost.paged_attention(x.q, x.keys, x.values, x.table, x.length)}


def whole_prompt(x):
    """Writing the prompt's keys and values into pages is part of it."""
    out = fastpost.paged_attention(x.q, x.keys, x.values, x.table, x.length, cu_seqlens=x.cu, new_keys=x.new[0],
                                   new_values=x.new[1])  # fmt: skip
    return {"out": out}


def sdpa(x):
    out = F.scaled_dot_product_attention(x.qhead, x.khead, x.vhead, is_causal=x.causal, enable_gqa=True)
    return {"out": out[0].transpose(0, 1)}


def sdpa_repeated(x):
    """As transformers calls it where it repeats key heads itself."""
    k, v = (t.repeat_interleave(x.repeat, 1) for t in (x.khead, x.vhead))
    return {"out": F.scaled_dot_product_attention(x.qhead, k, v, is_causal=x.causal)[0].transpose(0, 1)}


def eager(x):
    k, v = (t.repeat_interleave(x.repeat, 1) for t in (x.khead, x.vhead))
    logits = x.qhead @ k.mT * x.q.shape[-1] ** -0.5
    if x.causal:
        n = x.q.shape[0]
        logits = logits.masked_fill(torch.ones(n, n, dtype=torch.bool, device=x.q.device).triu(1), -torch.inf)
    return {"out": (logits.softmax(-1, dtype=torch.float32).to(x.q.dtype) @ v)[0].transpose(0, 1)}


def exact(x):
    heads = (t.float() for t in (x.qhead, x.khead, x.vhead))
    return F.scaled_dot_product_attention(*heads, is_causal=x.causal, enable_gqa=True)[0].transpose(0, 1)
