# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpost
from compare import FLOATS, error, forward_and_gradients
from fastpost import _core
from fastpost.ops import _fused
from fastpost.ops._tiles import plan
from fastpost.ops.linear_logprob import _forward_op
from fastpost.reference import linear_logprob as reference

CASES = reference.cases()


@pytest.fixture(autouse=True, params=["fused", "torch"])
def route(request, monkeypatch):
    """Whose GEMMs: the core's (on the CPU, where it takes the arguments) or torch's."""
    monkeypatch.setattr(_fused, "FORCED", request.param)
    monkeypatch.setenv("FASTPOST_CPU_GEMM", request.param)
    return request.param


def run(op, case, inputs, convert, **options):
    hidden, weight, target, bias = inputs
    return forward_and_gradients(
        lambda h, w, b: op(h, w, target, bias=b, **(case.options | options)), (hidden, weight, bias), convert
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    """No further from the float64 truth than plain torch in the same dtype, with a little room for luck."""
    inputs = case.inputs(dtype, device)
    ours, grads = run(fastpost.linear_logprob, case, inputs, torch.clone)
    plain, plain_grads = run(reference.linear_logprob, case, inputs, torch.clone)
    truth, true_grads = run(reference.linear_logprob, case, inputs, torch.Tensor.double)
    for a, b, t in zip(ours, plain, truth):
        assert a.dtype == torch.float32
        assert error(a, t) <= 1.5 * error(b, t) + 1e-6
    room = 1e-5 if device == "cpu" else 4e-5  # H200, float32 with the entropy: 4.6e-5 where plain torch has 1.7e-5
    for a, b, t in zip(grads, plain_grads, true_grads):
        assert a.dtype == dtype
        assert error(a, t) <= 1.5 * error(b, t) + room


@pytest.mark.parametrize("budget", [1 << 20, 3 << 20, 256 << 20])
def test_budget_changes_nothing_but_memory(budget, device):
    case = reference.Case("x", 700, 24, 3000, ignored=0.2, bias=True)
    inputs = case.inputs(torch.float32, device)
    ours, grads = run(fastpost.linear_logprob, case, inputs, torch.clone, memory_budget=budget)
    truth, true_grads = run(reference.linear_logprob, case, inputs, torch.Tensor.double)
    assert error(ours[0], truth[0]) < 1e-6
    for a, b in zip(grads, true_grads):
        assert error(a, b) < 1e-5


def test_every_sweep_is_reached():
    """The cases above cover each branch of the plan; this keeps it so."""
    sweeps = {
        plan(int(c.n * (1 - c.ignored)), c.v, c.d, 4, c.options.get("memory_budget", 256 << 20)).sweep for c in CASES
    }
    assert sweeps == {"rows", "cols", "twice"}


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "all"])
def test_frozen_inputs(frozen, device):
    case = reference.Case("x", 20, 16, 300, bias=True)
    hidden, weight, target, bias = case.inputs(device=device)
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, t in tensors.items():
        t.requires_grad_(name != frozen and frozen != "all")
    out = fastpost.linear_logprob(target=target, **tensors)
    assert out.requires_grad == (frozen != "all")
    if frozen == "all":
        return
    out.sum().backward()
    for name, t in tensors.items():
        assert (t.grad is None) == (name == frozen)


def test_backward_twice_and_accumulation(device):
    case = reference.Case("x", 20, 16, 300, ignored=0.3)
    hidden, weight, target, _ = case.inputs(device=device)
    hidden.requires_grad_(), weight.requires_grad_()
    out = fastpost.linear_logprob(hidden, weight, target).sum()
    out.backward(retain_graph=True)
    once = weight.grad.clone()
    out.backward()
    torch.testing.assert_close(weight.grad, 2 * once, rtol=1e-6, atol=1e-7)


def test_tied_weight(device):
    """An embedding that is also the head gets the sum of both gradients."""
    weight = torch.randn(50, 8, device=device, requires_grad=True)
    ids, target = torch.randint(0, 50, (2, 12), device=device)

    def loss(op, embedding, head):
        hidden = torch.tanh(torch.nn.functional.embedding(ids, embedding))
        return op(hidden, head, target).sum()

    tied = torch.autograd.grad(loss(fastpost.linear_logprob, weight, weight), weight)[0]
    for op in (fastpost.linear_logprob, reference.linear_logprob):
        untied = [weight.detach().clone().requires_grad_() for _ in range(2)]
        both = torch.autograd.grad(loss(op, *untied), untied)
        assert all(g.norm() > 0.1 for g in both)
        torch.testing.assert_close(tied, sum(both), rtol=1e-4, atol=1e-5)


def test_non_contiguous_hidden_and_weight(device):
    hidden, weight, target, _ = reference.Case("x", 20, 16, 300).inputs(device=device)
    expected = fastpost.linear_logprob(hidden, weight, target)
    strided = hidden.T.contiguous().T, torch.cat([weight, weight], dim=1)[:, :16]
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(fastpost.linear_logprob(*strided, target), expected)


