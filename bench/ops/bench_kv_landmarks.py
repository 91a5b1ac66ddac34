# SPDX-License-Identifier: Apache-2.0
"""kv_landmarks: the mean of each chunk of 8 keys in int8, and the least cosine of its members. Memory-bound: keys are
read once, an eighth of their number of bytes is written. Keys lie as transformers has them, [B, S, G, d] transposed."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

import fastpost
from bench import limits, peers
from bench.case import Case, Options
from fastpost.reference import kv_landmarks as reference

SHAPES = ((1, 8, 32768, 128, torch.bfloat16), (1, 3, 8192, 64, torch.bfloat16), (4, 8, 8192, 128, torch.float32))
SMALL = ((1, 2, 64, 16, torch.bfloat16),)


def cases(options: Options):
    for shape in SMALL if options.quick else SHAPES:
        yield case(options, *shape)


def case(options, b, g, s, d, dtype) -> Case:
    def make():
        keys, _ = reference.Case("", b, g, s, d).inputs(dtype, options.device)
        return SimpleNamespace(keys=keys)

    found = {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    read = b * g * s * d * dtype.itemsize
    return Case(
        name=f"B={b} G={g} S={s} d={d} {str(dtype)[6:]} chunk=8",
        make=make,
        runs={"fastpost": run(fastpost.kv_landmarks)}
        | {k: run(f) for k, f in peers.pick(found, options.peers).items()},
        limits=limits.copy(read + b * g * (s // 8) * (d + 8), options.device),
        reference=run(lambda keys: [x.float() for x in reference.kv_landmarks(keys.float())]),
        tolerance=1e-2,  # of rows in int8
        bytes=read + b * g * (s // 8) * (d + 8),
        bound="memory",
    )


def eager(keys):
    """As ShadowKV does it, in the dtype of keys, with the mean as int8 rows."""
    members = keys.unflatten(2, (-1, 8))
    mean = members.mean(3)
    similarity = F.cosine_similarity(members, mean[:, :, :, None], dim=-1).amin(-1)
    scale = mean.abs().amax(-1).float() / 127
    return (mean / scale[..., None]).round().to(torch.int8), scale, similarity


def run(f):
    return lambda i: dict(zip(("landmark", "scale", "similarity"), f(i.keys)))
