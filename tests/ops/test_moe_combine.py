# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import fastpost
from compare import FLOATS, error
from drawn import draw
from fastpost import _core
from fastpost.reference import moe_combine as reference

CASES = reference.cases()
F64, NAN = torch.float64, torch.nan
SMALL = reference.Case("small", 5, 3, 4, 6, absent=0.3)
ROUNDING = {torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def inputs(case, dtype=torch.float32, device="cpu"):
    """(y, plan, gate)."""
    y = draw(case.t * case.k, case.h, seed=1).to(device, dtype)
    gate = torch.rand(case.t, case.k, generator=torch.Generator().manual_seed(2)).to(device)
    return y, case.plan(device), gate.double() if dtype == F64 else gate


def run(f, y, plan, gate, reduce, convert=torch.clone):
    """out and the gradients of y and gate, for the same incoming gradient in y's dtype."""
    leaves = [None if t is None else convert(t).detach().requires_grad_() for t in (y, gate)]
    out = f(leaves[0], plan, leaves[1], reduce=reduce)
    out.backward(draw(*out.shape, seed=9).to(y.device, y.dtype).to(out.dtype))
    return out.detach(), leaves[0].grad, None if gate is None else leaves[1].grad


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, gated, reduce, device):
    y, plan, gate = inputs(case, dtype, device)
    gate = gate if gated else None
    ours = run(fastpost.moe_combine, y, plan, gate, reduce)
    plain = run(reference.moe_combine, y, plan, gate, reduce)
    truth = run(reference.moe_combine, y, plan, gate, reduce, torch.Tensor.double)
    for a, b, t in zip(ours[:2], plain, truth):
        assert a.dtype == dtype and a.shape == t.shape
        assert error(a.flatten(1), t.flatten(1)) < max(ROUNDING[dtype], 1.05 * error(b.flatten(1), t.flatten(1)))
    if gated:  # dot products in float32, whatever the dtype
        assert ours[2].dtype == torch.float32 and error(ours[2], truth[2]) < 1e-5


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float64_is_exact_on_cpu(case, reduce):
    for gated in (True, False):
        y, plan, gate = inputs(case, F64)
        gate = gate if gated else None
        ours, truth = (run(f, y, plan, gate, reduce) for f in (fastpost.moe_combine, reference.moe_combine))
        for a, b in zip(ours[: 2 + gated], truth):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sum_is_rounded_once(scale, dtype, device):
    case = reference.Case("", 40, 8, 16, 65)
    y, plan, gate = inputs(case, dtype, device)
    y = (y.float() * scale).to(dtype)
    out = fastpost.moe_combine(y, plan, gate)
    truth = (y.double()[plan.place.long().flatten()].view(40, 8, 65) * gate.double()[..., None]).sum(1)
    assert error(out, truth) <= 1.05 * error(truth.float().to(dtype), truth) + 5e-7


@pytest.mark.parametrize("h", [1, 2, 7, 8, 9, 31, 63, 64, 65, 200, 1027])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_width_and_alignment(h, dtype, device):
    case = reference.Case("", 9, 2, 4, h, absent=0.2)
    _, plan, gate = inputs(case, dtype, device)
    y = draw(18, h + 3, seed=1).to(device, dtype)[:, 1 : h + 1]  # rows that start anywhere
    for reduce in (True, False):
        ours = run(fastpost.moe_combine, y, plan, gate, reduce, lambda t: t)
        truth = run(reference.moe_combine, y, plan, gate, reduce, torch.Tensor.double)
        for a, t, limit in zip(ours, truth, (ROUNDING[dtype], ROUNDING[dtype], 1e-5)):
            assert error(a.flatten(1), t.flatten(1)) < limit


def test_dispatch_and_combine_undo_each_other(device):
    """Gates that sum to 1 give back the tokens; the gate's gradient is then the same for all slots of a token."""
    x = torch.randn(60, 40, device=device)
    out = fastpost.moe_route(torch.randn(60, 8, device=device), 3)
    gate = out.gate.detach().requires_grad_()
    back = fastpost.moe_combine(fastpost.moe_dispatch(x, out.plan), out.plan, gate)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-6)
    back.sum().backward()
    torch.testing.assert_close(gate.grad, x.sum(1, keepdim=True).expand(60, 3), rtol=1e-4, atol=1e-5)


def test_order_of_tokens_does_not_matter(device):
    logits, x, w = (torch.randn(*s, device=device) for s in ((80, 6), (80, 16), (6, 16)))

    def layer(logits, x):
        out = fastpost.moe_route(logits, 2)
        owner = torch.bucketize(torch.arange(160, device=device), out.plan.offset[1:], right=True)
        return fastpost.moe_combine(fastpost.moe_dispatch(x, out.plan) * w[owner], out.plan, out.gate)

    moved = torch.randperm(80, device=device)
    assert torch.equal(layer(logits, x)[moved], layer(logits[moved].contiguous(), x[moved].contiguous()))