def test_zero_gradient_rows_are_exact(device):
    hidden, weight, target, _ = reference.Case("x", 64, 16, 300).inputs(device=device)
    hidden.requires_grad_(), weight.requires_grad_()
    grad = torch.randn(64, device=device)
    grad[::3] = 0
    fastpost.linear_logprob(hidden, weight, target).backward(grad)
    assert torch.all(hidden.grad[::3] == 0)
    some = hidden.detach()[grad != 0].requires_grad_()
    alone = weight.detach().clone().requires_grad_()
    fastpost.linear_logprob(some, alone, target[grad != 0]).backward(grad[grad != 0])
    torch.testing.assert_close(hidden.grad[grad != 0], some.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad, alone.grad, rtol=1e-5, atol=1e-6)


def test_same_bits_from_run_to_run(device):
    case = reference.Case("x", 333, 24, 3000, ignored=0.2)
    runs = [run(fastpost.linear_logprob, case, case.inputs(torch.bfloat16, device), torch.clone) for _ in range(2)]
    for a, b in zip(runs[0][0] + tuple(runs[0][1]), runs[1][0] + tuple(runs[1][1])):
        assert torch.equal(a, b)


def test_autocast_follows_linear(device):
    hidden, weight, target, _ = reference.Case("x", 20, 16, 300).inputs(device=device)
    weight.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = fastpost.linear_logprob(hidden.bfloat16(), weight, target)
    torch.testing.assert_close(out, fastpost.linear_logprob(hidden.bfloat16(), weight.bfloat16(), target))
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_opcheck(device):
    hidden = torch.randn(9, 8, device=device, requires_grad=True)
    weight = torch.randn(40, 8, device=device, requires_grad=True)
    bias = torch.randn(40, device=device, requires_grad=True)
    target = torch.tensor([0, 1, 2, 39, -100, 5, 6, 7, 8], device=device)
    for b, entropy in [(None, False), (bias, True)]:
        torch.library.opcheck(
            _forward_op, (hidden, weight, target, b, None, None, 0.9, 20.0, -100, entropy, 1 << 20, True)
        )


def test_compiles_without_graph_break(device):
    hidden = torch.randn(9, 8, device=device, requires_grad=True)
    weight = torch.randn(40, 8, device=device, requires_grad=True)
    target = torch.tensor([0, 1, 2, 39, -100, 5, 6, 7, 8], device=device)

    def loss(h, w):
        logprob, entropy = fastpost.linear_logprob(h.tanh(), w, target, return_entropy=True)
        return (logprob - 0.1 * entropy).sum()

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    got = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight), (hidden, weight)
    )
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_fake_tensors_carry_shapes_only():
    with FakeTensorMode():
        hidden, weight = torch.empty(6, 8, dtype=torch.bfloat16), torch.empty(50, 8, dtype=torch.bfloat16)
        out = fastpost.linear_logprob(hidden, weight, torch.empty(6, dtype=torch.int64))
    assert out.shape == (6,) and out.dtype == torch.float32


