# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm, and a whole mixture made of it: many tokens are bound by the multipliers, few by reading the weights.

The peers are transformers' functions for the experts of Mixtral-like models: `eager` loops over experts, `grouped_mm`
sorts and calls torch's grouped product. What nothing can beat is a dense product for each expert on rows that lie
ready."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from types import SimpleNamespace

import torch

import fastpost
from bench import limits, peers
from bench.case import Case, Options
from fastpost.ops._experts import experts
from fastpost.reference import grouped_gemm as reference
from fastpost.reference import moe_combine

SHAPE = (1024, 2816, 8, 2)  # H, I, E, K
SMALL = (64, 96, 4, 2)
JETMOE = (2048, 5632, 8, 2)


def cases(options: Options):
    tokens = (8, 24) if options.quick else (1, 8, 64, 1024)
    shape = SMALL if options.quick else SHAPE
    for t in tokens:
        yield layer(options, t, shape, backward=False)
        yield layer(options, t, shape, backward=True)
        yield four_bits(options, t, shape, backward=False)
        yield four_bits(options, t, shape, backward=True)
    yield product(options, tokens[-1], shape)
    if not options.quick and options.device.type == "cuda":
        for t in (1, 64, 16384):
            yield layer(options, t, JETMOE, backward=t > 64)


def inputs(options, t, shape, dtype=torch.bfloat16):
    h, i, e, k = shape
    g = torch.Generator().manual_seed(0)
    up = torch.randn(e, 2 * i, h, generator=g) / h**0.5
    down = torch.randn(e, h, i, generator=g) / i**0.5
    x, logits = torch.randn(t, h, generator=g), torch.randn(t, e, generator=g)
    routing = fastpost.moe_route(logits.to(options.device), k)
    tensors = [a.to(options.device, dtype) for a in (x, up, down)]
    return tensors, logits.to(options.device), routing


