# SPDX-License-Identifier: Apache-2.0
"""A head without a gradient of its own: logprob's derivative to `hidden` is made in the forward, and any loss after it
costs no third pass."""

import pytest
import torch

import fastpost
from fastpost.ops import _fused, _passes
from fastpost.ops.linear_logprob import _forward_op

N, V, D = 700, 3_000, 24
BUDGET = 4 << 20  # float32 logits of one row take 12 kB, of all rows 8.4 MB


@pytest.fixture(autouse=True, params=["fused", "torch"])
def gemms(request, monkeypatch):
    monkeypatch.setattr(_fused, "FORCED", request.param)


def batch(dtype=torch.float32, n=N, d=D):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, d, generator=g).to(dtype)
    target = torch.randint(0, V, (n,), generator=g)
    target[torch.rand(n, generator=g) < 0.3] = -100
    upstream = torch.randn(n, generator=g)
    upstream[torch.rand(n, generator=g) < 0.3] = 0
    return hidden, weight, target, upstream


def budget(dtype):
    return BUDGET // 2 if dtype == torch.bfloat16 else BUDGET


def exact(hidden, weight, target, upstream, **options):
    h = hidden.detach().double().requires_grad_()
    out = fastpost.reference.linear_logprob.linear_logprob(h, weight.double(), target, **options)
    return out, torch.autograd.grad(out, h, upstream.double())[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient(dtype, bias):
    hidden, weight, target, upstream = batch(dtype)
    options = {"bias": torch.randn(V, generator=torch.Generator().manual_seed(1)).to(dtype)} if bias else {}
    out, schedule = fastpost.linear_logprob(
        hidden, weight, target, memory_budget=budget(dtype), return_schedule=True, temperature=0.7, **options
    )
    assert (schedule.name, schedule.operations) == ("one pass", 4.0)
    (grad,) = torch.autograd.grad(out, hidden, upstream)
    options = {k: t.double() for k, t in options.items()}
    expected, expected_grad = exact(hidden, weight, target, upstream, temperature=0.7, **options)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.15)
    assert (grad.double() - expected_grad).norm() <= tolerance * expected_grad.norm()
    nothing = (target == -100) | (upstream == 0)
    assert not grad[nothing].any() and grad[~nothing].any(1).all()


def test_no_worse_than_eager_in_bfloat16():
    hidden, weight, target, upstream = batch(torch.bfloat16, n=512, d=64)
    _, expected = exact(hidden, weight, target, upstream)

    def error(out):
        (grad,) = torch.autograd.grad(out, hidden, upstream)
        return float((grad.double() - expected).norm() / expected.norm())

    *ours, schedule = fastpost.linear_logprob(hidden, weight, target, memory_budget=1 << 20, return_schedule=True)
    assert schedule.name == "one pass"
    logits = torch.nn.functional.linear(hidden, weight).float()
    eager = torch.log_softmax(logits, -1).gather(-1, target.clamp(min=0)[:, None])[:, 0].masked_fill(target < 0, 0)
    assert error(ours[0]) <= 1.05 * error(eager)


def test_only_hidden_and_nothing_else():
    """With a trained weight or bias, an entropy or batch_invariant the other ways are taken; values are the same."""
    hidden, weight, target, _ = batch()
    told = {}
    for name, options in {
        "frozen": {}, "weight": {"weight": weight.clone().requires_grad_()},
        "bias": {"bias": torch.zeros(V, requires_grad=True)}, "entropy": {"return_entropy": True},
    }.items():  # fmt: skip
        arguments = {"hidden": hidden, "weight": weight, "target": target} | options
        *out, told[name] = fastpost.linear_logprob(**arguments, memory_budget=BUDGET, return_schedule=True)
        torch.testing.assert_close(out[0], fastpost.linear_logprob(hidden, weight, target), rtol=1e-5, atol=1e-5)
    assert told.pop("frozen").name == "one pass" and "one pass" not in [s.name for s in told.values()]
    with torch.no_grad():
        *_, schedule = fastpost.linear_logprob(hidden, weight, target, memory_budget=BUDGET, return_schedule=True)
    assert schedule.name == "forward"


def test_preference_loss_and_policy_loss_pay_two_gemms():
    hidden, weight, target, _ = batch()
    cu = torch.tensor([0, 200, 420, 500, N], dtype=torch.int32)

    def loss(logprob_sum, length):  # any Python function
        return (logprob_sum[0::2] - logprob_sum[1::2]).tanh()

    out, schedule = fastpost.preference_loss(
        hidden, weight, target, cu, loss, memory_budget=BUDGET, return_schedule=True
    )
    assert schedule.operations == 4.0
    (grad,) = torch.autograd.grad(out.loss, hidden)
    plain = fastpost.preference_loss(hidden, weight, target, cu, loss)
    (expected,) = torch.autograd.grad(plain.loss, hidden)
    assert (grad - expected).norm() <= 1e-5 * expected.norm()


def test_the_budget_holds():
    """What is kept, and every piece, stays within it; a budget too small for a piece is not tried."""
    hidden, weight, _, _ = batch(n=600, d=32)
    piece = _passes.direction_piece(600, hidden, weight, None, BUDGET, 0.0)
    assert 64 <= piece < 600 and _passes.kept_rows(piece, hidden, weight, None, BUDGET - hidden.nbytes) == piece
    assert _passes.direction_piece(600, hidden, weight, None, hidden.nbytes + 4 * V * 32, 0.0) == 0
    assert _passes.direction_piece(600, hidden, weight, None, 256 << 20, 0.0) == 0  # everything is kept instead


def test_second_derivatives():
    hidden, weight, target, upstream = batch()

    def of(**options):
        out = fastpost.linear_logprob(hidden, weight, target, **options)
        (grad,) = torch.autograd.grad((out * upstream).sum(), hidden, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), hidden)[0]

    expected = of()
    assert (of(memory_budget=BUDGET) - expected).norm() <= 1e-4 * expected.norm()


def test_opcheck_and_compile():
    hidden, weight, target, upstream = batch()
    arguments = (hidden, weight, target, None, None, None, 1.0, 0.0, -100, False, BUDGET, True, False, 0.0, None, True)
    torch.library.opcheck(_forward_op, arguments)

    def loss(h):
        return (fastpost.linear_logprob(h, weight, target, memory_budget=BUDGET) * upstream).sum()

    expected = torch.autograd.grad(loss(hidden), hidden)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(hidden), hidden)[0], expected)