# What a process needs beyond its inputs and results, whatever N and V, measured from outside: peak resident memory of
# a child with a tiny budget, minus that of a child that does the same without the op.
MEMORY_PROBE = """
import os, resource, sys, torch, fastpost
torch.set_num_threads(1)
n, d, v, budget = map(int, sys.argv[1:])
hidden = torch.ones(n, d, dtype=torch.bfloat16).requires_grad_()
weight = torch.full((v, d), 0.01, dtype=torch.bfloat16).requires_grad_()
target = torch.arange(n) % v
hidden.grad, weight.grad = torch.ones_like(hidden), torch.ones_like(weight)
spare = torch.ones_like(weight), torch.ones_like(hidden)  # autograd returns new gradients and adds them to the old
del spare
fastpost.linear_logprob(hidden[:8], weight[:64], target[:8] % 64)  # load code, start threads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
fastpost.linear_logprob(hidden, weight, target, memory_budget=budget).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.parametrize("n,d,v", [(1024, 64, 50_000), (256, 64, 200_000), (20_000, 64, 10_000)])
def test_extra_memory_stays_under_the_budget(n, d, v):
    budget = 32 << 20
    assert 2 * n * v > 3 * budget  # the logits alone would not fit
    child = subprocess.run([sys.executable, "-c", MEMORY_PROBE, *map(str, (n, d, v, budget))], capture_output=True,
                           text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert child.returncode == 0, child.stderr
    noise = 8 << 20  # allocator slack and the GEMM library's own scratch
    assert int(child.stdout) < budget + noise


def test_what_is_kept_is_there_once():
    """No copy of it, and no zeros as large as it for a gradient that it does not have."""
    n, d, v = 512, 64, 50_000
    child = subprocess.run([sys.executable, "-c", MEMORY_PROBE, *map(str, (n, d, v, 256 << 20))], capture_output=True,
                           text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 2 * n * v + (16 << 20)  # the other path has a tile besides


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 8.0])
def test_tile_functions_do_what_the_reference_does(dtype, softcap, device):
    """Two slices of a row block through the core and through plain torch, which float64 runs on."""
    g = torch.Generator().manual_seed(2)
    logits, bias = (torch.randn(shape, generator=g).mul(6).to(device, dtype) for shape in ((9, 515), (515,)))
    target = torch.randint(0, 515, (9,), generator=g).to(device)
    incoming = torch.randn(2, 9, generator=g).to(device)
    incoming[:, 4] = 0
    results = []
    for core in (_core, reference):
        stats = torch.zeros(5, 9, device=device)
        stats[0], stats[4] = -torch.inf, torch.nan
        slices = [(0, 300), (300, 515)]
        for v0, v1 in slices:
            core.linear_logprob_tile(logits[:, v0:v1], bias[v0:v1], target, v0, 0.8, softcap, True, stats)
        rows = torch.full((3, 9), torch.nan, device=device)
        core.linear_logprob_finish(stats, *rows)
        grad = torch.full_like(logits, torch.nan)
        for v0, v1 in slices:
            core.linear_logprob_tile_backward(
                logits[:, v0:v1], bias[v0:v1], target, v0, 0.8, softcap, *rows, *incoming, grad[:, v0:v1]
            )
        results.append((stats, rows, grad))
    for ours, plain in zip(*results):
        half = ours.dtype != torch.float32
        torch.testing.assert_close(ours, plain, rtol=2e-2 if half else 1e-4, atol=1e-3 if half else 1e-5)


def test_masked_rows_are_not_computed(monkeypatch, device):
    """Rows seen by GEMMs are the scored ones, and in the backward only those with a gradient."""
    hidden, weight, target, _ = reference.Case("x", 100, 16, 300).inputs(device=device)
    target[20:] = -100
    hidden.requires_grad_(), weight.requires_grad_()
    seen = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: (seen.append(tuple(a.shape)), mm(a, b, **k))[1])
    monkeypatch.setattr(_fused, "FORCED", "torch")  # the core has no call that could be watched
    out = fastpost.linear_logprob(hidden, weight, target)
    assert seen == [(20, 16)]
    seen.clear()
    out.backward((torch.arange(100, device=device) < 5).float())
    assert seen == [(5, 300), (300, 5)]


BAD = {
    "hidden dtype": (lambda h, w, t: (h.double(), w, t), r"\[linear_logprob\] hidden: expected float32 or bfloat16"),
    "weight dtype": (lambda h, w, t: (h, w.bfloat16(), t), r"weight: expected float32 \[any, 8\], got bfloat16 \[20,"),
    "weight shape": (lambda h, w, t: (h, w.T, t), r"weight: expected float32 \[any, 8\], got float32 \[8, 20\] on cpu"),
    "target dtype": (lambda h, w, t: (h, w, t.int()), r"target: expected int64 \[4\], got int32 \[4\]"),
    "target shape": (lambda h, w, t: (h, w, t[None]), r"target: expected int64 \[4\], got int64 \[1, 4\]"),
    "target high": (lambda h, w, t: (h, w, t + 20), r"indices in \[0, 20\) or ignore_index -100, got 20 at row 0"),
    "target strided": (lambda h, w, t: (h, w, t.repeat(2)[::2]), r"target: expected a contiguous tensor, got strides"),
    "batch": (lambda h, w, t: (h[None], w, t), r"hidden: expected .* \[any, any\], got float32 \[1, 4, 8\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        fastpost.linear_logprob(*change(torch.randn(4, 8), torch.randn(20, 8), torch.zeros(4, dtype=torch.int64)))


def test_bad_options_are_named():
    args = torch.randn(4, 8), torch.randn(20, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"bias: expected float32 \[20\], got float32 \[8\]"):
        fastpost.linear_logprob(*args, bias=torch.zeros(8))
    with pytest.raises(ValueError, match=r"temperature: expected a number above 0"):
        fastpost.linear_logprob(*args, temperature=-1.0)
    with pytest.raises(ValueError, match=r"memory_budget: expected at least 1048576 bytes"):
        fastpost.linear_logprob(*args, memory_budget=1000)


def test_dtensor_is_refused_by_name():
    from torch.distributed.tensor import DTensor

    class Sharded(DTensor):  # a DTensor needs a process group; its type is all that is looked at
        pass

    Sharded.__name__ = "DTensor"
    weight = torch.Tensor._make_subclass(Sharded, torch.randn(20, 8))
    with pytest.raises(ValueError, match=r"weight: expected a plain torch.Tensor, got DTensor.*full_tensor"):
        fastpost.linear_logprob(torch.randn(4, 8), weight, torch.zeros(4, dtype=torch.int64))


def test_nan_hidden_stays_in_its_row(device):
    hidden, weight, target, _ = reference.Case("x", 6, 16, 300).inputs(device=device)
    hidden[2, 3] = torch.nan
    assert torch.isnan(fastpost.linear_logprob(hidden, weight, target)).tolist() == [False] * 2 + [True] + [False] * 3
