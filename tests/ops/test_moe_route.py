# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

import fastpost
from compare import FLOATS, error
from fastpost import _core
from fastpost.reference import moe_route as reference

CASES = reference.cases()
F64, INF, NAN = torch.float64, torch.inf, torch.nan


def drawn_loss(out, seed=3):
    """A sum that pulls unevenly at everything that is differentiable."""
    g = torch.Generator().manual_seed(seed)
    gate, probability = (torch.randn(x.shape, generator=g).to(x.device) for x in (out.gate, out.probability))
    return (out.gate * gate).sum() + 0.7 * out.load_balance - 0.3 * out.z + (out.probability * probability).sum()


def routed(f, logits, top_k, options, convert=torch.clone):
    x = convert(logits).detach().requires_grad_()
    out = f(x, top_k, **options)
    drawn_loss(out).backward()
    return out, x.grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    (logits, top_k), options = case.inputs(dtype, device)
    ours, grad = routed(fastpost.moe_route, logits, top_k, options)
    plain, plain_grad = routed(reference.moe_route, logits, top_k, options)
    truth, true_grad = routed(reference.moe_route, logits, top_k, options, torch.Tensor.double)
    assert torch.equal(ours.expert, truth.expert) and ours.expert.dtype == torch.int64
    for a, b in zip(ours.plan, truth.plan, strict=True):
        assert torch.equal(a, b) and a.dtype == torch.int32
    for name in ("gate", "load_balance", "z", "probability"):
        a, b, t = (getattr(x, name) for x in (ours, plain, truth))
        assert a.dtype == torch.float32 and a.shape == t.shape
        a, b, t = (x if x.ndim > 1 else x.reshape(-1) for x in (a, b, t))
        assert error(a, t) < 1.5 * error(b, t) + 1e-6, name
    assert grad.dtype == dtype and grad.isfinite().all()
    # The gradient is rounded once to its dtype.
    assert error(grad, true_grad) < max({torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype],
                                        1.5 * error(plain_grad, true_grad))  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float64_is_exact_on_cpu(case):
    (logits, top_k), options = case.inputs(F64)
    ours, grad = routed(fastpost.moe_route, logits, top_k, options)
    truth, true_grad = routed(reference.moe_route, logits, top_k, options)
    assert torch.equal(ours.expert, truth.expert)
    for a, b in zip((*ours[1:2], *ours[3:], grad), (*truth[1:2], *truth[3:], true_grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("scoring", reference.SCORINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_scales(scale, scoring, normalize, device):
    logits = scale * torch.randn(50, 12, generator=torch.Generator().manual_seed(5)).to(device)
    options = {"scoring": scoring, "normalize": normalize}
    ours, grad = routed(fastpost.moe_route, logits, 3, options)
    truth, true_grad = routed(reference.moe_route, logits, 3, options, torch.Tensor.double)
    for name in ("gate", "load_balance", "z", "probability"):
        a, t = (getattr(x, name) for x in (ours, truth))
        assert error(a.reshape(-1, a.shape[-1] if a.ndim else 1), t.reshape(-1, t.shape[-1] if t.ndim else 1)) < 1e-6
    assert error(grad, true_grad) < 3e-6


# ---- numbers by hand ----


def test_closed_forms(device):
    """Tokens that are all alike: logits (2, 1, 0, -1), two experts each."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], device=device).expand(10, 4).contiguous()
    out = fastpost.moe_route(logits, 2)
    assert out.expert.tolist() == [[0, 1]] * 10
    assert out.gate[0].tolist() == pytest.approx([0.731059, 0.268941], abs=1e-6)
    assert float(out.load_balance) == pytest.approx(1.761594, abs=1e-6)
    assert float(out.z) == pytest.approx(5.954526, abs=1e-6)
    assert out.plan.offset.tolist() == [0, 10, 20, 20, 20]
    p = [math.exp(x - 2.440190) for x in (2, 1, 0, -1)]
    assert out.probability.tolist() == pytest.approx(p, abs=1e-6)
    first = fastpost.moe_route(logits, 2, normalize=False, scale=3.0)
    assert first.gate[0].tolist() == pytest.approx([3 * p[0], 3 * p[1]], abs=3e-6)
    sigmoid = fastpost.moe_route(logits, 2, scoring="sigmoid", normalize=False)
    assert sigmoid.gate[0].tolist() == pytest.approx([0.880797, 0.731059], abs=1e-6)
    corrected = fastpost.moe_route(
        logits, 2, scoring="sigmoid", correction=torch.tensor([-5.0, 0, 0, 1], device=device)
    )
    assert corrected.expert[0].tolist() == [3, 1]  # gates know nothing of the correction
    assert corrected.gate[0].tolist() == pytest.approx([0.268941, 0.731059], abs=1e-6)


def test_perfect_balance_is_one(device):
    """Each expert is the first choice of as many tokens."""
    out = fastpost.moe_route((torch.eye(4).repeat(6, 1) * 3).to(device), 1)
    assert float(out.load_balance) == pytest.approx(1.0, abs=1e-6)
    assert out.plan.offset.tolist() == [0, 6, 12, 18, 24]
    assert float(fastpost.moe_route(torch.zeros(8, 4, device=device), 4).load_balance) == pytest.approx(1.0)


def test_all_experts_are_a_dense_mixture(device):
    logits = torch.randn(20, 6, device=device)
    out = fastpost.moe_route(logits, 6)
    torch.testing.assert_close(out.gate, logits.softmax(-1).gather(1, out.expert))
    assert torch.equal(out.expert.sort(-1).values, torch.arange(6, device=device).expand(20, 6))


@pytest.mark.parametrize("size", [1000.0, -1000.0])
@pytest.mark.parametrize("scoring", reference.SCORINGS)
def test_large_logits_do_not_overflow(size, scoring, device):
    """exp(1000) is infinite; logsumexp(1000, 1000, 1000, 1000) is 1000 + ln 4."""
    logits = torch.full((5, 4), size, device=device, requires_grad=True)
    out = fastpost.moe_route(logits, 2, scoring=scoring)
    assert out.z.item() == pytest.approx((size + math.log(4)) ** 2, rel=1e-6)
    assert out.gate.tolist() == [[0.5, 0.5]] * 5 and out.probability.tolist() == [0.25] * 4
    (grad,) = torch.autograd.grad(out.z + out.gate.sum(), logits)
    assert grad.flatten().tolist() == pytest.approx([2 * (size + math.log(4)) / 20] * 20, rel=1e-5)


# ---- the choice ----


@pytest.mark.parametrize("top_k", [1, 2, 5, 8, 9, 20])
@pytest.mark.parametrize("e", [20, 130])
def test_ties_go_to_the_lower_number(top_k, e, device):
    logits = torch.randint(0, 4, (200, e), generator=torch.Generator().manual_seed(1)).float()
    logits[0], logits[1] = 0.0, -INF
    logits[1, e - 1] = 1.0
    logits[2, 0], logits[2, 1:] = -0.0, 0.0  # equal, too
    out = fastpost.moe_route(logits.to(device), top_k)
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    expected[2] = torch.arange(top_k)
    assert torch.equal(out.expert.cpu(), expected)


@pytest.mark.parametrize("e,top_k", [(1, 1), (7, 7), (8, 8), (33, 3), (129, 10), (512, 64), (1024, 64), (1024, 1)])
def test_limits_of_experts_and_slots(e, top_k, device):
    (logits, _), _ = reference.Case("", 40, e, top_k).inputs(device=device)
    ours, grad = routed(fastpost.moe_route, logits, top_k, {})
    truth, true_grad = routed(reference.moe_route, logits, top_k, {}, torch.Tensor.double)
    assert torch.equal(ours.expert, truth.expert) and all(map(torch.equal, ours.plan, truth.plan))
    assert error(ours.gate, truth.gate) < 2e-6 and error(grad, true_grad) < 5e-6


@pytest.mark.parametrize("scoring", reference.SCORINGS)
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_masked_experts(scoring, correction, normalize, device):
    """The same as if they were not there; chosen only where nobody else is left, and then with gate 0."""
    x = torch.randn(30, 5, device=device)
    masked = torch.full((30, 9), -INF, device=device)
    kept = torch.tensor([1, 2, 4, 7, 8], device=device)
    masked[:, kept] = x
    c = torch.rand(9, device=device) * 100 if correction else None
    options = {"scoring": scoring, "normalize": normalize}
    ours, grad = routed(fastpost.moe_route, masked, 3, options | {"correction": c})
    without, _ = routed(fastpost.moe_route, x, 3, options | {"correction": c[kept] if correction else None})
    assert torch.equal(ours.expert, kept[without.expert])
    torch.testing.assert_close(ours.gate, without.gate)
    torch.testing.assert_close(ours.z, without.z)
    assert torch.equal(ours.probability == 0, torch.isinf(masked[0]))
    assert grad.isfinite().all() and torch.all(grad[torch.isinf(masked)] == 0)
    more, grad = routed(fastpost.moe_route, masked, 7, options | {"correction": c})
    assert more.gate[:, :5].gt(0).all() and torch.all(more.gate[:, 5:] == 0)
    if not correction:
        assert more.expert[:, 5:].tolist() == [[0, 3]] * 30
    assert grad.isfinite().all() and all(x.isfinite().all() for x in (more.load_balance, more.z))


def test_correction_decides_and_has_no_gradient(device):
    logits = torch.randn(40, 6, device=device, requires_grad=True)
    correction = torch.tensor([0.0, 0, 9, 0, 0, 9], device=device, requires_grad=True)
    out = fastpost.moe_route(logits, 2, scoring="sigmoid", correction=correction)
    assert torch.equal(out.expert.sort(-1).values, torch.tensor([2, 5], device=device).expand(40, 2))
    out.gate[:, 0].sum().backward()
    assert (
        correction.grad is None and logits.grad[:, [2, 5]].ne(0).all() and torch.all(logits.grad[:, [0, 1, 3, 4]] == 0)
    )


# ---- the plan ----


def check_plan(plan, expert, experts):
    """What grouped order means, said without a sort."""
    flat, (t, k) = expert.flatten().cpu().long(), expert.shape
    offset, order, place = (x.cpu().long() for x in plan)
    assert torch.equal(order.sort().values, torch.arange(t * k))  # a permutation
    counts = torch.bincount(flat, minlength=experts + 1)
    assert torch.equal(offset.diff(), counts[:experts]) and offset[0] == 0
    present = int(offset[-1])
    assert torch.all(flat[order[present:]] == experts)
    for e in range(experts):
        rows = order[offset[e] : offset[e + 1]]
        assert torch.all(flat[rows] == e) and torch.all(rows.diff() > 0)  # by slot within an expert
    assert torch.all(order[present:].diff() > 0)
    assert torch.equal(place.flatten()[order[:present]], torch.arange(present))  # the inverse
    assert torch.all(place.flatten()[order[present:]] == -1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("absent", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t,k,e", [(0, 2, 4), (1, 1, 1), (700, 2, 8), (300, 8, 100), (2000, 3, 300), (40, 64, 1024)])
def test_plan(t, k, e, absent, dtype, device):
    g = torch.Generator().manual_seed(t + e)
    expert = torch.randint(0, e, (t, k), generator=g)
    expert[torch.rand(t, k, generator=g) < absent] = e
    expert = expert.to(device, dtype)
    plan = fastpost.moe_plan(expert, e)
    assert all(x.dtype == torch.int32 and x.device == expert.device for x in plan)
    check_plan(plan, expert, e)
    assert all(map(torch.equal, plan, reference.moe_plan(expert, e)))


def test_plan_of_a_routing(device):
    out = fastpost.moe_route(torch.randn(999, 16, device=device), 4)
    check_plan(out.plan, out.expert, 16)
    assert all(map(torch.equal, out.plan, fastpost.moe_plan(out.expert, 16)))


def test_order_of_tokens_does_not_matter(device):
    logits = torch.randn(600, 8, device=device)
    moved = torch.randperm(600, device=device)
    a, b = fastpost.moe_route(logits, 2), fastpost.moe_route(logits[moved].contiguous(), 2)
    assert torch.equal(a.expert[moved], b.expert) and torch.equal(a.gate[moved], b.gate)
    assert torch.equal(a.plan.offset, b.plan.offset)
    for name in ("load_balance", "z", "probability"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", [c for c in CASES if c.t > 60], ids=lambda c: c.name)
def test_same_bits_every_time_on_any_number_of_threads(case):
    (logits, top_k), options = case.inputs()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out, grad = routed(fastpost.moe_route, logits, top_k, options)
            results.append((out.expert, out.gate, *out.plan, *out[3:], grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_rows_may_lie_apart(device):
    wide = torch.randn(70, 30, device=device)
    a, ga = routed(fastpost.moe_route, wide[:, 5:13], 2, {}, lambda x: x)
    b, gb = routed(fastpost.moe_route, wide[:, 5:13].contiguous(), 2, {})
    assert torch.equal(a.gate, b.gate) and torch.equal(ga, gb) and all(map(torch.equal, a.plan, b.plan))


def test_outputs_are_all_written(device):
    (logits, k), _ = reference.Case("", 70, 12, 3).inputs(device=device)
    ints = [torch.full(s, -77, device=device, dtype=torch.int32) for s in ((13,), (210,), (70, 3))]
    expert = torch.full((70, 3), -77, device=device)
    gate, probability, losses = (torch.full(s, NAN, device=device) for s in ((70, 3), (12,), (2,)))
    workspace = torch.full((_core.moe_route_bytes(expert, 12, 1),), 0xFF, dtype=torch.uint8, device=device)
    _core.moe_route(logits, k, False, True, 1.0, None, workspace, expert, gate, *ints, probability, losses)
    check_plan(ints, expert, 12)
    assert all(x.isfinite().all() for x in (gate, probability, losses))
    for grads in ((gate, losses, probability), (gate, None, None), (None, losses, None), (None, None, probability)):
        grad = torch.full_like(logits, NAN)
        _core.moe_route_backward(logits, False, True, 1.0, expert, ints[0], *grads, workspace, grad)
        assert grad.isfinite().all() and grad.ne(0).any()


# ---- gradients ----


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scoring", reference.SCORINGS)
def test_gradcheck(scoring, normalize):
    logits = torch.randn(7, 5, dtype=F64, requires_grad=True)

    def f(x, *names):
        out = fastpost.moe_route(x, 2, scoring=scoring, normalize=normalize, scale=1.7)
        return tuple(getattr(out, name) for name in names)

    for names in (("gate",), ("load_balance",), ("z",), ("probability",), ("gate", "load_balance", "z", "probability")):
        assert torch.autograd.gradcheck(lambda x, names=names: f(x, *names), logits)


def test_each_output_has_its_own_gradient(device):
    """What nobody used is no zero tensor but nothing, and sums of parts are the whole."""
    logits = torch.randn(50, 8, device=device, requires_grad=True)
    grads = []
    for pick in (lambda o: o.gate.square().sum(), lambda o: o.load_balance, lambda o: o.z,
                 lambda o: o.probability.square().sum()):  # fmt: skip
        grads.append(torch.autograd.grad(pick(fastpost.moe_route(logits, 2)), logits)[0])
        assert grads[-1].ne(0).any()
    out = fastpost.moe_route(logits, 2)
    loss = out.gate.square().sum() + out.load_balance + out.z + out.probability.square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], sum(grads), rtol=1e-5, atol=1e-7)


# ---- torch ----


@pytest.mark.parametrize("scoring,correction", [("softmax", False), ("sigmoid", True)])
def test_opcheck(scoring, correction, device):
    logits = torch.randn(9, 6, device=device, requires_grad=True)
    c = torch.rand(6, device=device) if correction else None
    torch.library.opcheck(torch.ops.fastpost.moe_route.default, (logits, 2, scoring == "sigmoid", True, 1.0, c))
    torch.library.opcheck(torch.ops.fastpost.moe_plan.default, (torch.zeros(5, 2, dtype=torch.int64, device=device), 3))


# ---- bad input ----

X = torch.zeros(6, 4)
ROUTE = {
    "top_k 0": ({"top_k": 0}, r"\[moe_route\] .*top_k"),
    "top_k 5": ({"top_k": 5}, r"\[moe_route\] top_k: expected 1 to 4 \(the number of experts\), got 5"),
    "ndim": ({"logits": X[0]}, r"\[moe_route\] logits: expected \[T, E\].*, got \[4\]"),
    "dtype": ({"logits": X.int()}, r"\[moe_route\] logits: expected float32 or bfloat16 .*, got int32 \[6, 4\]"),
    "layout": ({"logits": torch.zeros(4, 6).t()}, r"\[moe_route\] logits: expected a last dimension of stride 1"),
    "many": ({"logits": torch.zeros(2, 1025)}, r"\[moe_route\] logits: expected 1 to 1024 experts, got float32"),
    "none": ({"logits": torch.zeros(2, 0)}, r"\[moe_route\] logits: expected \[T, E\] .*, got \[2, 0\]"),
    "scoring": ({"scoring": "relu"}, r"\[moe_route\] scoring: expected \"softmax\" or \"sigmoid\", got 'relu'"),
    "list": ({"logits": [[0.0]]}, r"\[moe_route\] logits: expected a plain torch.Tensor, got list"),
    "correction": ({"correction": torch.zeros(3)}, r"correction: expected float32 \[4\], got float32 \[3\]"),
    "correction dtype": ({"correction": torch.zeros(4).double()}, r"correction: expected float32 \[4\], got float64"),
    "correction nan": ({"correction": torch.tensor([0, NAN, 0, 0])}, r"correction: expected numbers, got nan at 1"),
    "device": ({"correction": torch.zeros(4, device="meta")}, r"correction: expected a tensor on cpu, got one on meta"),
}


@pytest.mark.parametrize("name", ROUTE)
def test_bad_input_is_named(name):
    change, message = ROUTE[name]
    with pytest.raises(ValueError, match=message):
        fastpost.moe_route(**({"logits": X, "top_k": 2} | change))


@pytest.mark.parametrize("row", [0, 5, 300, 699])
@pytest.mark.parametrize("value", [NAN, INF])
def test_bad_row_is_named(value, row):
    logits = torch.randn(700, 8)
    logits[row, 3] = value
    logits[650:, :] = torch.where(torch.rand(50, 1) < 0.5, NAN, logits[650:]) if row < 650 else logits[650:]
    with pytest.raises(ValueError, match=rf"\[moe_route\] logits: expected finite numbers, or -inf .* row {row}\."):
        fastpost.moe_route(logits, 2, scoring="sigmoid")
    logits = torch.randn(700, 8)
    logits[row] = -INF
    with pytest.raises(ValueError, match=rf"nothing but -inf in row {row}\."):
        fastpost.moe_route(logits, 2)


PLAN = {
    "too large": ((torch.tensor([[0, 1], [5, 2]]), 4), r"numbers in \[0, 4\], where 4 is nobody, got 5 at \[1, 0\]"),
    "negative": ((torch.tensor([[0, -1]]).int(), 4), r"expected numbers in \[0, 4\].*, got -1 at \[0, 1\]"),
    "dtype": ((torch.zeros(2, 2), 4), r"expert: expected int64 or int32 \[any, any\], got float32 \[2, 2\]"),
    "ndim": ((torch.zeros(2).long(), 4), r"\[moe_plan\] expert: expected \[T, K\]"),
    "experts": ((torch.zeros(2, 2).long(), 0), r"\[moe_plan\] .*experts from 1 on"),
    "many": ((torch.zeros(2, 2).long(), 1025), r"experts: expected 1 to 1024, got 1025"),
    "strided": ((torch.zeros(2, 4).long()[:, ::2], 4), r"expert: expected a contiguous tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAN)
def test_bad_plan_is_named(name):
    args, message = PLAN[name]
    with pytest.raises(ValueError, match=message):
        fastpost.moe_plan(*args)
