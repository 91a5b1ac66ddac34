# SPDX-License-Identifier: Apache-2.0
"""kv_reconstruct: the keys that one decoding step of one layer needs anew. Bound by arithmetic: rows · rank · d.

The peer gathers rows, multiplies and rotates in torch, with factors in the dtype of the keys, and scatters the keys
into their slots. The limit is the batched product alone, of rows that are gathered already."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import fastpost
from bench import peers
from bench.case import TOLERANCE, Case, Options
from fastpost.reference import kv_reconstruct as reference
from fastpost.reference._int8_rows import widen_rows

# context, key heads, head dimension, rank, chunks chosen, dtype
LLAMA, SMOL = ("32k", 32768, 8, 128, 160, 256), ("8k", 8192, 3, 64, 30, 128)
SHAPES = [(*LLAMA, torch.bfloat16, share) for share in (1.0, 0.4, 0.2)]
SHAPES += [(*SMOL, torch.bfloat16, share) for share in (1.0, 0.4)] + [(*LLAMA, torch.float32, 0.4)]
SMALL = [("small", 1024, 2, 64, 16, 8, torch.float32, 0.5)]


def cases(options: Options):
    for shape in SMALL if options.quick else SHAPES:
        yield case(options, *shape)


def case(options, name, context, g, d, rank, n, dtype, share) -> Case:
    some = max(1, round(n * share))

    def make():
        inputs, found = reference.Case("", 1, g, context, d, rank, n).inputs(dtype, options.device)
        u, basis, chunks, keys = inputs
        turn = torch.rand(1, g, n, generator=torch.Generator().manual_seed(1)).argsort(-1).to(options.device)
        fresh = torch.zeros_like(chunks, dtype=torch.uint8).scatter_(-1, turn[..., :some], 1)
        at = fresh.nonzero()[:, 2].view(g, some)  # the same number in each head, so that torch can batch them
        token = (chunks[0].long().gather(1, at)[..., None] * 8 + torch.arange(8, device=at.device)).flatten(1)
        slot = found["slots"][0].long().gather(1, at)
        wide = widen_rows(u, found["scale"], torch.float32).to(dtype)[0]
        return SimpleNamespace(u=u, basis=basis, chunks=chunks, keys=keys.zero_(), fresh=fresh, token=token, slot=slot,
                               wide=wide, gathered=wide[token], options=found,
                               head=torch.arange(g, device=at.device)[:, None])  # fmt: skip

    found = {"eager": eager}
    rows = g * some * 8
    return Case(
        name=f"{name} G={g} d={d} r={rank} {str(dtype)[6:]}: {some} of {n} chunks are new",
        make=make,
        runs={name: run(f) for name, f in ({"fastpost": ours} | peers.pick(found, options.peers)).items()},
        limits={"plain product": lambda i: torch.bmm(i.gathered, i.basis[0])},
        reference=truth,
        tolerance=TOLERANCE[dtype],
        flops=2 * rows * rank * d,
        bytes=rows * (rank + 4 + d * dtype.itemsize * 2) + g * rank * d * dtype.itemsize,
    )


def ours(i):
    fastpost.kv_reconstruct(i.u, i.basis, i.chunks, i.keys, fresh=i.fresh, **i.options)


def eager(i):
    keys = torch.bmm(i.wide[i.token], i.basis[0])
    cos, sin = (i.options[name][0][i.token] for name in ("cos", "sin"))
    keys = reference.rotate(keys, cos, sin)
    i.keys[0, i.head, i.slot] = keys.unflatten(1, (-1, 8))


def truth(i):
    keys = torch.zeros_like(i.keys, dtype=torch.float64)
    reference.kv_reconstruct(i.u, i.basis, i.chunks, keys, fresh=i.fresh, **i.options)
    return {"keys": keys}


def run(f):
    def call(i):
        f(i)
        return {"keys": i.keys}

    return call