def test_rows_of_nobody_do_not_matter(device):
    """Their y is not read; their gradient is 0."""
    case = reference.Case("", 45, 2, 6, 24, absent=0.4)
    y, plan, gate = inputs(case, device=device)
    present = int(plan.offset[-1])
    y[present:] = NAN
    gate[plan.place < 0] = NAN
    for reduce in (True, False):
        out, grad_y, grad_gate = run(fastpost.moe_combine, y, plan, gate, reduce)
        assert out.isfinite().all() and grad_gate.isfinite().all() and torch.all(grad_gate[plan.place < 0] == 0)
        assert grad_y.isfinite().all() and torch.all(grad_y[present:] == 0) and grad_y[:present].ne(0).all()
    assert torch.all(out[plan.place < 0] == 0)


def test_outputs_are_all_written(device):
    case = reference.Case("", 45, 2, 6, 24, absent=0.4)
    y, plan, gate = inputs(case, device=device)
    for shape in ((45, 24), (45, 2, 24)):
        out, grad_y, grad_gate = (torch.full(s, NAN, device=device) for s in (shape, y.shape, gate.shape))
        _core.moe_combine(y, plan.place, gate, out)
        args = torch.ones(shape, device=device), y, plan.place, plan.offset, plan.order, gate
        _core.moe_combine_backward(*args, grad_y, grad_gate)
        assert all(x.isfinite().all() for x in (out, grad_y, grad_gate))
        alone = torch.full_like(grad_y, NAN), torch.full_like(grad_gate, NAN)
        _core.moe_combine_backward(*args, alone[0], None)
        _core.moe_combine_backward(*args, None, alone[1])
        assert torch.equal(alone[0], grad_y) and torch.equal(alone[1], grad_gate)


def test_same_bits_on_any_number_of_threads():
    y, plan, gate = inputs(reference.Case("", 500, 4, 8, 300), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(fastpost.moe_combine, y, plan, gate, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("reduce", [True, False])
def test_gradcheck(reduce):
    y, plan, gate = inputs(SMALL, F64)
    y.requires_grad_(), gate.requires_grad_()

    def f(y, gate):
        return fastpost.moe_combine(y, plan, gate, reduce=reduce)

    assert torch.autograd.gradcheck(f, (y, gate))
    assert torch.autograd.gradcheck(lambda g: f(y.detach(), g), gate)
    assert torch.autograd.gradcheck(lambda y: f(y, gate.detach()), y)
    assert torch.autograd.gradcheck(lambda y: f(y, None), y)


def test_y_is_kept_only_for_the_gate():
    """Without a gradient of the gate nothing of y's size lives until the backward."""
    y, plan, gate = inputs(SMALL)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        fastpost.moe_combine(y.requires_grad_(), plan, gate)
        assert y.shape not in kept
        fastpost.moe_combine(y, plan, gate.requires_grad_())
        assert y.shape in kept


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_opcheck(gated, reduce, device):
    y, plan, gate = inputs(SMALL, device=device)
    gate = gate.requires_grad_() if gated else None
    torch.library.opcheck(torch.ops.fastpost.moe_combine.default, (y.requires_grad_(), *plan, gate, reduce))


Y, PLAN, GATE = inputs(SMALL)
BAD = {
    "rows": ({"y": torch.zeros(14, 6)}, r"y: expected float32 or .* \[15, any\], got float32 \[14, 6\]"),
    "dtype": ({"y": Y.int()}, r"y: expected float32 or bfloat16 or float16 or float64 \[15, any\], got int32"),
    "layout": ({"y": torch.zeros(6, 15).t()}, r"y: expected a last dimension of stride 1, got strides \(1, 15\)"),
    "list": ({"y": [1.0]}, r"y: expected a plain torch.Tensor, got list"),
    "gate shape": ({"gate": torch.zeros(5, 2)}, r"gate: expected float32 \[5, 3\], got float32 \[5, 2\]"),
    "gate dtype": ({"gate": GATE.bfloat16()}, r"gate: expected float32 \[5, 3\], got bfloat16 \[5, 3\]"),
    "gate float64": ({"gate": GATE.double()}, r"gate: expected float32 \[5, 3\], got float64 \[5, 3\]"),
    "y float64": ({"y": Y.double()}, r"gate: expected float64 \[5, 3\], got float32 \[5, 3\]"),
    "gate strided": ({"gate": torch.zeros(3, 5).t()}, r"gate: expected a contiguous tensor"),
    "device": ({"gate": GATE.to("meta")}, r"gate: expected a tensor on cpu, got one on meta"),
    "place": ({"plan": PLAN._replace(place=PLAN.place.long())}, r"place: expected int32 \[any, any\], got int64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=r"\[moe_combine\] " + message):
        fastpost.moe_combine(**({"y": Y, "plan": PLAN, "gate": GATE} | change))
