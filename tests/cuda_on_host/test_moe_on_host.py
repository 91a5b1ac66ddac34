# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of moe_route, moe_dispatch and moe_combine on the CPU, under fastpost's Python ops and on plans that
no kernel may trust."""

import importlib
import shutil

import on_host
import pytest
import torch

from compare import FLOATS, error
from drawn import draw
from fastpost.reference import moe_combine as combine_reference
from fastpost.reference import moe_dispatch as dispatch_reference
from fastpost.reference import moe_route as route_reference

pytestmark = pytest.mark.skipif(shutil.which(on_host.COMPILER) is None, reason=f"needs {on_host.COMPILER}")
NAN, INF = torch.nan, torch.inf
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


class Moe:
    """The public functions with the CUDA kernels under them."""

    def __init__(self, core, monkeypatch):
        for name in ("moe_route", "moe_dispatch", "moe_combine"):
            module = importlib.import_module(f"fastpost.ops.{name}")
            monkeypatch.setattr(module, "_core", core)
            setattr(self, name, getattr(module, name))
        self.moe_plan = importlib.import_module("fastpost.ops.moe_route").moe_plan


@pytest.fixture
def moe(core, monkeypatch):
    return Moe(core, monkeypatch)


def routed(f, logits, top_k, options, convert=torch.clone):
    x = convert(logits).detach().requires_grad_()
    out = f(x, top_k, **options)
    gate, probability = draw(*out.gate.shape, seed=1), draw(*out.probability.shape, seed=2)
    loss = (out.gate * gate).sum() + 0.7 * out.load_balance - 0.3 * out.z + (out.probability * probability).sum()
    loss.backward()
    return out, x.grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", [c for c in route_reference.cases() if c.t * c.e < 20_000], ids=lambda c: c.name)
def test_route(case, dtype, moe):
    (logits, top_k), options = case.inputs(dtype)
    ours, grad = routed(moe.moe_route, logits, top_k, options)
    truth, true_grad = routed(route_reference.moe_route, logits, top_k, options, torch.Tensor.double)
    _, plain_grad = routed(route_reference.moe_route, logits, top_k, options)
    assert torch.equal(ours.expert, truth.expert) and all(map(torch.equal, ours.plan, truth.plan))
    assert error(ours.gate, truth.gate) < 2e-6
    for name in ("load_balance", "z", "probability"):
        assert error(getattr(ours, name).reshape(-1), getattr(truth, name).reshape(-1)) < 1e-6, name
    assert error(grad, true_grad) < max(ROUNDING[dtype], 1.5 * error(plain_grad, true_grad))


@pytest.mark.parametrize(
    "t,e,k",
    [(1, 1, 1), (65, 7, 7), (63, 9, 2), (40, 33, 5), (70, 129, 3), (9, 512, 64), (5, 1024, 64), (2, 1024, 1)],
)
def test_route_of_any_shape(t, e, k, moe):
    """Experts of one lane and of many."""
    logits = draw(t, e, seed=3)
    ours, grad = routed(moe.moe_route, logits, k, {})
    truth, true_grad = routed(route_reference.moe_route, logits, k, {}, torch.Tensor.double)
    assert torch.equal(ours.expert, truth.expert) and all(map(torch.equal, ours.plan, truth.plan))
    assert error(ours.gate, truth.gate) < 2e-6 and error(ours.probability, truth.probability) < 2e-6
    assert error(grad, true_grad) < 2e-5


def test_ties_and_zeros_of_either_sign(moe):
    logits = torch.randint(0, 4, (200, 20)).float()
    logits[0], logits[1] = 0.0, -INF
    logits[1, 19] = 1.0
    logits[2, 0], logits[2, 1:] = -0.0, 0.0
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :9]
    assert torch.equal(moe.moe_route(logits, 9).expert, expected)


def test_nan_stays_in_its_token(moe):
    """Its gates and all means are NaN; its experts are still numbers in range, none twice, so that the plan holds."""
    logits = draw(70, 12, seed=4)
    logits[3, 5], logits[64, 0], logits[69] = NAN, INF, -INF
    out = moe.moe_route(logits, 3)
    assert out.gate.isnan().all(1).nonzero().flatten().tolist() == [3, 64, 69]
    assert out.gate.isnan().any(1).sum() == 3
    assert all(x.isnan().all() for x in (out.load_balance, out.z, out.probability))
    ids = out.expert.sort(-1).values
    assert ids.min() >= 0 and ids.max() < 12 and ids.diff().gt(0).all()
    assert all(map(torch.equal, out.plan, route_reference.moe_plan(out.expert, 12)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("t,k,e", [(0, 2, 4), (1, 1, 1), (700, 2, 8), (300, 8, 100), (150, 3, 300), (40, 64, 1024),
                                   (40_000, 1, 3)])  # fmt: skip
def test_plan(t, k, e, dtype, moe):
    """The last has more tokens than 512 blocks of 64."""
    expert = torch.randint(0, e + 1, (t, k)).to(dtype)
    expected = route_reference.moe_plan(expert, e)
    assert all(map(torch.equal, moe.moe_plan(expert, e), expected))
    outside = torch.where(expert == e, torch.where(torch.rand(t, k) < 0.5, -7, e + 70000).to(dtype), expert)
    assert all(map(torch.equal, moe.moe_plan(outside, e), expected))  # nobody's, too


def both(f, leaves, convert=torch.clone):
    leaves = [convert(x).detach().requires_grad_() for x in leaves]
    out = f(*leaves)
    out.backward(draw(*out.shape, seed=9).to(leaves[0].dtype))
    return out.detach(), *(x.grad for x in leaves)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", dispatch_reference.cases(), ids=lambda c: c.name)
def test_dispatch_and_combine(case, dtype, moe):
    x, plan = case.inputs(dtype)
    y, gate = draw(case.t * case.k, case.h, seed=1).to(dtype), draw(case.t, case.k, seed=2).abs()
    dispatch = [lambda x, f=f: f(x, plan) for f in (moe.moe_dispatch, dispatch_reference.moe_dispatch)]
    cases = [(*dispatch, [x]), (*dispatch, [y.view(*gate.shape, case.h)])]
    for reduce in (True, False):
        for leaves in ([y, gate], [y]):
            combine = [lambda y, gate=None, f=f, r=reduce: f(y, plan, gate, reduce=r)
                       for f in (moe.moe_combine, combine_reference.moe_combine)]  # fmt: skip
            cases.append((*combine, leaves))
    for f, reference, leaves in cases:
        ours, plain = both(f, leaves), both(reference, leaves)
        truth = both(reference, leaves, torch.Tensor.double)
        for a, b, t in zip(ours, plain, truth, strict=True):
            assert a.dtype == b.dtype and a.shape == t.shape
            assert error(a.flatten(1), t.flatten(1)) < max(2 * ROUNDING[dtype], 1.1 * error(b.flatten(1), t.flatten(1)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("h", [1, 7, 8, 9, 255, 1027])
def test_any_alignment(h, dtype, moe):
    """Rows that start at every offset from a 16-byte boundary, on either side."""
    plan = dispatch_reference.Case("", 9, 2, 4, h, absent=0.2).plan()
    x, y = draw(9, h + 1, seed=1).to(dtype)[:, :h], draw(18, h + 3, seed=2).to(dtype)[:, 1 : h + 1]
    assert torch.equal(moe.moe_dispatch(x, plan), dispatch_reference.moe_dispatch(x, plan))
    gate = draw(9, 2, seed=3)
    out, truth = (f(v, plan, gate) for f, v in ((moe.moe_combine, y), (combine_reference.moe_combine, y.double())))
    assert error(out, truth) < ROUNDING[dtype]


def test_wild_plans_stay_inside(core):
    """Rows and slots out of range count as nobody's: nothing beyond the tensors is read or written."""
    t, k, h = 6, 2, 40
    wild = torch.tensor([5, -1, 12, -(2**31), 2**31 - 1, 3, 0, 99, 7, 11, -7, 2], dtype=torch.int32)
    offset = torch.tensor([0, 4, 10**6], dtype=torch.int32)
    inside = (wild >= 0) & (wild < t * k)
    x = draw(t, h)
    memory = torch.full((t * k + 20, h), NAN)
    out = memory[10 : 10 + t * k]
    core.moe_dispatch(x, offset, wild, wild.view(t, k), out)
    assert torch.equal(out, torch.where(inside[:, None], x[(wild // k).clamp(0, t - 1).long()], 0.0))
    assert memory[:10].isnan().all() and memory[-10:].isnan().all()
    y, gate = draw(t * k, h, seed=1), draw(t, k, seed=2)
    slots = torch.where(inside[:, None], y[wild.clamp(0, t * k - 1).long()], 0.0).view(t, k, h)
    sums = torch.full((t, h), NAN)
    core.moe_combine(y, wild.view(t, k), gate, sums)
    torch.testing.assert_close(sums, (slots * gate[..., None]).sum(1))
    grad_gate = torch.full((t, k), NAN)
    memory.fill_(NAN)
    core.moe_combine_backward(x, y, wild.view(t, k), offset, wild, gate, out, grad_gate)
    torch.testing.assert_close(grad_gate, (slots * x[:, None]).sum(-1))
    assert memory[:10].isnan().all() and memory[-10:].isnan().all()
    logits, grad = draw(t, 4), torch.full((t, 4), NAN)
    core.moe_route_backward(logits, False, True, 1.0, wild.view(t, k).long(), torch.zeros(5, dtype=torch.int32), gate,
                            None, None, None, grad)  # fmt: skip
    assert grad.isfinite().all()


def test_more_than_2_31_elements(moe):
    """Rows 2^30 elements apart in memory that is reserved but never touched in between."""
    stride, h = 1 << 30, 24
    rows = torch.empty(3 * stride + h, dtype=torch.bfloat16).as_strided((4, h), (stride, 1))
    rows.copy_(draw(4, h))
    plan = route_reference.moe_plan(torch.tensor([[1], [0], [1], [0]]), 2)
    assert torch.equal(moe.moe_dispatch(rows, plan), rows[[1, 3, 0, 2]])
    assert torch.equal(moe.moe_combine(rows, plan), rows[[2, 0, 3, 1]])
