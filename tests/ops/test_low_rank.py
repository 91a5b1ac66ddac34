# SPDX-License-Identifier: Apache-2.0
"""low_rank=(a, b) of linear_logprob and preference_loss: z = hidden · weightᵀ + a · bᵀ, tile by tile."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpost
from compare import FLOATS, error, forward_and_gradients
from fastpost.ops._tiles import plan
from fastpost.ops.linear_logprob import _forward_op
from fastpost.reference import linear_logprob as reference

MIB = 1 << 20
EVERYTHING = {"temperature": 1.3, "softcap": 20.0, "return_entropy": True}
CASES = [  # with the rank; small budgets reach each of the three sweeps
    (reference.Case("empty", 0, 8, 17), 2),
    (reference.Case("odd", 13, 31, 1003), 5),
    (reference.Case("everything", 40, 24, 2001, scale=5, bias=True, ignored=0.3, options=EVERYTHING), 4),
    (reference.Case("cols", 1200, 16, 5000, ignored=0.2, options={"memory_budget": MIB}), 8),
    (reference.Case("rows", 2500, 16, 1200, ignored=0.2, options={"memory_budget": MIB}), 3),
    (reference.Case("twice", 2100, 128, 1700, ignored=0.2, options={"memory_budget": MIB}), 16),
]


def inputs_of(case, rank, dtype=torch.float32, device="cpu"):
    hidden, weight, target, bias = case.inputs(dtype, device)
    g = torch.Generator().manual_seed(5)
    a = torch.randn(case.n, rank, generator=g).to(device, dtype)
    b = (torch.randn(case.v, rank, generator=g) * 0.5).to(device, dtype)
    return target, (hidden, weight, bias, a, b)


def run(op, case, rank, dtype, device, convert):
    target, tensors = inputs_of(case, rank, dtype, device)
    return forward_and_gradients(
        lambda h, w, bias, a, b: op(h, w, target, bias=bias, low_rank=(a, b), **case.options), tensors, convert
    )


def merged(hidden, weight, target, *, low_rank, **options):
    """The definition: one weight over hidden states and the rank's columns."""
    a, b = low_rank
    return reference.linear_logprob(torch.cat([hidden, a], 1), torch.cat([weight, b], 1), target, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case, rank", CASES, ids=lambda c: getattr(c, "name", ""))
def test_matches_the_merged_computation(case, rank, dtype, device):
    """Outputs and all five gradients no further from float64 than the reference in the same dtype."""
    ours, grads = run(fastpost.linear_logprob, case, rank, dtype, device, torch.clone)
    plain, plain_grads = run(reference.linear_logprob, case, rank, dtype, device, torch.clone)
    truth, true_grads = run(merged, case, rank, dtype, device, torch.Tensor.double)
    for a, b, t in zip(ours, plain, truth):
        assert a.dtype == torch.float32 and error(a, t) <= 1.5 * error(b, t) + 1e-6
    assert len(grads) == 4 + case.bias
    luck = 1.5 if device == "cpu" else 2.5  # H200, one case in float16: twice the error of plain torch
    for a, b, t in zip(grads, plain_grads, true_grads):
        assert a.dtype == dtype and error(a, t) <= luck * error(b, t) + 1e-5


@pytest.mark.parametrize("case, rank", CASES, ids=lambda c: getattr(c, "name", ""))
def test_float64_runs_the_same_loops(case, rank):
    ours, grads = run(fastpost.linear_logprob, case, rank, torch.float64, "cpu", torch.clone)
    truth, true_grads = run(merged, case, rank, torch.float64, "cpu", torch.clone)
    for a, t in zip((*ours, *grads), (*truth, *true_grads)):
        torch.testing.assert_close(a, t, rtol=1e-11, atol=1e-11)


def test_a_frozen_weight_costs_no_weight_gradient(monkeypatch, device):
    """Training an adapter of the head: GEMMs for hidden, a and b, none that is as large as the weight's gradient."""
    target, (hidden, weight, _, a, b) = inputs_of(reference.Case("x", 20, 16, 300), 4, device=device)
    leaves = [t.requires_grad_() for t in (hidden, a, b)]
    seen, mm = [], torch.mm
    out = fastpost.linear_logprob(hidden, weight, target, low_rank=(a, b))
    monkeypatch.setattr(torch, "mm", lambda p, q, **k: (seen.append((*p.shape, q.shape[1])), mm(p, q, **k))[1])
    out.sum().backward()
    assert sorted(seen) == [(20, 300, 4), (20, 300, 16), (300, 20, 4)]
    for t in leaves:
        assert t.grad.count_nonzero() > 0.9 * t.numel()


def test_a_frozen_weight_needs_no_room_for_its_sums():
    n, v, d, rank = 4096, 128_000, 4096, 16
    trained = plan(n, v, d, 2, 64 * MIB, d + rank, d + rank)
    frozen = plan(n, v, d, 2, 64 * MIB, d + rank, rank)
    assert trained.sweep == "twice" and frozen.sweep == "rows"


MEMORY_PROBE = """
import resource, torch, fastpost
n, d, v, r = 1024, 64, 50_000, 16
hidden, a = (torch.ones(n, k).requires_grad_() for k in (d, r))
weight, b = torch.full((v, d), 0.01), torch.full((v, r), 0.01).requires_grad_()
grads = [torch.ones_like(t) for t in (hidden, a, b)]
fastpost.linear_logprob(hidden[:8], weight[:64], torch.arange(8), low_rank=(a[:8], b[:64]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
out = fastpost.linear_logprob(hidden, weight, torch.arange(n), low_rank=(a, b), memory_budget=16 << 20)
del grads
torch.autograd.grad(out.sum(), (hidden, a, b))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


def test_extra_memory_stays_under_the_budget():
    """Of which a merged weight, a weight gradient or the logits would take 13 to 200 MB."""
    child = subprocess.run([sys.executable, "-c", MEMORY_PROBE], capture_output=True, text=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < (16 << 20) + (8 << 20)  # allocator slack and the GEMM library's own scratch


def test_gradient_reaches_the_adapter(device):
    """a = scaling · hidden · Aᵀ made outside: A's gradient, and hidden's through a, are autograd's."""
    target, (hidden, weight, _, _, b) = inputs_of(reference.Case("x", 30, 16, 300), 4, device=device)
    down = torch.randn(4, 16, device=device)
    grads = []
    for op in (fastpost.linear_logprob, reference.linear_logprob):
        leaves = [t.detach().clone().requires_grad_() for t in (hidden, down, b)]
        out = op(leaves[0], weight, target, low_rank=(2.0 * leaves[0] @ leaves[1].T, leaves[2]))
        grads.append(torch.autograd.grad(out.sum(), leaves))
    for ours, plain in zip(*grads):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_preference_loss_passes_it_on(device):
    target, (hidden, weight, _, a, b) = inputs_of(reference.Case("x", 24, 16, 300), 4, device=device)
    cu_seqlens = torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32, device=device)
    a.requires_grad_(), b.requires_grad_()
    losses = []
    for op in (fastpost.preference_loss, fastpost.reference.preference_loss.preference_loss):
        objective = fastpost.objectives.SimPO()
        loss = op(hidden, weight, target, cu_seqlens, objective, low_rank=(a, b)).loss
        losses.append((loss, *torch.autograd.grad(loss, (a, b))))
    for ours, plain in zip(*losses):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_autocast_and_fake_tensors(device):
    target, (hidden, weight, _, a, b) = inputs_of(reference.Case("x", 20, 16, 300), 4, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = fastpost.linear_logprob(hidden, weight, target, low_rank=(a, b))
    cast = [t.bfloat16() for t in (hidden, weight, a, b)]
    torch.testing.assert_close(out, fastpost.linear_logprob(*cast[:2], target, low_rank=cast[2:]))
    with FakeTensorMode() as mode:
        h, w, t, a, b = (mode.from_tensor(x) for x in (hidden, weight, target, a, b))
        assert fastpost.linear_logprob(h, w, t, low_rank=(a, b)).shape == (20,)


def test_opcheck(device):
    target, (hidden, weight, _, a, b) = inputs_of(reference.Case("x", 9, 8, 40), 3, device=device)
    tensors = hidden, weight.requires_grad_(), target, None, a.requires_grad_(), b.requires_grad_()
    torch.library.opcheck(_forward_op, (*tensors, 0.9, 0.0, -100, True, MIB, True))


BAD = {
    "not a pair": (lambda a, b: a, r"low_rank: expected a pair \(a \[N, r\], b \[V, r\]\) of tensors, got \(Tensor\)"),
    "a rows": (lambda a, b: (a[1:], b), r"low_rank: expected a as float32 \[N = 4, r = 3\], got float32 \[3, 3\]"),
    "a rank": (lambda a, b: (a[:, 1:], b), r"expected a as float32 \[N = 4, r = 3\], got float32 \[4, 2\]"),
    "a dtype": (lambda a, b: (a.double(), b), r"expected a as float32 \[N = 4, r = 3\], got float64 \[4, 3\]"),
    "b transposed": (lambda a, b: (a, b.T), r"expected a as float32 \[N = 4, r = 20\], got float32 \[4, 3\]"),
    "b rows": (lambda a, b: (a, b[1:]), r"expected b as float32 \[V = 20, r = 3\], got float32 \[19, 3\]"),
    "b missing": (lambda a, b: (a, None), r"low_rank: expected a pair .*got \(Tensor, NoneType\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    args = torch.randn(4, 8), torch.randn(20, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[linear_logprob\] .*" + message):
        fastpost.linear_logprob(*args, low_rank=change(torch.randn(4, 3), torch.randn(20, 3)))