def layer(options: Options, t, shape, backward) -> Case:
    """Routing, experts and the sum over a token's experts; forward + backward with every gradient."""
    h, i, e, k = shape

    def make():
        (x, up, down), logits, routing = inputs(options, t, shape)
        x, up, down, logits = (a.requires_grad_(backward) for a in (x, up, down, logits))
        grouped = x.detach()[routing.plan.order.long() // k]
        grad = torch.randn(t, h, generator=torch.Generator().manual_seed(1)).to(x)
        return SimpleNamespace(x=x, up=up, down=down, logits=logits, k=k, grad=grad, grouped=grouped,
                               bounds=routing.plan.offset.tolist(), a=torch.randn(t * k, i).to(x),
                               pre=torch.randn(t * k, 2 * i).to(x), module=module(x, up, down, shape))  # fmt: skip

    def run(forward):
        def call(x):
            out = forward(x)
            if not backward:
                return {"out": out}
            grads = torch.autograd.grad(out, (x.x, x.logits, x.up, x.down), x.grad.to(out.dtype))
            return dict(zip(("out", "x", "logits", "up", "down"), (out.detach(), *grads), strict=True))

        return call

    found = peers.pick({"eager": eager, "grouped_mm": grouped_mm} if transformers() else {}, options.peers)
    size = 6 * e * h * i * (1 if not backward else 3) * min(1, t * k / e)
    few = t * k / e < 16
    return Case(
        name=f"T={t} H={h} I={i} E={e} K={k} bfloat16 layer {'forward+backward' if backward else 'forward'}",
        make=make,
        runs={"fastpost": run(ours)} | {name: run(f) for name, f in found.items()},
        limits=limits.copy(int(size), options.device) if few else {limits.GEMM: products(backward)},
        reference=run(exact),
        tolerance=2e-2,
        flops=6 * t * k * h * i * (3 if backward else 1),
        bytes=int(size),
        bound="memory" if few else "compute",
    )


def four_bits(options: Options, t, shape, backward) -> Case:
    """The layer with frozen experts in four bits; peers have the same weights as floats, or make them first."""
    h, i, e, k = shape

    def make():
        (x, up, down), logits, _ = inputs(options, t, shape)
        packed = [fastpost.int4_quantize(w.flatten(0, 1)) for w in (up, down)]
        up, down = (w.dequantize(x.dtype).view(e, -1, w.columns) for w in packed)
        x, logits = x.requires_grad_(backward), logits.requires_grad_(backward)
        grad = torch.randn(t, h, generator=torch.Generator().manual_seed(1)).to(x)
        floats = SimpleNamespace(x=x, up=up, down=down, logits=logits, k=k, module=module(x, up, down, shape))
        return SimpleNamespace(x=x, packed=packed, floats=floats, logits=logits, k=k, grad=grad)

    def run(forward):
        def call(x):
            out = forward(x)
            if not backward:
                return {"out": out}
            grads = torch.autograd.grad(out, (x.x, x.logits), x.grad.to(out.dtype))
            return dict(zip(("out", "x", "logits"), (out.detach(), *grads), strict=True))

        return call

    def packed(x, convert=lambda w: w):
        routing = fastpost.moe_route(x.logits, x.k)
        return experts(x.x, routing.plan, routing.gate, *(convert(w) for w in x.packed))

    def dequantized(x):
        return packed(x, lambda w: w.dequantize(x.x.dtype).view(e, -1, w.columns))

    others = {"bfloat16": lambda x: ours(x.floats), "dequantized": dequantized}
    others |= {"eager": lambda x: eager(x.floats)} if transformers() else {}
    size = int(3 * e * h * i * (1 + backward) * (0.5 + 2 / 128) * min(1, t * k / e))
    few = t * k / e < 16
    return Case(
        name=f"T={t} H={h} I={i} E={e} K={k} four bits layer {'forward+backward' if backward else 'forward'}",
        make=make,
        runs={"fastpost": run(packed)} | {name: run(f) for name, f in peers.pick(others, options.peers).items()},
        limits=limits.copy(size, options.device) if few else {},
        reference=run(lambda x: exact(x.floats)),
        tolerance=2e-2,
        flops=6 * t * k * h * i * (2 if backward else 1),
        bytes=size,
        bound="memory" if few else "compute",
    )


def product(options: Options, t, shape) -> Case:
    """The first product alone, with its gather and activation."""
    h, i, e, k = shape

    def make():
        (x, up, _), _, routing = inputs(options, t, shape)
        plan = routing.plan
        return SimpleNamespace(x=x, up=up, plan=plan, k=k, grouped=x[plan.order.long() // k],
                               bounds=plan.offset.tolist())  # fmt: skip

    def ours(x, f=fastpost.grouped_gemm, convert=lambda a: a):
        out = f(convert(x.x), convert(x.up), x.plan.offset, order=x.plan.order, top_k=x.k, activation="swiglu")
        return {"out": out}

    return Case(
        name=f"T={t} H={h} I={i} E={e} K={k} bfloat16 gather + up + SwiGLU",
        make=make,
        runs={"fastpost": ours},
        limits={limits.GEMM: lambda x: [a @ w.T for a, w in parts(x.grouped, x)]},
        reference=lambda x: ours(x, reference.grouped_gemm, torch.Tensor.double),
        tolerance=1e-2,
        flops=4 * t * k * h * i,
    )


def parts(rows, x):
    return [(rows[a:b], w) for (a, b), w in zip(pairwise(x.bounds), x.up, strict=True)]


def products(backward):
    """Torch's dense products of every expert, and nothing else."""

    @torch.no_grad()
    def call(x):
        for (a, b), up, down in zip(pairwise(x.bounds), x.up, x.down, strict=True):
            rows, act, pre = x.grouped[a:b], x.a[a:b], x.pre[a:b]
            rows @ up.T, act @ down.T
            if backward:
                rows @ down, rows.T @ act, pre.T @ rows, pre @ up  # rows stands for the gradient, too

    return call


def ours(x):
    routing = fastpost.moe_route(x.logits, x.k)
    return experts(x.x, routing.plan, routing.gate, x.up, x.down)


def exact(x):
    routing = fastpost.moe_route(x.logits, x.k)
    a = reference.grouped_gemm(x.x.float(), x.up.float(), routing.plan.offset, order=routing.plan.order, top_k=x.k,
                               activation="swiglu")  # fmt: skip
    y = reference.grouped_gemm(a, x.down.float(), routing.plan.offset)
    return moe_combine.moe_combine(y, routing.plan, routing.gate)


# ---- transformers ----------------------------------------------------------------------------------------------------


def transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def module(x, up, down, shape):
    """Mixtral's experts with these very weights."""
    if not transformers():
        return None
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    h, i, e, k = shape
    config = MixtralConfig(hidden_size=h, intermediate_size=i, num_local_experts=e, num_experts_per_tok=k)
    with torch.device("meta"):
        experts = MixtralExperts(config)
    for name, weight in (("gate_up_proj", up), ("down_proj", down)):
        experts.register_parameter(name, None)
        delattr(experts, name)
        setattr(experts, name, weight)
    return experts


def route(x):
    values, chosen = x.logits.softmax(-1).topk(x.k, -1)
    return chosen, (values / values.sum(-1, keepdim=True)).to(x.x.dtype)


def eager(x):
    x.module.config._experts_implementation = "eager"
    return x.module(x.x, *route(x))


def grouped_mm(x):
    x.module.config._experts_implementation = "grouped_mm"
    return x.module(x.x, *route(x))
