# SPDX-License-Identifier: Apache-2.0
"""The whole of linear_logprob as on a Hopper GPU, on the CPU: exponentials kept, made again, or some of each; with rows
compacted, and as while a CUDA graph is recorded, where every row is computed."""

import importlib
import shutil

import on_host
import pytest
import torch

import fastpost
from compare import error, forward_and_gradients
from fastpost.reference import linear_logprob as reference

pytestmark = pytest.mark.skipif(shutil.which(on_host.COMPILER) is None, reason=f"needs {on_host.COMPILER}")
CASES = [c for c in reference.cases() if c.n * c.v * c.d < 6e6 and c.d % 8 == 0] + [
    reference.Case("kept", 90, 24, 700, ignored=0.2, bias=True),
    reference.Case("recomputed", 500, 8, 9001, options={"memory_budget": 1 << 20}),
    reference.Case("some kept", 200, 16, 3001, ignored=0.1, bias=True, options={"memory_budget": 2 << 20}),
]


@pytest.fixture
def hopper(core, monkeypatch):
    """Which calls of linear_logprob_forward made exponentials."""
    for name in ("linear_logprob", "_tiles", "_hopper"):
        monkeypatch.setattr(importlib.import_module(f"fastpost.ops.{name}"), "_core", core)
    monkeypatch.setattr("fastpost.ops._fused.usable", lambda *_: False)  # as on a GPU
    made, forward = [], core.linear_logprob_forward

    def spy(*arguments):
        made.append(arguments[8] is not None)
        forward(*arguments)

    monkeypatch.setattr(core, "linear_logprob_forward", spy, raising=False)
    core.set_capability(9)
    yield made
    core.set_capability(8)


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, recording, hopper, monkeypatch):
    if recording:
        for name in ("_passes", "_tiles"):
            monkeypatch.setattr(importlib.import_module(f"fastpost.ops.{name}"), "capturing", lambda _: True)
    hidden, weight, target, bias = case.inputs(torch.bfloat16)

    def run(op, convert, **options):
        inputs = hidden, weight, bias
        return forward_and_gradients(lambda h, w, b: op(h, w, target, bias=b, **options), inputs, convert)

    options = {k: v for k, v in case.options.items() if k != "memory_budget"}
    ours, grads = run(fastpost.linear_logprob, torch.clone, **case.options)
    plain, plain_grads = run(reference.linear_logprob, torch.clone, **options)
    truth, true_grads = run(reference.linear_logprob, torch.Tensor.double, **options)
    for a, b, t in zip((*ours, *grads), (*plain, *plain_grads), (*truth, *true_grads)):
        assert error(a, t) <= 1.5 * error(b, t) + 1e-5
    for a, t in zip(ours, truth):
        assert error(a, t) < 1e-6  # float32 logits: far better than plain bfloat16
    counted = target >= 0 if not recording else torch.ones_like(target, dtype=torch.bool)
    assert bool(hopper) == bool(counted.any())


def test_every_way_to_the_exponentials(hopper):
    """True: the forward keeps them, or the backward makes them again."""
    seen = {}
    for case in CASES[-3:]:
        hidden, weight, target, _ = case.inputs(torch.bfloat16)
        hidden.requires_grad_(), weight.requires_grad_()  # a frozen head has a way of its own
        hopper.clear()
        out = fastpost.linear_logprob(hidden, weight, target, **case.options)
        forward = list(hopper)
        hopper.clear()
        out.sum().backward()
        seen[case.name] = forward, len(hopper)
    assert seen["kept"] == ([True], 0)
    assert not any(seen["recomputed"][0]) and seen["recomputed"][1] > 0
    assert set(seen["some kept"][0]) == {True, False} and seen["some kept"][1] > 0


def test_rows_that_dropped_out_since_the_forward(hopper):
    hidden, weight, target, _ = reference.Case("x", 60, 16, 700, ignored=0.2).inputs(torch.bfloat16)
    g = torch.randn(60) * (torch.rand(60) < 0.5)
    grads = []
    for op, dtype in ((fastpost.linear_logprob, torch.bfloat16), (reference.linear_logprob, torch.float64)):
        h = hidden.to(dtype, copy=True).requires_grad_()
        (op(h, weight.to(dtype), target) * g).sum().backward()
        grads.append(h.grad)
    assert error(*grads) < 8e-3 and len(hopper) == 1
