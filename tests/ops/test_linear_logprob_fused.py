# SPDX-License-Identifier: Apache-2.0
"""linear_logprob with the GEMM in the core: every edge of its blocks and panels, and results that do not depend on the
batch."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

import fastpost
from compare import FLOATS, error, forward_and_gradients
from fastpost import _core
from fastpost.ops import _fused
from fastpost.reference import linear_logprob as reference


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setattr(_fused, "FORCED", "fused")


def grads_of(op, case, inputs, convert=torch.clone, **options):
    hidden, weight, target, bias = inputs
    return forward_and_gradients(
        lambda h, w, b: op(h, w, target, bias=b, **(case.options | options)), (hidden, weight, bias), convert
    )


# Panels are 64 (or 16) rows, blocks 48 to 192 vocabulary entries, products go in groups of 6; bfloat16 takes pairs.
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "n, d, v", [(1, 1, 1), (1, 8, 193), (63, 33, 191), (64, 2, 192), (65, 70, 49), (131, 65, 1000)]
)
@pytest.mark.parametrize("budget", [None, 1 << 20], ids=["kept", "1 MiB"])
def test_edges_of_panels_and_blocks(n, d, v, dtype, budget):
    for case in (
        reference.Case("plain", n, d, v),
        reference.Case("all", n, d, v, ignored=0.3, bias=True, options={"temperature": 0.7, "softcap": 5.0}),
    ):
        inputs = case.inputs(dtype, "cpu")
        assert _fused.usable(n, inputs[0], inputs[1], None, budget or 1 << 28, False)
        ours, grads = grads_of(fastpost.linear_logprob, case, inputs, memory_budget=budget, return_entropy=True)
        _, plain_grads = grads_of(reference.linear_logprob, case, inputs, return_entropy=True)
        truth, true_grads = grads_of(reference.linear_logprob, case, inputs, torch.Tensor.double, return_entropy=True)
        for a, t in zip(ours, truth):
            assert a.dtype == torch.float32
            assert error(a, t) <= 1e-6, "float32 log-probs whatever the inputs' dtype"
        for a, b, t in zip(grads, plain_grads, true_grads):
            assert error(a, t) <= (1.5 * error(b, t) + 1e-5 if dtype == torch.float32 else 1.1 * error(b, t) + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_exponentials_are_as_good_as_recomputed_logits(dtype):
    """Without entropy and softcap the backward reads e^(z - m) in the dtype of the weight."""
    case = reference.Case("x", 200, 48, 3000, ignored=0.2)
    inputs = case.inputs(dtype, "cpu")
    _, truth = grads_of(reference.linear_logprob, case, inputs, torch.Tensor.double)
    errors = []
    for budget in (1 << 28, 1 << 20):
        _, grads = grads_of(fastpost.linear_logprob, case, inputs, memory_budget=budget)
        errors.append([error(a, t) for a, t in zip(grads, truth)])
    for kept, again in zip(*errors):
        assert kept <= 1.5 * again + 1e-6  # one more rounding


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_does_not_depend_on_the_batch(dtype):
    """log-prob, entropy and hidden gradient bit by bit: alone, among others, elsewhere, with more threads."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(150, 40, generator=g).to(dtype), torch.randn(1000, 40, generator=g).to(dtype)
    target = torch.randint(0, 1000, (150,), generator=g)

    def run(rows, entropy=True, **options):
        h = hidden[rows].clone().requires_grad_()
        out = fastpost.linear_logprob(h, weight, target[rows], return_entropy=entropy, batch_invariant=True, **options)
        out = out if entropy else (out,)
        sum(o.sum() for o in out).backward()
        return *(o.detach() for o in out), h.grad

    every = run(torch.arange(150))
    for rows in (torch.tensor([7]), torch.arange(149, -1, -1), torch.tensor([3, 149, 7, 80])):
        for a, b in zip(run(rows), every):
            assert torch.equal(a, b[rows])
    for a, b in zip(run(torch.arange(150), memory_budget=4 << 20), every):
        assert torch.equal(a, b)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for a, b in zip(run(torch.arange(150)), every):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
    kept = run(torch.arange(150), entropy=False)
    for a, b in zip(run(torch.tensor([3, 149, 7, 80]), entropy=False), kept):
        assert torch.equal(a, b[[3, 149, 7, 80]])


