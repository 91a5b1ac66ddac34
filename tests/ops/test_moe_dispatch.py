# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import fastpost
from compare import FLOATS, error
from drawn import draw
from fastpost import _core
from fastpost.reference import moe_dispatch as reference

CASES = reference.cases()
F64, NAN = torch.float64, torch.nan
SMALL = reference.Case("small", 5, 3, 4, 6, absent=0.3)


def gradients(f, x, plan, convert=torch.clone):
    x = convert(x).detach().requires_grad_()
    out = f(x, plan)
    out.backward(draw(*out.shape, seed=9).to(out.device, out.dtype))
    return out.detach(), x.grad


def slots(case, dtype, device="cpu"):
    """x [T, K, H]."""
    return draw(case.t, case.k, case.h, seed=4).to(device, dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, F64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    if dtype == F64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, plan = case.inputs(dtype, device)
    for rows in (x, slots(case, dtype, device)):
        ours, grad = gradients(fastpost.moe_dispatch, rows, plan)
        truth, true_grad = gradients(reference.moe_dispatch, rows, plan, torch.Tensor.double)
        assert ours.dtype == grad.dtype == dtype and torch.equal(ours.double(), truth)  # a copy: to the bit
        if rows.ndim == 3:
            # the incoming gradient comes rounded
            _, expected = gradients(reference.moe_dispatch, rows, plan)
            assert torch.equal(grad, expected)
        else:
            limit = {torch.float32: 5e-7, torch.bfloat16: 6e-3, torch.float16: 1e-3, F64: 1e-15}[dtype]
            assert error(grad, true_grad) < limit


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sum_of_gradients_is_rounded_once(scale, dtype, device):
    case = reference.Case("", 40, 8, 16, 33)
    plan = case.plan(device)
    grad = (scale * draw(320, 33, seed=1)).to(device, dtype)
    x = torch.zeros(40, 33, device=device, dtype=dtype, requires_grad=True)
    (ours,) = torch.autograd.grad(fastpost.moe_dispatch(x, plan), x, grad)
    truth = grad.double()[plan.place.long().flatten()].view(40, 8, 33).sum(1)
    rounded = truth.float().to(dtype)
    assert error(ours, truth) <= 1.05 * error(rounded, truth) + 3e-7


@pytest.mark.parametrize("h", [1, 2, 7, 8, 9, 31, 63, 64, 65, 200, 1027])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_width_and_alignment(h, dtype, device):
    """Rows that start anywhere, in x and in the gradient."""
    case = reference.Case("", 9, 2, 4, h, absent=0.2)
    plan = case.plan(device)
    x = draw(9, h + 3, seed=1).to(device, dtype)[:, 1 : h + 1]
    assert torch.equal(fastpost.moe_dispatch(x, plan), reference.moe_dispatch(x, plan))
    x3 = draw(9, 2, h + 3, seed=2).to(device, dtype)[:, :, 2 : h + 2]
    assert torch.equal(fastpost.moe_dispatch(x3, plan), reference.moe_dispatch(x3, plan))


def test_rows_of_nobody_do_not_matter(device):
    """They are 0, though memory and the tokens that stand for them are NaN, and their gradient is not read."""
    case = reference.Case("", 45, 2, 6, 24, absent=0.4)
    x, plan = case.inputs(device=device)
    present = int(plan.offset[-1])
    out = torch.full((90, 24), NAN, device=device)
    x = slots(case, torch.float32, device)
    x[plan.place < 0] = NAN
    _core.moe_dispatch(x, plan.offset, plan.order, plan.place, out)
    assert out.isfinite().all() and torch.all(out[present:] == 0) and 0 < present < 90
    grad = torch.randn(90, 24, device=device)
    grad[present:] = NAN
    for shape in ((45, 24), (45, 2, 24)):
        into = torch.full(shape, NAN, device=device)
        _core.moe_dispatch_backward(grad, plan.place, into)
        assert into.isfinite().all()
    assert torch.all(into[plan.place < 0] == 0)


def test_same_bits_on_any_number_of_threads():
    case = reference.Case("", 500, 4, 8, 300)
    x, plan = case.inputs(torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(fastpost.moe_dispatch, x, plan))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_gradcheck():
    x, plan = SMALL.inputs(F64)
    assert torch.autograd.gradcheck(lambda x: fastpost.moe_dispatch(x, plan), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: fastpost.moe_dispatch(x, plan), slots(SMALL, F64).requires_grad_())


@pytest.mark.parametrize("of_slots", [False, True])
def test_opcheck(of_slots, device):
    x, plan = SMALL.inputs(device=device)
    x = slots(SMALL, torch.float32, device) if of_slots else x
    torch.library.opcheck(torch.ops.fastpost.moe_dispatch.default, (x.requires_grad_(), *plan))


X, PLAN = SMALL.inputs()
BAD = {
    "tokens": ({"x": torch.zeros(6, 6)}, r"x: expected float32 or .* \[5, any\], got float32 \[6, 6\]"),
    "slots": ({"x": torch.zeros(15, 6)}, r"x: expected .* \[5, any\], got float32 \[15, 6\]"),
    "K": ({"x": torch.zeros(5, 2, 6)}, r"x: expected .* \[5, 3, any\], got float32 \[5, 2, 6\]"),
    "dtype": ({"x": X.int()}, r"x: expected float32 or bfloat16 or float16 or float64 \[5, any\], got int32"),
    "layout": ({"x": torch.zeros(6, 5).t()}, r"x: expected a last dimension of stride 1, got strides \(1, 5\)"),
    "ndim": ({"x": torch.zeros(5)}, r"x: expected .* \[5, any\], got float32 \[5\]"),
    "list": ({"x": [1.0]}, r"x: expected a plain torch.Tensor, got list"),
    "device": ({"x": X.to("meta")}, r"offset: expected a tensor on meta, got one on cpu"),
    "order": ({"plan": PLAN._replace(order=PLAN.order[:9])}, r"order: expected int32 \[15\], got int32 \[9\]"),
    "place dtype": ({"plan": PLAN._replace(place=PLAN.place.long())}, r"place: expected int32 \[any, any\], got int64"),
    "wild": ({"plan": PLAN._replace(order=PLAN.order + 9)}, r"order: expected slots in \[0, 15\), got"),
    "offset": ({"plan": PLAN._replace(offset=PLAN.offset + 99)}, r"offset: expected at most 15 rows \(the slots\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=r"\[moe_dispatch\] " + message):
        fastpost.moe_dispatch(**({"x": X, "plan": PLAN} | change))
