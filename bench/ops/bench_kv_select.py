# SPDX-License-Identifier: Apache-2.0
"""kv_select: one decoding step of one layer. Bound by memory: every landmark is read once.

The peers do what ShadowKV's own code does in torch (product, softmax, largest of the group, top-k) on landmarks in a
float dtype, and keep no slots. All are compared by the probability that their chunks have in float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

import fastpost
from bench import limits, peers
from bench.case import Case, Options
from fastpost.reference import kv_select as reference
from fastpost.reference._int8_rows import widen_rows

# context, B, query heads, key heads, head dimension, chunks chosen
SHAPES = (("32k", 32768, 1, 32, 8, 128, 256), ("32k", 32768, 4, 32, 8, 128, 256), ("8k", 8192, 1, 9, 3, 64, 128))
SMALL = (("small", 1024, 1, 4, 2, 64, 16),)


def cases(options: Options):
    for shape in SMALL if options.quick else SHAPES:
        yield case(options, *shape)


def case(options, name, context, b, h, g, d, n) -> Case:
    c, dtype = context // 8, torch.bfloat16

    def make():
        (query, landmark, count, resident), found = reference.Case("", b, h, g, c, d, n).inputs(dtype, options.device)
        wide = widen_rows(landmark, found["scale"], torch.float32)
        truth = reference.scores(query.double(), landmark, count, scale=found["scale"])
        return SimpleNamespace(query=query, landmark=landmark, count=count, resident=resident, scale=found["scale"],
                               n=n, float32=wide, bfloat16=wide.bfloat16(), truth=truth)  # fmt: skip

    found = {"eager": lambda i: eager(i.query, i.bfloat16, i.n),
             "eager float32": lambda i: eager(i.query.float(), i.float32, i.n)}  # fmt: skip
    size = b * g * c * (d + 4) + b * h * d * 2 + b * g * n * 13
    return Case(
        name=f"{name} B={b} H={h} G={g} d={d}: {n} of {c} chunks",
        make=make,
        runs={name: run(f) for name, f in ({"fastpost": ours} | peers.pick(found, options.peers)).items()},
        limits=limits.copy(size, options.device),
        reference=lambda i: {"mass": Mass(reference_of(i), i.truth).detach()},
        tolerance=1e-3,
        bytes=size,
        bound="memory",
    )


@dataclass
class Mass:
    """Probability of the chosen chunks, summed where results are compared and not where they are timed."""

    chunks: torch.Tensor
    truth: torch.Tensor

    def detach(self):
        return self.truth.gather(-1, self.chunks.long()).sum(-1)


def ours(i):
    return fastpost.kv_select(i.query, i.landmark, i.count, i.resident, scale=i.scale).chunks


def reference_of(i):
    return reference.kv_select(i.query.double(), i.landmark, i.count, i.resident.clone(), scale=i.scale).chunks


def eager(query, landmark, n):
    (b, h, d), g = query.shape, landmark.shape[1]
    logits = torch.matmul(query.view(b, g, h // g, d), landmark.mT) * d**-0.5
    return logits.float().softmax(-1).amax(2).topk(n, -1).indices


def run(f):
    def call(i):
        return {"mass": Mass(f(i), i.truth)}

    return call