def test_probability_one_keeps_its_gradient():
    """1 - p of a target at p = 1 - 1e-6: exact to 0.5 % where bfloat16 arithmetic has nothing left."""
    weight = torch.zeros(300, 16, dtype=torch.bfloat16)
    weight[7, 0] = 1
    hidden = torch.zeros(3, 16, dtype=torch.bfloat16)
    hidden[:, 0] = torch.tensor([8.0, 14.0, 19.5])
    w = weight.clone().requires_grad_()
    fastpost.linear_logprob(hidden[2:], w, torch.tensor([7])).sum().backward()
    truth = weight.double().requires_grad_()
    reference.linear_logprob(hidden[2:].double(), truth, torch.tensor([7])).sum().backward()
    assert (w.grad[7, 0].double() / truth.grad[7, 0] - 1).abs() < 5e-3


def test_rows_that_drop_out_of_the_backward():
    """The values kept for rows that are still active are picked out; the others are read by nobody, NaN or not."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(100, 24, generator=g), torch.randn(500, 24, generator=g)
    target = torch.randint(0, 500, (100,), generator=g)
    target[::7] = -100
    for active, budget in ((90, None), (20, None), (90, 1 << 20)):
        upstream = (torch.arange(100) < active).float()
        found = []
        for op in (partial(fastpost.linear_logprob, memory_budget=budget), reference.linear_logprob):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            op(h, w, target).backward(upstream)
            found.append((h.grad, w.grad))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[0][0][active:], torch.zeros(100 - active, 24))
        h, w = hidden.clone(), weight.clone().requires_grad_()
        h[active:] = torch.nan
        fastpost.linear_logprob(h, w, target, memory_budget=budget).backward(upstream)
        assert torch.equal(w.grad, found[0][1])


def test_16_megabytes_are_enough():
    """8 · N · V · D with 16 MB beside the gradients, at a size whose logits take 50."""
    hidden, weight = torch.randn(512, 64, dtype=torch.bfloat16), torch.randn(49152, 64, dtype=torch.bfloat16)
    assert _fused.usable(512, hidden, weight, None, 16 << 20, False)
    target = torch.zeros(512, dtype=torch.int64)
    target[:] = torch.arange(512)
    grads = []
    for budget in (16 << 20, 1 << 28):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        fastpost.linear_logprob(h, w, target, memory_budget=budget).sum().backward()
        grads.append((h.grad, w.grad))
    for a, b in zip(*grads):
        assert (a.double() - b.double()).norm() < 2e-3 * b.double().norm()


def test_what_it_cannot_take_is_named():
    hidden, weight, target = torch.randn(4, 8), torch.randn(20, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[linear_logprob\] batch_invariant: weight needs contiguous rows"):
        fastpost.linear_logprob(hidden, weight.T.contiguous().T, target, batch_invariant=True)
    pair = torch.randn(4, 2), torch.randn(20, 2)
    with pytest.raises(ValueError, match="batch_invariant: it has no low_rank"):
        fastpost.linear_logprob(hidden, weight, target, low_rank=pair, batch_invariant=True)
    many = torch.randn(4000, 64)
    with pytest.raises(ValueError, match=r"memory_budget: batch_invariant needs \d+ bytes for 4000 rows, got 1048576"):
        fastpost.linear_logprob(
            many, torch.randn(20, 64), torch.zeros(4000, dtype=torch.int64), batch_invariant=True, memory_budget=1 << 20
        )


def test_a_workspace_too_small_is_refused():
    weight = torch.randn(20, 8)
    none = [None] * 2
    with pytest.raises(ValueError, match=r"\[linear_logprob\] workspace: expected at least \d+ bytes, got 64"):
        _core.linear_logprob_fused(
            torch.randn(4, 8), weight, none[0], torch.zeros(4, dtype=torch.int64), none[1], 1.0, 0.0, False, 0, None,
            None, None, torch.empty(64, dtype=torch.uint8), torch.empty(5, 4),
        )  # fmt: skip


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    """The same edges in a process of its own, where the CPU has this set."""
    env = os.environ | {"FASTPOST_ISA": isa, "FASTPOST_CPU_GEMM": "fused", "OMP_NUM_THREADS": "1"}
    code = "import torch; from fastpost import _core; _core.linear_logprob_fused_preferred(torch.zeros(1, 1))"
    if subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode:
        pytest.skip(f"this CPU has no {isa}")
    names = ("test_edges_of_panels_and_blocks", "test_a_row_does_not_depend_on_the_batch")
    tests = [f"{__file__}::{name}" for name in names]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


# ---- skipping tiles --------------------------------------------------------------------------------------------------


def peaked(n=192, d=32, v=4000, dtype=torch.float32):
    """Rows whose probability sits on few entries, scattered over the vocabulary; entries by falling frequency."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(v, d, generator=g)
    frequent = torch.randperm(v, generator=g)
    target = frequent[(torch.rand(n, generator=g) ** 3 * 300).long()]
    hidden = 0.35 * weight[target] + 0.1 * torch.randn(n, d, generator=g)
    hidden[:, 0], weight[:, 0], weight[frequent[400:], 0] = 1, 0, -12  # the rest is unlikely
    return hidden.to(dtype), weight.to(dtype), target, frequent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 2 << 20], ids=["kept", "recomputed"])
