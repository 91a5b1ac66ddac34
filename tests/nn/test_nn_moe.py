# SPDX-License-Identifier: Apache-2.0
"""MoE and MoA are what their docstrings say, expert by expert, under every wrapper; closed forms of JetMoE."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpost
from compare import error
from fastpost.nn import MoA, MoE, Router, router_loss

ACTIVATIONS = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "reglu": F.relu,
}
OPTIONS = {
    "jetmoe": {"bias": True},
    "switch": {"top_k": 1, "normalize": False},
    "gelu": {"activation": "geglu"},
    "gelu-tanh": {"activation": "geglu_tanh", "top_k": 3},
    "relu": {"activation": "reglu", "experts": 1, "top_k": 1},
    "deepseek": {"scoring": "sigmoid", "correction": True, "scale": 2.5, "experts": 16, "top_k": 4},
    "all": {"top_k": 6},
    "recompute": {"recompute": True, "bias": True},
}


def moe(name="jetmoe", hidden=16, inner=24, **more):
    torch.manual_seed(0)
    options = {"experts": 6, "top_k": 2} | OPTIONS[name] | more
    made = MoE(hidden, inner, **options)
    return spread(made)


def moa(hidden=16, inner=24, **more):
    torch.manual_seed(0)
    return spread(MoA(hidden, inner, **{"experts": 6, "top_k": 2, "bias": True} | more))


def spread(made):
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, p.shape[-1] ** -0.5)
        made.router.weight.mul_(3)
        if made.router.correction is not None:
            made.router.correction.normal_(0, 0.3)
    return made


def plain_gates(router, x, weight):
    """(expert, gate) of rows x: the router computes in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ weight.to(wide).T
    scores = logits.softmax(-1) if router.scoring == "softmax" else logits.sigmoid()
    ranked = scores.detach() if router.correction is None else scores.detach() + router.correction.to(wide)
    expert = ranked.topk(router.top_k, -1).indices
    gate = scores.gather(1, expert)
    if router.normalize:
        gate = gate / gate.sum(-1, keepdim=True)
    return expert, (gate * router.scale).to(x.dtype)


def plain_moe(layer, x, weights):
    """The docstring's formula by loops, in the dtype of x; weights by name."""
    rows = x.reshape(-1, x.shape[-1])
    expert, gate = plain_gates(layer.router, rows, weights["router.weight"])
    out = []
    for t, row in enumerate(rows):
        total = 0
        for e, g in zip(expert[t], gate[t], strict=True):
            first, second = (weights["up"][e] @ row).chunk(2)
            total = total + g * (weights["down"][e] @ (ACTIVATIONS[layer.activation](first) * second))
        out.append(total + weights.get("bias", 0))
    return torch.stack(out).view(x.shape)


def plain_moa(layer, x, weights, attend):
    rows = x.reshape(-1, x.shape[-1])
    expert, gate = plain_gates(layer.router, rows, weights["router.weight"])
    queries = torch.stack([torch.stack([weights["query"][e] @ row for e in es]) for row, es in zip(rows, expert)])
    values = attend(queries.view(*x.shape[:-1], *queries.shape[1:])).reshape(queries.shape)
    out = []
    for t in range(len(rows)):
        total = weights.get("bias", 0)
        for k, e in enumerate(expert[t]):
            total = total + gate[t, k] * (weights["output"][e] @ values[t, k])
        out.append(total)
    return torch.stack(out).view(x.shape)


