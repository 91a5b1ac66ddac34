# SPDX-License-Identifier: Apache-2.0
"""int4_gemm: few rows are bound by reading the weights once, many rows by the multipliers that a dense product uses."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

import fastpost
from bench import limits, peers
from bench.case import Case, Options
from fastpost.reference import int4_gemm as reference

N, K = 4096, 4096
SMALL = (96, 256)
FORMATS = {"int4 g128": ("symmetric", 128), "int4 asymmetric g64": ("asymmetric", 64), "nf4 g64": ("nf4", 64)}
MEMORY_BOUND = 4  # rows of x, up to which reading W takes longer than what is done with it


def cases(options: Options):
    rows = (1, 16) if options.quick else (1, 4, 16, 64, 512)
    for m in rows:
        yield case(options, m, "int4 g128")
        if options.device.type == "cpu" and m > 1:
            yield case(options, m, "int4 g128", activation_bits=8)
    for m in (rows[0], rows[-1]):
        yield case(options, m, "int4 asymmetric g64")
        yield case(options, m, "nf4 g64")
    yield case(options, 1, "int4 g128", dtype=torch.float32)
    yield case(options, rows[-1], "int4 g128", backward=True)
    yield case(options, rows[-1], "nf4 g64", backward=True)


def case(options, m, form, activation_bits=None, dtype=torch.bfloat16, backward=False) -> Case:
    n, k = SMALL if options.quick else (N, K)
    scheme, group_size = FORMATS[form]

    def make():
        g = torch.Generator().manual_seed(0)
        weight = torch.randn(n, k, generator=g) / k**0.5
        weight = fastpost.int4_quantize(weight, group_size=group_size, scheme=scheme).to(options.device)
        x = torch.randn(m, k, generator=g).to(dtype).to(options.device)
        grad = torch.randn(m, n, generator=g).to(dtype).to(options.device)
        calls = peers.pick(peers.int4_gemm(weight, dtype), options.peers)
        return SimpleNamespace(x=x, grad=grad, weight=weight, dense=weight.dequantize(dtype), calls=calls)

    # A weight to see who is there; each of those in make() is somebody's own copy.
    tiny = fastpost.int4_quantize(torch.eye(32, 128), group_size=group_size, scheme=scheme).to(options.device)
    others = peers.pick(peers.int4_gemm(tiny, dtype), options.peers)
    if backward:
        runs = {name: gradient(name) for name in others if name.startswith("eager")}
        ours = gradient("fastpost")
        plain = {limits.GEMM: lambda x: torch.mm(x.grad, x.dense)}
    else:
        runs = {name: lambda x, name=name: {"out": x.calls[name](x.x)} for name in others}
        plain = {limits.GEMM: lambda x: F.linear(x.x, x.dense)}

        def ours(x):
            return {"out": fastpost.int4_gemm(x.x, x.weight, activation_bits=activation_bits)}

    size = tiny.nbytes() * n * k // (32 * 128)
    few = m <= MEMORY_BOUND
    return Case(
        name=f"M={m} N={n} K={k} {str(dtype)[6:]} {form}{' int8 activations' if activation_bits else ''}"
        f" {'input gradient' if backward else 'forward'}",
        make=make,
        runs={"fastpost": ours} | runs,
        limits=limits.copy(size, options.device) if few else plain,
        reference=exact_gradient if backward else exact,
        tolerance=2e-2 if activation_bits else 1e-2,
        flops=2 * m * n * k,
        bytes=size,
        bound="memory" if few else "compute",
    )


def exact(x):
    return {"out": reference.int4_gemm(x.x.float(), x.weight)}


def exact_gradient(x):
    return {"grad_x": x.grad.float() @ reference.dequantize(x.weight)}


def gradient(name: str):
    """Only the input gradient is measured: the forward of a product needs nothing kept but the weights."""

    def call(x):
        if name != "fastpost":
            return {"grad_x": torch.mm(x.grad, x.dense)}
        w = x.weight
        backward = torch.ops.fastpost.int4_gemm_backward.default
        return {"grad_x": backward(x.grad, w.codes, w.float_scales(), w.zeros, w.table, w.group_size, w.columns)}

    return call