def test_skipped_tiles_cost_no_more_than_their_mass(dtype, budget):
    hidden, weight, target, order = peaked(dtype=dtype)
    truth_h, truth_w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = truth_h @ truth_w.T
    logits.log_softmax(-1).gather(1, target[:, None]).sum().backward()
    for mass in (1e-4, 1e-2):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = fastpost.linear_logprob(h, w, target, skip_mass=mass, vocab_order=order, memory_budget=budget)
        exact = fastpost.linear_logprob(h, w, target, memory_budget=budget)
        assert (out - exact).abs().max() < 1e-5  # the forward leaves nothing out
        out.sum().backward()
        lost = (h.grad.double() - truth_h.grad).norm(dim=1)
        rounding = 0.0 if dtype == torch.float32 else 0.02
        assert (lost <= mass * weight.double().norm(dim=1).max() + rounding * truth_h.grad.norm(dim=1) + 1e-5).all()
        assert (w.grad.double() - truth_w.grad).norm() <= (10 * mass + rounding + 1e-5) * truth_w.grad.norm()


def test_the_certificate_is_kept_and_tiles_are_skipped():
    hidden, weight, target, order = peaked()
    scored = torch.ones(len(target), dtype=torch.bool)
    shares = []
    for vocab_order in (None, order):
        stats, kept = _fused.forward(
            hidden, weight, None, target, None, 1.0, 0.0, False, 1 << 28, True, 1e-3, vocab_order
        )
        logprob, lse = torch.empty(2, len(target))
        _core.linear_logprob_finish(stats, logprob, lse, None)
        account = []
        _fused.backward(hidden, weight, None, target, scored, scored, 1.0, 0.0, logprob, lse, None, kept,
                        torch.ones(len(target)), None, [True, True, False], 1 << 28, None, 1e-3, vocab_order,
                        account)  # fmt: skip
        *dropped, share = account[0].tolist()
        assert max(dropped) <= 1e-3
        shares.append(share)
    assert max(dropped) > 0 and shares[1] < 0.5 * shares[0] and shares[1] < 0.4, shares


def test_order_alone_changes_nothing():
    hidden, weight, target, order = peaked(n=70, v=700)
    bias = torch.randn(700)
    results = []
    for vocab_order in (None, order):
        h, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
        out = fastpost.linear_logprob(h, w, target, bias=b, vocab_order=vocab_order)
        out.sum().backward()
        results.append((out.detach(), h.grad, w.grad, b.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"skip_mass": 1.5}, "skip_mass: expected a probability in"),
        ({"skip_mass": 1e-3, "softcap": 5.0}, "skip_mass: a softcap needs every logit. Leave it at 0"),
        ({"skip_mass": 1e-3, "return_entropy": True}, "skip_mass: the entropy needs every logit"),
        ({"vocab_order": torch.arange(19)}, r"vocab_order: expected int64 \[20\], got int64 \[19\]"),
        ({"skip_mass": 1e-3, "vocab_order": torch.zeros(20, dtype=torch.int64)}, "vocab_order: expected each entry"),
    ],
)
def test_what_cannot_be_skipped_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        fastpost.linear_logprob(torch.randn(4, 8), torch.randn(20, 8), torch.zeros(4, dtype=torch.int64), **options)
