# SPDX-License-Identifier: Apache-2.0
"""kv_factorize: keys [S, D] as a product of rank r, u in int8; and kv_project of as many later ones. Compute-bound: one
half of the Gram matrix, S·D² operations, and the projection, 2·S·D·r; the eigenproblem between them is not counted.

Beside it: ShadowKV's way (torch.linalg.svd of the keys in float32), torch.svd_lowrank, which passes over the keys twice
for each of its rounds, and the whole eigenproblem of the Gram matrix. What is compared is the error of the truncation,
|keys - their projection| / |keys|, which may be 1e-3 above that of the exact decomposition: svd_lowrank's two rounds,
torch's default, are not enough for that, so there is one with six."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import fastpost
from bench import limits, peers
from bench.case import Case, Options
from fastpost.reference import kv_factorize as reference

SHAPES = ((8192, 192, 30, torch.bfloat16), (32768, 1024, 160, torch.bfloat16), (8192, 192, 30, torch.float32))
SMALL = ((300, 48, 8, torch.bfloat16),)


def cases(options: Options):
    for shape in SMALL if options.quick else SHAPES:
        yield case(options, *shape)
    yield projection(options, *(SMALL if options.quick else SHAPES)[0])


def case(options, s, d, rank, dtype) -> Case:
    def make():
        keys, _ = reference.Case("", 1, s, d, rank).inputs(dtype, options.device)
        return SimpleNamespace(keys=keys, directions=torch.randn(d, rank, device=options.device).to(dtype))

    def ours(keys):
        factors = fastpost.kv_factorize(keys, rank)
        return factors.u, factors.scale, factors.basis

    found = {
        "eager svd": lambda keys: svd(keys, rank),
        "eager svd_lowrank": lambda keys: low_rank(keys, rank, 2),
        "eager svd_lowrank, 6": lambda keys: low_rank(keys, rank, 6),
        "eager eigh": lambda keys: eigh(keys, rank),
    }
    return Case(
        name=f"S={s} D={d} r={rank} {str(dtype)[6:]}",
        make=make,
        runs={name: run(f) for name, f in ({"fastpost": ours} | peers.pick(found, options.peers)).items()},
        limits={limits.GEMMS: lambda i: (i.keys[0].mT @ i.keys[0, :, : d // 2], i.keys[0] @ i.directions)},
        reference=lambda i: {"error": exact(i.keys, rank)},
        tolerance=1e-3,
        flops=s * d * d + 2 * s * d * rank,
        bytes=s * d * dtype.itemsize + s * (rank + 4) + rank * d * 4,
    )


def projection(options, s, d, rank, dtype) -> Case:
    def make():
        keys, _ = reference.Case("", 1, s, d, rank).inputs(dtype, options.device)
        return SimpleNamespace(keys=keys, directions=torch.randn(1, d, rank, device=options.device) * d**-0.5)

    def eager(keys, directions):
        u = (keys @ directions.to(keys.dtype)).float()
        scale = u.abs().amax(-1) / 127
        return (u / scale[..., None]).round().to(torch.int8), scale

    def call(f):
        return lambda i: dict(zip(("u", "scale"), f(i.keys, i.directions)))

    size = s * d * dtype.itemsize + s * (rank + 4)
    return Case(
        name=f"project S={s} D={d} r={rank} {str(dtype)[6:]}",
        make=make,
        runs={
            n: call(f)
            for n, f in ({"fastpost": fastpost.kv_project} | peers.pick({"eager": eager}, options.peers)).items()
        },
        limits=limits.copy(size, options.device),
        reference=call(lambda keys, directions: [x.float() for x in reference.kv_project(keys.float(), directions)]),
        tolerance=1e-2,  # of rows in int8
        flops=2 * s * d * rank,
        bytes=size,
        bound="memory",
    )


# ---- peers: keys [1, S, D] -> u, None (no scale), basis -------------------------------------------------------------


def svd(keys, rank):
    u, s, vt = torch.linalg.svd(keys.float(), full_matrices=False)
    return u[..., :rank].to(keys.dtype), None, s[:, :rank, None] * vt[:, :rank]


def low_rank(keys, rank, rounds):
    u, s, v = torch.svd_lowrank(keys.float(), rank, niter=rounds)
    return u.to(keys.dtype), None, s[:, :, None] * v.mT


def eigh(keys, rank):
    wide = keys.float()
    vectors = torch.linalg.eigh(wide.mT @ wide).eigenvectors[..., -rank:]
    return (wide @ vectors).to(keys.dtype), None, vectors.mT


class Error:
    """|keys - their projection on the rows of basis| / |keys|, computed when somebody compares it and not while time is
    taken. What int8 costs on top (about 7e-3 of the keys) is no part of it."""

    def __init__(self, keys, basis):
        self.keys, self.basis = keys, basis

    def detach(self) -> torch.Tensor:
        space = torch.linalg.qr(self.basis[0].double().mT).Q
        kept = (self.keys[0].double() @ space).norm() / self.keys.double().norm()
        return (1 - kept.square()).clamp(min=0).sqrt()[None].float()


def exact(keys, rank):
    gram = keys[0].double().mT @ keys[0].double()
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    return (values[:-rank].sum() / values.sum()).sqrt()[None].float()


def run(f):
    return lambda i: {"error": Error(i.keys, f(i.keys)[2])}
