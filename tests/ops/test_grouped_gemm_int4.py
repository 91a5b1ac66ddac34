# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm and the whole mixture with experts in four bits: python/fastpost/ops/_int4_experts.py. The truth is the
dequantised weight in float64."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import fastpost
from compare import FLOATS, error, overall
from drawn import draw
from fastpost.ops import _int4_experts
from fastpost.ops._experts import experts
from fastpost.ops._gated import gated
from fastpost.reference import grouped_gemm as reference
from fastpost.reference import int4_gemm as reference_int4
from fastpost.reference import moe_combine, moe_dispatch

ROUTINGS = {c.name: c for c in moe_dispatch.cases()}
FORMATS = {
    "symmetric-128": {"group_size": 128},
    "symmetric-32": {"group_size": 32, "scales_dtype": torch.float16},
    "asymmetric-64": {"group_size": 64, "scheme": "asymmetric"},
    "asymmetric-row": {"group_size": -1, "scheme": "asymmetric", "scales_dtype": torch.float32},
    "nf4-64": {"group_size": 64, "scheme": "nf4"},
    "nf4-nested": {"group_size": 32, "scheme": "nf4", "double_quant": True},
    "act-order": {"group_size": 32, "act_order": True},
}
ROOM = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=["an expert at a time", "slabs"])
def way(request, monkeypatch, device):
    """A GPU's way runs on a CPU, too: slabs of two experts, so that there are several."""
    if request.param == "slabs":
        monkeypatch.setattr(_int4_experts, "_by_slabs", lambda x: True)
        slabs = _int4_experts._slabs

        def small(w, count, like):
            size = 2 * w.codes.shape[0] // count * w.columns * like.element_size()
            monkeypatch.setattr(_int4_experts, "SLAB_BYTES", size)
            return slabs(w, count, like)

        monkeypatch.setattr(_int4_experts, "_slabs", small)
    elif device == "cuda":
        pytest.skip("a GPU has slabs alone")
    return request.param


def packed(e, n, k, seed=0, device="cpu", act_order=False, **options):
    weight = fastpost.int4_quantize(draw(e * n, k, seed=seed) / k**0.5, **options)
    if act_order:
        weight = replace(weight, order=torch.randperm(k, generator=torch.Generator().manual_seed(seed)))
    return weight.to(device)


def dense(weight, e):
    """The truth: float64, exact."""
    return reference_int4.dequantize(weight).double().view(e, -1, weight.columns)


def run(f, x, bias, weight, offset, convert=torch.clone, **options):
    """Output and gradients of x and bias? for uneven incoming gradients."""
    leaves = [None if t is None else convert(t).detach().requires_grad_() for t in (x, bias)]
    out = f(leaves[0], weight, offset, bias=leaves[1], **options)
    out.backward(draw(*out.shape, seed=5, device=out.device).to(out.dtype))
    return [out.detach()] + [t.grad for t in leaves if t is not None]


def expect_close(ours, truth, dtype, plain=None):
    """plain: what plain torch gets in dtype with the dequantised weights, where sums cancel or lie at relu's edge."""
    for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert a.shape == b.shape and torch.isfinite(a).all()
        rows = [t.flatten(0, -2) for t in (a, b)]
        most = [1.5 * overall(plain[i], b), 3 * error(plain[i].flatten(0, -2), rows[1])] if plain else [0, 0]
        assert overall(a, b) < most[0] + ROOM[dtype] and error(*rows) < most[1] + 6 * ROOM[dtype]


