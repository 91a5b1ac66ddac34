# SPDX-License-Identifier: Apache-2.0
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import fastpost
from compare import FLOATS, error, overall
from drawn import draw
from fastpost import _core
from fastpost.reference import grouped_gemm as reference
from fastpost.reference import moe_dispatch

CASES = reference.cases()
SHAPES = {c.name: c for c in moe_dispatch.cases()}


def run(f, inputs, options, convert):
    """Output and the gradients of x, weight and bias? for uneven incoming gradients."""
    (x, weight, offset), bias = inputs, options.get("bias")
    leaves = [None if t is None else convert(t).detach().requires_grad_() for t in (x, weight, bias)]
    out = f(leaves[0], leaves[1], offset, **(options | {"bias": leaves[2]} if bias is not None else options))
    out.backward(draw(*out.shape, seed=5, device=x.device).to(out.dtype))
    return [out] + [t.grad for t in leaves if t is not None]


def eager(x, weight, offset, *, order=None, top_k=1, bias=None, activation=None):
    """Plain torch as a model has it: every step rounds to the dtype."""
    rows = x if order is None else x[order.long() // top_k]
    bounds = offset.tolist()
    parts = [
        F.linear(rows[a:b], weight[e], None if bias is None else bias[e]) for e, (a, b) in enumerate(pairwise(bounds))
    ]
    return reference.activate(torch.cat([*parts, rows.new_zeros(len(rows) - bounds[-1], weight.shape[1])]), activation)


def expect_as_good(ours, truth, plain):
    """Overall within 1.1 of plain torch's error; the worst row, which is chance, within 3."""
    for a, b, c in zip(ours, truth, plain, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all()
        assert overall(a, b) <= 1.1 * overall(c, b) + 5e-7
        a, b, c = (t.flatten(0, -2) for t in (a, b, c))
        assert error(a, b) <= 3 * error(c, b) + 3e-6


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    if dtype == torch.float16 and "scale" in case.name:
        pytest.skip("beyond float16")
    inputs, options = case.inputs(dtype, device)
    ours = run(fastpost.grouped_gemm, inputs, options, torch.clone)
    assert all(t.dtype == dtype for t in ours)
    truth = run(reference.grouped_gemm, inputs, options, torch.Tensor.double)
    expect_as_good(ours, truth, run(eager, inputs, options, torch.clone))


def outputs(case, dtype, device, threads=1, fill=float("nan")):
    """Every function of the core on the same inputs, outputs and workspace full of `fill`."""
    (x, weight, offset), options = case.inputs(dtype, device)
    order, top_k, bias = options.get("order"), options.get("top_k", 1), options.get("bias")
    r, (e, n, k) = (x if order is None else order).shape[0], weight.shape
    code = reference.ACTIVATIONS.index(case.activation)
    i = n // 2
    turned = draw(e, k, i, seed=3, device=device, dtype=dtype).mT  # of a second product [E, K, I]
    gate = draw(r, seed=4, device=device) if order is not None else None

    def new(*shape, like=dtype):
        return torch.full(shape, fill, dtype=like, device=device)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        space = max(_core.grouped_gemm_bytes(w, r, threads) for w in (weight, turned))
        space = torch.full((space,), 255, dtype=torch.uint8, device=device)
        out, pre = new(r, i if code else n), new(r, n)
        _core.grouped_gemm(x, order, top_k, weight, offset, bias, code, space, pre if code else None, out)
        grad = draw(r, n, seed=6, device=device, dtype=dtype)
        grad_weight, grad_bias = new(e, n, k), new(e, n)
        _core.grouped_gemm_weight_gradient(grad, None, 1, x, order, top_k, offset, space, grad_weight, grad_bias)
        found = [out, grad_weight, grad_bias]
        if code:
            grad_pre, activated, grad_gate = new(r, n), new(r, i), new(r, like=torch.float32)
            _core.grouped_gemm_activation_backward(x, order, top_k, turned, offset, pre, code, gate, space, grad_pre,
                                                   activated, grad_gate)  # fmt: skip
            alone, grad_alone = new(r, i), new(r, n)
            _core.grouped_gemm_activate(pre, code, activated, alone, grad_alone)
            found += [pre, grad_pre, activated, grad_gate, alone, grad_alone]
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_same_bits_whatever_was_there_and_how_many_threads(case, device):
    first = outputs(case, torch.bfloat16, device)
    for other in (outputs(case, torch.bfloat16, device, fill=7.0), outputs(case, torch.bfloat16, device, threads=3)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(torch.isfinite(a).all() for a in first)


@pytest.mark.parametrize("activation", list(reference.GATED))
def test_activation_backward(activation, device):
    """grad_pre, activated and grad_gate against autograd of Σ gate·(grad · W)·act(pre) in float64."""
    case = reference.Case("x", SHAPES["some-absent"], 26, activation)
    (x, _, offset), options = case.inputs(device=device)
    order, k = options["order"], options["top_k"]
    r, i, e = len(order), 13, offset.numel() - 1
    down = draw(e, x.shape[1], i, device=device)
    pre, gate = draw(r, 2 * i, seed=1, device=device), draw(r, seed=2, device=device)
    grad_pre, activated, grad_gate = torch.empty_like(pre), pre.new_empty(r, i), torch.empty_like(gate)
    space = torch.empty(_core.grouped_gemm_bytes(down.mT, r, 1), dtype=torch.uint8, device=device)
    code = reference.ACTIVATIONS.index(activation)
    _core.grouped_gemm_activation_backward(x, order, k, down.mT, offset, pre, code, gate, space, grad_pre, activated,
                                           grad_gate)  # fmt: skip
    d = reference.grouped_gemm(x.double(), down.double().mT, offset, order=order, top_k=k)
    p, g = pre.double().requires_grad_(), gate.double().requires_grad_()
    a = g[order.long(), None] * reference.activate(p, activation)
    (d * a).sum().backward()
    here = int(offset[-1])
    assert 0 < here < r
    assert error(grad_pre[:here], p.grad[:here]) < 2e-6 and not grad_pre[here:].any()
    assert error(activated[:here], a[:here]) < 1e-6 and not activated[here:].any()
    assert error(grad_gate, g.grad) < 1e-6


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 70, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_of_cutting(rows, dtype, device):
    """Few rows, a panel and a bit, more than one tile of rows; sums longer than what is taken at a time."""
    k, n = 1100, 140
    x, weight = draw(rows + 3, k, device=device, dtype=dtype), draw(2, n, k, seed=1, device=device, dtype=dtype)
    offset = torch.tensor([0, rows, rows + 3], dtype=torch.int32, device=device)
    options = {"bias": draw(2, n, seed=2, device=device, dtype=dtype)}
    for w in (weight, weight.mT.contiguous().mT):
        inputs = x, w, offset
        ours, plain = (run(f, inputs, options, torch.clone) for f in (fastpost.grouped_gemm, eager))
        expect_as_good(ours, run(reference.grouped_gemm, inputs, options, torch.Tensor.double), plain)


def test_a_row_does_not_depend_on_the_others(device):
    """Equal bits of a row, wherever it is and with whom, as long as its expert has as few rows or as many."""
    weight = draw(3, 40, 72, device=device, dtype=torch.bfloat16)
    x = draw(60, 72, seed=1, device=device, dtype=torch.bfloat16)
    offset = torch.tensor([0, 5, 40, 60], dtype=torch.int32, device=device)
    whole = fastpost.grouped_gemm(x, weight, offset)
    turned = torch.tensor([4, 3, 2, 1, 0, *range(39, 4, -1), *range(40, 60)], device=device)
    assert torch.equal(fastpost.grouped_gemm(x[turned], weight, offset), whole[turned])
    alone = torch.tensor([0, 35], dtype=torch.int32, device=device)
    assert torch.equal(fastpost.grouped_gemm(x[5:40], weight[1:2], alone), whole[5:40])


def test_views_are_taken_as_they_are(device):
    """Rows and experts that lie apart, at odd addresses."""
    for dtype in (torch.float32, torch.bfloat16):
        x = draw(30, 81, device=device, dtype=dtype)[:, 1:65]
        weight = draw(4, 60, 70, seed=1, device=device, dtype=dtype)[1:4, 3:43, 5:69]
        offset = torch.tensor([0, 3, 3, 30], dtype=torch.int32, device=device)
        same = fastpost.grouped_gemm(x.contiguous(), weight.contiguous(), offset)
        assert torch.equal(fastpost.grouped_gemm(x, weight, offset), same)


def test_opcheck(device):
    for name in ("mixtral", "odd-swiglu", "grouped", "transposed"):
        (x, weight, offset), options = next(c for c in CASES if c.name == name).inputs(device=device)
        code = reference.ACTIVATIONS.index(options["activation"])
        bias = options.get("bias")
        leaves = [t if t is None else t.requires_grad_() for t in (x, weight, bias)]
        args = leaves[0], leaves[1], offset, options.get("order"), options.get("top_k", 1), leaves[2], code, code > 0
        torch.library.opcheck(torch.ops.fastpost.grouped_gemm.default, args)


def test_gradcheck(device):
    """float64 goes through the reference."""
    plan = moe_dispatch.Case("x", 9, 2, 8, 0).plan(device)
    x, weight = draw(9, 5, device=device).double(), draw(8, 6, 5, seed=1, device=device).double()

    def f(x, weight):
        return fastpost.grouped_gemm(x, weight, plan.offset, order=plan.order, top_k=2, activation="geglu")

    assert torch.autograd.gradcheck(f, (x.requires_grad_(), weight.requires_grad_()))


BAD = {
    "weight's dtype": (lambda a: a | {"weight": a["weight"].half()}, r"weight: expected float32 .* got float16"),
    "weight's columns": (lambda a: a | {"weight": a["weight"][..., :7]}, r"x: expected float32 \[any, 7\]"),
    "layout": (lambda a: a | {"weight": a["weight"][..., ::2], "x": a["x"][:, ::2].contiguous()},
               r"weight: expected stride 1 along K, or along N .* Call .contiguous\(\)"),
    "x's layout": (lambda a: a | {"x": a["x"].T.contiguous().T, "raw": True},
                   r"x: expected a last dimension of stride"),
    "offset's dtype": (lambda a: a | {"offset": a["offset"].long()}, r"offset: expected int32 \[4\], got int64"),
    "offset's length": (lambda a: a | {"offset": a["offset"][:-1]}, r"offset: expected int32 \[4\], got int32 \[3\]"),
    "offset descends": (lambda a: a | {"offset": torch.tensor([0, 5, 3, 12], dtype=torch.int32)}, "ascend from 0"),
    "offset too large": (lambda a: a | {"offset": torch.tensor([0, 5, 6, 13]).int()}, "at most the rows, 12"),
    "order out of range": (lambda a: a | {"order": torch.arange(1, 13, dtype=torch.int32)},
                           r"order: expected slots in \[0, 12\), got 12 at place 11"),
    "order's dtype": (lambda a: a | {"order": torch.arange(12)}, r"order: expected int32"),
    "top_k": (lambda a: a | {"order": torch.arange(12, dtype=torch.int32), "top_k": 0}, "top_k: expected at least 1"),
    "bias": (lambda a: a | {"bias": torch.zeros(3, 9)}, r"bias: expected float32 \[3, 10\], got float32 \[3, 9\]"),
    "activation": (lambda a: a | {"activation": "tanh"}, "activation: expected one of None, 'swiglu'.*got 'tanh'"),
    "odd N": (lambda a: a | {"weight": a["weight"][:, :9], "activation": "swiglu"}, "an even N for a gated activation"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    args = change({"x": draw(12, 8), "weight": draw(3, 10, 8), "offset": torch.tensor([0, 5, 6, 12]).int()})
    if args.pop("raw", False):  # the Python function mends it
        space = torch.empty(1 << 20, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"\[grouped_gemm\] " + message):
            _core.grouped_gemm(args["x"], None, 1, args["weight"], args["offset"], None, 0, space, None, draw(12, 10))
        return
    with pytest.raises(ValueError, match=r"\[grouped_gemm\] .*" + message):
        fastpost.grouped_gemm(**args)


def test_too_small_a_workspace_is_refused():
    x, weight, offset = draw(12, 8), draw(3, 10, 8), torch.tensor([0, 5, 6, 12]).int()
    with pytest.raises(ValueError, match=r"workspace: expected at least \d+ bytes, got 64"):
        _core.grouped_gemm(x, None, 1, weight, offset, None, 0, torch.empty(64, dtype=torch.uint8), None, draw(12, 10))