def attend(queries):
    """Something that mixes tokens and is no function of the expert: attention of 24 columns as 3 heads on itself."""
    b, s, k, d = queries.shape
    heads = queries.reshape(b, s, k * 3, d // 3).transpose(1, 2)
    keys = (
        torch.linspace(-1, 1, b * s * d, dtype=queries.dtype).view(b, s, 3, d // 3).transpose(1, 2).repeat(1, k, 1, 1)
    )
    return F.scaled_dot_product_attention(heads, keys, keys, is_causal=True).transpose(1, 2).reshape(queries.shape)


def everything(forward, x, named, dtype):
    """Output and gradients of x and every parameter, for one fixed gradient."""
    x = x.detach().to(dtype).requires_grad_()
    weights = {n: p.detach().to(dtype).requires_grad_() for n, p in named.items()}
    out = forward(x, weights)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    return [out, *torch.autograd.grad(out, [x, *weights.values()], grad)]


def distance(a, b):
    """Of whole tensors, relative: rows of bfloat16 that nearly cancel say nothing."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def expect_as_exact(layer, ours, plain, x, dtype):
    """Ours is as near to the float64 truth as the loops are in the same dtype."""
    layer = layer.to(dtype)
    named = dict(layer.named_parameters())
    truth, loops = (everything(plain, x, named, kind) for kind in (torch.float64, dtype))

    def module(x, weights):
        return torch.func.functional_call(layer, weights, (x, *ours))[0]

    measure, factor = (error, 4) if dtype == torch.float32 else (distance, 1.5)
    for name, a, b, c in zip(["out", "x", *named], everything(module, x, named, dtype), truth, loops, strict=True):
        a, b, c = (t.flatten(0, -2) if t.ndim > 1 else t for t in (a, b, c))
        bound = factor * measure(c, b) + torch.finfo(dtype).eps
        assert measure(a, b) <= bound, (name, measure(a, b), bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_moe_is_the_sum_over_its_experts(name, dtype):
    layer = moe(name)
    x = torch.randn(3, 7, 16).to(dtype)
    expect_as_exact(layer, (), lambda x, w: plain_moe(layer, x, w), x, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_moa_sends_queries_out_and_values_back(top_k, dtype):
    layer = moa(top_k=top_k)
    x = torch.randn(2, 9, 16).to(dtype)
    expect_as_exact(layer, (attend,), lambda x, w: plain_moa(layer, x, w, attend), x, dtype)


def test_halves_of_moa_are_the_whole():
    layer, x = moa(), torch.randn(2, 5, 16)
    queries, routing = layer.map(x)
    assert queries.shape == (2, 5, 2, 24) and routing.expert.shape == (10, 2)
    assert torch.equal(layer.reduce(attend(queries), routing), layer(x, attend)[0])


# ---- closed forms ----------------------------------------------------------------------------------------------------


def test_routing_of_jetmoe():
    """Logits (2, 1, 0, -1) for every token: METHODS' numbers; the router's matrix is the identity."""
    router = Router(4, 4, 2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    alike = router(torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(6, 4))
    torch.testing.assert_close(alike.gate, torch.tensor([0.731059, 0.268941]).expand(6, 2), rtol=0, atol=1e-6)
    assert alike.load_balance.item() == pytest.approx(1.761594, abs=1e-6)
    assert alike.z.item() == pytest.approx(5.954526, abs=1e-6)
    balanced = router(torch.stack([torch.tensor([2.0, 1.0, 0.0, -1.0]).roll(i) for i in range(4)]))
    assert balanced.load_balance.item() == pytest.approx(1.0, abs=1e-6)
    far = router(torch.full((3, 4), 1e4))  # a logsumexp without a maximum would be infinite
    assert far.z.item() == pytest.approx((1e4 + 1.386294) ** 2, rel=1e-6)
    total = router_loss([alike, balanced])
    assert total.item() == pytest.approx(0.01 * 2.761594 + 0.001 * (alike.z + balanced.z).item(), rel=1e-6)
    only_z = router_loss(iter([alike]), load_balance=0.0, z=1.0)
    assert only_z.item() == pytest.approx(5.954526, abs=1e-6)
    router_loss([alike]).backward()
    assert router.weight.grad.abs().max() > 1e-4


def test_all_experts_with_equal_gates_are_one_dense_layer():
    layer, x = moe("all", experts=4, top_k=4), torch.randn(11, 16)
    with torch.no_grad():
        layer.router.weight.zero_()
    first, second = (layer.up[:, half].flatten(0, 1) for half in (slice(0, 24), slice(24, 48)))
    dense = (F.silu(x @ first.T) * (x @ second.T)) @ layer.down.transpose(0, 1).flatten(1).T / 4
    torch.testing.assert_close(layer(x)[0], dense, rtol=1e-5, atol=1e-5)


def test_order_of_tokens_does_not_matter():
    layer, x, order = moe("deepseek"), torch.randn(40, 16), torch.randperm(40)
    (out, routing), (shuffled, again) = layer(x), layer(x[order])
    assert torch.equal(routing.expert[order], again.expert)
    torch.testing.assert_close(out[order], shuffled, rtol=1e-5, atol=1e-6)
    assert again.load_balance.item() == pytest.approx(routing.load_balance.item(), rel=1e-6)


# ---- under wrappers --------------------------------------------------------------------------------------------------


def gradients(layer, run, x):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    out, routing = run(x)
    (out.float().square().sum() + router_loss([routing], load_balance=1.0, z=1.0)).backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


LAYERS = {"moe": moe, "moe-recompute": lambda: moe("recompute"), "moa": moa}


def runner(layer):
    return layer if isinstance(layer, MoE) else lambda x: layer(x, attend)


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_bits_again_and_under_checkpointing(name):
    layer, x = LAYERS[name](), torch.randn(3, 20, 16)
    run = runner(layer)
    first = gradients(layer, run, x)
    assert all(g.abs().max() > 0 for g in first)
    for again in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(layer, again, x), strict=True))


def saved_bytes(layer, x):
    held = {}

    def keep(t):
        held[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x.clone().requires_grad_())
    return sum(held.values())


def test_recompute_keeps_less_and_changes_nothing():
    layers, x = (moe("jetmoe"), moe("recompute")), torch.randn(3, 20, 16)
    kept, less = (saved_bytes(layer, x) for layer in layers)
    assert less < kept
    ours = [gradients(layer, layer, x) for layer in layers]
    assert all(torch.equal(a, b) for a, b in zip(*ours, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name):
    layer, x = LAYERS[name](), torch.randn(2, 6, 16)
    exact = runner(layer)(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(layer, runner(layer), x)
        routing = runner(layer)(x)[1]
    assert got[0].dtype == torch.bfloat16
    assert torch.equal(routing.gate, exact.gate), "the router computes in float32"
    for a, b in zip(got, gradients(layer, runner(layer), x), strict=True):
        assert distance(a, b) < 0.03


@pytest.mark.parametrize("name", LAYERS)
def test_no_tokens(name):
    layer = LAYERS[name]()
    for shape in ((0, 5, 16), (2, 0, 16)):
        got = gradients(layer, layer if name != "moa" else lambda x: layer(x, lambda q: q), torch.randn(shape))
        assert got[0].shape == shape and not any(g.isnan().any() or g.any() for g in got)


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_there_and_back_and_meta(name):
    made, stream = LAYERS[name](), io.BytesIO()
    torch.save(made.state_dict(), stream)
    with torch.device("meta"):
        ghost = LAYERS[name]()
    assert all(p.is_meta for p in ghost.parameters())
    stream.seek(0)
    assert str(ghost.load_state_dict(torch.load(stream), assign=True)) == "<All keys matched successfully>"
    x = torch.randn(1, 6, 16)
    for other in (ghost, copy.deepcopy(made)):
        assert torch.equal(runner(other)(x)[0], runner(made)(x)[0])
    sharp = {n: (p.shape, p.dtype) for n, p in made.named_parameters()}
    assert {n: (p.shape, p.dtype) for n, p in ghost.named_parameters()} == sharp
    fresh = ghost.to_empty(device="cpu")
    fresh.reset_parameters()
    assert all(p.isfinite().all() for p in fresh.parameters())
    assert fresh.bias is None or not fresh.bias.any()


def test_parameters_have_these_names_and_shapes():
    assert {n: list(p.shape) for n, p in moe("deepseek", bias=True).state_dict().items()} == {
        "router.weight": [16, 16], "router.correction": [16], "up": [16, 48, 16], "down": [16, 16, 24], "bias": [16],
    }  # fmt: skip
    assert {n: list(p.shape) for n, p in moa().state_dict().items()} == {
        "router.weight": [6, 16], "query": [6, 24, 16], "output": [6, 16, 24], "bias": [16],
    }  # fmt: skip
    assert repr(moe("deepseek")) == (
        "MoE(\n  hidden=16, inner=24, experts=16, swiglu, bias=False\n"
        "  (router): Router(hidden=16, experts=16, top_k=4, sigmoid, scale=2.5, corrected)\n)"
    )


def test_the_correction_stays_float32_and_is_not_trained():
    layer = moe("deepseek")
    exact = layer.router.correction.clone()
    for convert in (layer.half, layer.double, lambda: layer.to(torch.bfloat16)):
        convert()
        assert torch.equal(layer.router.correction, exact) and layer.router.correction.dtype == torch.float32
    assert layer.up.dtype == torch.bfloat16 and "router.correction" not in dict(layer.named_parameters())
    routing = layer(torch.randn(8, 16, dtype=torch.bfloat16))[1]
    layer.router.correction[routing.expert[0, 0]] = -9.0  # moves the choice, not the gates of what is still chosen
    moved = layer(torch.randn(8, 16, dtype=torch.bfloat16))[1]
    assert not (moved.expert == routing.expert[0, 0]).any()


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_on_meta(name):
    with torch.device("meta"):
        layer, x = LAYERS[name](), torch.randn(2, 6, 16)
        out, routing = layer(x, lambda q: q) if name == "moa" else layer(x)
    assert (
        out.is_meta and out.shape == x.shape and routing.expert.shape == (12, 2) and routing.plan.offset.shape == (7,)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_it_compiles_whole(name):
    layer, x = LAYERS[name](), torch.randn(2, 6, 16)
    torch._dynamo.reset()
    compiled = torch.compile(runner(layer), backend="aot_eager", fullgraph=True)
    for ours, eager in zip(gradients(layer, compiled, x), gradients(layer, runner(layer), x), strict=True):
        torch.testing.assert_close(ours, eager)


# ---- mistakes --------------------------------------------------------------------------------------------------------

REFUSED = [
    (lambda: MoE(16, 8, 4, 5), r"\[Router\] top_k: expected 1 to 4 of 4 experts .* got 5"),
    (lambda: MoE(16, 8, 4, 0), r"\[Router\] top_k: .* got 0"),
    (lambda: MoE(16, 0, 4, 1), r"\[MoE\] expected at least one column, got hidden 16, inner 0"),
    (lambda: MoA(0, 8, 4, 1), r"\[MoA\] expected at least one column, got hidden 0, inner 8"),
    (lambda: MoE(16, 8, 4, 1, activation="silu"), r"\[MoE\] activation: expected one of swiglu, .*, got 'silu'"),
    (lambda: MoA(16, 8, 4, 1, scoring="tanh"), r"\[Router\] scoring: expected softmax or sigmoid, got 'tanh'"),
    (lambda: moe()(torch.randn(3, 15)), r"\[MoE\] x: expected \[..., 16\], got \[3, 15\]"),
    (lambda: moa().map(torch.randn(3, 15)), r"\[MoA\] x: expected \[..., 16\], got \[3, 15\]"),
    (lambda: router_loss([]), r"\[router_loss\] routings: expected at least one Routing, got none"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_public_names():
    assert {"MoE", "MoA", "Router", "router_loss"} <= set(dir(fastpost.nn)) and fastpost.nn.MoE is MoE
    assert issubclass(MoE, nn.Module)