def eager(x, weight, offset, *, order=None, top_k=1, bias=None, activation=None):
    """Plain torch: every step rounds to the dtype."""
    rows = x if order is None else x[order.long() // top_k]
    bounds = offset.tolist()
    parts = [F.linear(rows[a:b], weight[e].to(x.dtype), None if bias is None else bias[e])
             for e, (a, b) in enumerate(pairwise(bounds))]  # fmt: skip
    return reference.activate(torch.cat([*parts, rows.new_zeros(len(rows) - bounds[-1], weight.shape[1])]), activation)


def drawn(routing, n, dtype, device, gather=True, bias=False, **options):
    """x, bias?, the weight and offset, and keyword arguments."""
    x, plan = routing.inputs(dtype, device)
    weight = packed(routing.e, n, routing.h, device=device, **options)
    keywords = {"order": plan.order, "top_k": routing.k} if gather else {}
    x = x if gather else moe_dispatch.moe_dispatch(x, plan)
    given = draw(routing.e, n, seed=3, device=device, dtype=dtype) if bias else None
    return (x, given, weight, plan.offset), keywords


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("activation", [None, "swiglu", "geglu"])
def test_every_format(options, activation, dtype, device, way):
    routing = moe_dispatch.Case("x", 30, 2, 5, 200)
    (x, bias, weight, offset), keywords = drawn(routing, 24, dtype, device, bias=activation != "swiglu", **options)
    keywords["activation"] = activation
    ours = run(fastpost.grouped_gemm, x, bias, weight, offset, **keywords)
    assert all(t.dtype == dtype for t in ours)
    truth = run(reference.grouped_gemm, x, bias, dense(weight, 5), offset, torch.Tensor.double, **keywords)
    expect_close(ours, truth, dtype)
    quiet = fastpost.grouped_gemm(x, weight, offset, bias=bias, **keywords)  # nobody wants a gradient
    assert torch.equal(quiet, ours[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "grouped"])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_every_routing(routing, gather, dtype, device, way):
    for activation in (None, "reglu"):
        (x, bias, weight, offset), keywords = drawn(routing, 26, dtype, device, gather, bias=True, group_size=32)
        keywords["activation"] = activation
        ours = run(fastpost.grouped_gemm, x, bias, weight, offset, **keywords)
        exact = dense(weight, routing.e)
        truth = run(reference.grouped_gemm, x, bias, exact, offset, torch.Tensor.double, **keywords)
        expect_close(ours, truth, dtype, run(eager, x, bias, exact, offset, **keywords))


def mixture(x, gate, plan, up, down, activation="swiglu", **options):
    return experts(x, plan, gate, up, down, activation=activation, **options)


def composed(x, gate, plan, up, down, activation="swiglu", product=reference.grouped_gemm):
    a = product(x, up, plan.offset, order=plan.order, top_k=plan.place.shape[1], activation=activation)
    return moe_combine.moe_combine(product(a, down, plan.offset), plan, gate)


def mixture_run(f, x, gate, plan, up, down, convert=torch.clone, **options):
    x, gate = (convert(t).detach().requires_grad_() for t in (x, gate))
    out = f(x, gate, plan, up, down, **options)
    out.backward(draw(*out.shape, seed=5, device=out.device).to(out.dtype))
    return [out.detach(), x.grad, gate.grad]


def mixture_inputs(routing, dtype, device, inner=40, **options):
    x, plan = routing.inputs(dtype, device)
    up = packed(routing.e, 2 * inner, routing.h, 1, device, **options)
    down = packed(routing.e, routing.h, inner, 2, device, **options)
    return x, torch.rand(plan.place.shape, generator=torch.Generator().manual_seed(4)).to(device), plan, up, down


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_mixture_of_every_routing(routing, dtype, device, way):
    x, gate, plan, up, down = mixture_inputs(routing, dtype, device, group_size=32)
    ours = mixture_run(mixture, x, gate, plan, up, down)
    exact = dense(up, routing.e), dense(down, routing.e)
    truth = mixture_run(composed, x, gate, plan, *exact, torch.Tensor.double)
    expect_close(ours, truth, dtype, mixture_run(composed, x, gate, plan, *exact, product=eager))
    assert ours[2].dtype == torch.float32  # the gate's
    assert torch.equal(mixture(x, gate, plan, up, down), ours[0])


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("activation", list(reference.GATED))
def test_mixture_of_every_format(activation, options, device, way):
    x, gate, plan, up, down = mixture_inputs(moe_dispatch.Case("x", 30, 2, 5, 200), torch.float32, device, **options)
    ours = mixture_run(mixture, x, gate, plan, up, down, activation=activation)
    truth = mixture_run(composed, x, gate, plan, dense(up, 5), dense(down, 5), torch.Tensor.double,
                        activation=activation)  # fmt: skip
    expect_close(ours, truth, torch.float32)


def test_one_of_both_in_four_bits(device):
    """The other trains."""
    x, gate, plan, up, down = mixture_inputs(moe_dispatch.Case("x", 30, 2, 5, 200), torch.float32, device)
    for i in (0, 1):
        pair, exact = [up, down], [dense(w, 5) for w in (up, down)]
        pair[i] = exact[i].float().requires_grad_()
        ours = mixture_run(mixture, x, gate, plan, *pair)
        exact[i].requires_grad_()
        truth = mixture_run(composed, x, gate, plan, *exact, torch.Tensor.double)
        expect_close([*ours, pair[i].grad], [*truth, exact[i].grad], torch.float32)


def test_recomputing_changes_no_bit_and_keeps_only_x(device, way):
    x, gate, plan, up, down = mixture_inputs(ROUTINGS["mixtral"], torch.bfloat16, device)
    ours = mixture_run(mixture, x, gate, plan, up, down)
    again = mixture_run(mixture, x, gate, plan, up, down, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    weights = {t.data_ptr() for t in (*_int4_experts.stack(up), *_int4_experts.stack(down)) if torch.is_tensor(t)}
    for recompute, rows in ((True, 0), (False, len(plan.order) * up.shape[0] // routing_experts(plan))):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            mixture(x.clone().requires_grad_(), gate, plan, up, down, recompute=recompute)
        own = sum(t.nbytes for t in kept if t.data_ptr() not in weights)
        small = gate.nbytes + sum(t.nbytes for t in plan)
        assert own == x.nbytes + small + rows * x.element_size()


def routing_experts(plan):
    return plan.offset.numel() - 1


def test_same_bits_on_any_number_of_threads(device):
    x, gate, plan, up, down = mixture_inputs(moe_dispatch.Case("x", 90, 2, 5, 256), torch.bfloat16, device, inner=130)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(mixture_run(mixture, x, gate, plan, up, down))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_row_does_not_depend_on_the_others(device):
    """The bits of an expert's rows are those that it computes alone."""
    weight = packed(3, 40, 72, device=device)
    x = draw(60, 72, seed=1, device=device, dtype=torch.bfloat16)
    whole = fastpost.grouped_gemm(x, weight, torch.tensor([0, 5, 40, 60], dtype=torch.int32, device=device))
    alone = replace(weight, codes=weight.codes[40:80], scales=weight.scales[40:80])
    there = fastpost.grouped_gemm(x[5:40], alone, torch.tensor([0, 35], dtype=torch.int32, device=device))
    assert torch.equal(there, whole[5:40])


def test_calls_for_some_experts_give_what_one_for_all_does(device):
    """What slabs rest on: offset may begin above 0, and rows before it stay."""
    x, plan = ROUTINGS["some-absent"].inputs(torch.float32, device)
    e, h = ROUTINGS["some-absent"].e, x.shape[1]
    k, rows, core = plan.place.shape[1], len(plan.order), fastpost._core
    up, down = draw(e, 20, h, device=device), draw(e, h, 10, seed=1, device=device)
    pre, gate = draw(rows, 20, seed=2, device=device), draw(rows, seed=3, device=device)
    space = torch.empty(max(core.grouped_gemm_bytes(w, rows, 1) for w in (up, up.mT, down.mT)), dtype=torch.uint8,
                        device=device)  # fmt: skip

    def all_of(cuts):
        found = [x.new_full((rows, n), float("nan")) for n in (10, h, 20)] + [torch.zeros_like(gate)]
        for first, last in pairwise(cuts):
            some, offset = torch.empty_like(gate), plan.offset[first : last + 1]
            core.grouped_gemm(x, plan.order, k, up[first:last], offset, None, 1, space, None, found[0])
            core.grouped_gemm(pre, None, 1, up[first:last].mT, offset, None, 0, space, None, found[1])
            core.grouped_gemm_activation_backward(x, plan.order, k, down[first:last].mT, offset, pre, 1, gate, space,
                                                  found[2], None, some)  # fmt: skip
            theirs = (plan.place >= offset[0]) & (plan.place < offset[-1])
            found[3] = torch.where(theirs.view(-1), some, found[3])
        return found

    assert e > 3
    for a, b in zip(all_of([0, e]), all_of([0, 1, 3, e]), strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", list(reference.GATED))
def test_gated(activation, dtype, device):
    pre = draw(7, 26, device=device, dtype=dtype).requires_grad_()
    out = gated(pre, activation)
    out.backward(draw(7, 13, seed=1, device=device).to(dtype))
    exact = pre.detach().double().requires_grad_()
    truth = reference.activate(exact, activation)
    truth.backward(draw(7, 13, seed=1, device=device).to(dtype).double())
    expect_close([out, pre.grad], [truth, exact.grad], dtype)
    torch.library.opcheck(torch.ops.fastpost.grouped_gemm_activate.default, (pre.detach().requires_grad_(), 1))
    with pytest.raises(ValueError, match="expected a gated one, got None"):
        gated(pre, None)


@pytest.mark.parametrize("name", ["symmetric-32", "asymmetric-64", "nf4-nested", "act-order"])
def test_opcheck(name, device):
    routing = moe_dispatch.Case("x", 9, 2, 3, 64)
    x, gate, plan, up, down = mixture_inputs(routing, torch.float32, device, **FORMATS[name])
    x.requires_grad_(), gate.requires_grad_()
    bias = draw(3, 80, device=device).requires_grad_()
    ours = torch.ops.fastpost
    one, two = _int4_experts.stack(up), _int4_experts.stack(down)
    torch.library.opcheck(ours.grouped_gemm_int4.default, (x, plan.offset, plan.order, 2, bias, 1, True, *one))
    torch.library.opcheck(ours.moe_experts_int4.default, (x, gate, *plan, 1, True, *one, *two))


@pytest.mark.parametrize("name", ["asymmetric-64", "nf4-nested", "act-order"])
def test_compiles_whole(name, device):
    x, gate, plan, up, down = mixture_inputs(moe_dispatch.Case("x", 9, 2, 3, 64), torch.float32, device,
                                             **FORMATS[name])  # fmt: skip

    def f(x, gate, _, up, down):
        first = fastpost.grouped_gemm(x, up, plan.offset, order=plan.order, top_k=2)
        second = fastpost.grouped_gemm(gated(first, "swiglu"), down, plan.offset)
        return fastpost.moe_combine(second, plan, gate) + mixture(x, gate, plan, up, down)

    torch._dynamo.reset()
    ours = mixture_run(torch.compile(f, fullgraph=True, backend="aot_eager"), x, gate, plan, up, down)
    for a, b in zip(ours, mixture_run(f, x, gate, plan, up, down), strict=True):
        assert overall(a, b) < 1e-6


def bad(**changes):
    given = {"x": draw(12, 64), "weight": packed(3, 10, 64), "offset": torch.tensor([0, 5, 6, 12]).int()}
    return given | changes


def frozen_not(weight):
    return replace(weight, scales=weight.scales.float().requires_grad_())


BAD = {
    "rows": (partial(bad, offset=torch.tensor([0, 5, 6, 7, 12]).int()),
             r"weight: expected as many rows for each of 4 experts, got an Int4Weight of 30 rows"),
    "no experts": (partial(bad, offset=torch.zeros(1).int()), "for each of 0 experts"),
    "columns": (partial(bad, x=draw(12, 65)), r"x: expected \[any, 64\], got \[12, 65\]"),
    "x's dtype": (partial(bad, x=torch.zeros(12, 64, dtype=torch.int32)), "x: expected float32"),
    "a gradient": (lambda: bad(weight=frozen_not(packed(3, 10, 64))), "expected four-bit weights without gradients"),
    "bias": (partial(bad, bias=torch.zeros(4, 10)), r"bias: expected \[3, 10\], got \[4, 10\]"),
    "odd N": (lambda: bad(weight=packed(3, 9, 64), activation="swiglu"), "an even N for a gated activation"),
    "activation": (partial(bad, activation="tanh"), "activation: expected one of None, 'swiglu'.*got 'tanh'"),
    "offset's dtype": (partial(bad, offset=torch.tensor([0, 5, 6, 12])), r"offset: expected int32 \[4\], got int64"),
    "offset descends": (partial(bad, offset=torch.tensor([0, 5, 3, 12]).int()), "ascend from 0"),
    "offset too large": (partial(bad, offset=torch.tensor([0, 5, 6, 13]).int()), "at most the rows, 12"),
    "order": (partial(bad, order=torch.arange(1, 13).int()), r"order: expected slots in \[0, 12\), got 12"),
    "top_k": (partial(bad, order=torch.arange(12).int(), top_k=0), "top_k: expected at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=r"\[grouped_gemm\] .*" + message):
        fastpost.grouped_gemm(**make())


def test_a_mixture_that_does_not_fit_is_named(device):
    x, gate, plan, up, _ = mixture_inputs(moe_dispatch.Case("x", 9, 2, 3, 64), torch.float32, device)
    with pytest.raises(ValueError, match=r"\[experts\] expected x \[T, H\], up .*240, 64\] and \[192, 39\]"):
        mixture(x, gate, plan, up, packed(3, 64, 39, device=device))
    with pytest.raises(ValueError, match=r"\[experts\] down: expected as many rows for each of 3 experts"):
        mixture(x, gate, plan, up, packed(1, 64, 40, device=device))
