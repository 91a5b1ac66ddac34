# SPDX-License-Identifier: Apache-2.0
"""The one-pass schedule of preference_loss against the two ops that it stands for."""

import pytest
import torch

import fastpost
from fastpost import objectives
from fastpost.ops import _fused, _one_pass
from fastpost.ops.preference_loss import preference_loss_from_logprob

V, D = 3_000, 24
BUDGET = 4 << 20  # a panel of 64 rows of float32 logits takes 0.8 MB


@pytest.fixture(autouse=True, params=["fused", "torch"])
def gemms(request, monkeypatch):
    """Whose GEMMs: the core's, or torch's, by which the schedule also runs on a GPU."""
    monkeypatch.setattr(_fused, "FORCED", request.param)
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """The cuts of every call that took the schedule."""
    seen = []
    original = _one_pass.pieces
    monkeypatch.setattr(_one_pass, "pieces", lambda *a: (seen.append(original(*a)), seen[-1])[1])
    return seen


def batch(dtype=torch.float32, lengths=(40, 25, 60, 31, 9, 70, 33, 50), bias=False):
    g = torch.Generator().manual_seed(0)
    t = sum(lengths)
    hidden = torch.randn(t, D, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g).to(dtype).mul(0.5).requires_grad_()
    target = torch.randint(0, V, (t,), generator=g)
    target[torch.rand(t, generator=g) < 0.3] = -100
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    b = torch.randn(V, generator=g).to(dtype).requires_grad_() if bias else None
    reference = -5 * torch.rand(len(lengths), generator=g) * torch.tensor(lengths)
    return hidden, weight, target, cu, b, reference


def two_ops(hidden, weight, target, cu, objective, bias, **columns):
    logprob = fastpost.linear_logprob(hidden, weight, target, bias=bias)
    return preference_loss_from_logprob(logprob, target, cu, objective, **columns)


def gradients(loss, tensors, **options):
    return torch.autograd.grad(loss, [t for t in tensors if t is not None], **options)


@pytest.mark.parametrize(
    "objective", [objectives.SimPO(), objectives.DPO(), objectives.KTO(), objectives.SFT()], ids=repr
)
@pytest.mark.parametrize("dtype, bias", [(torch.float32, True), (torch.bfloat16, False)], ids=["fp32", "bf16"])
def test_equals_the_two_ops(objective, dtype, bias, calls):
    hidden, weight, target, cu, b, ref = batch(dtype, bias=bias)
    columns = {"reference_logprob": ref} if objective.needs_reference else {}
    if objective.needs_reward:
        columns |= {"reward": torch.tensor([1.0, 0.0] * 4), "kl": 0.3}
    budget = BUDGET * dtype.itemsize // 4
    out = fastpost.preference_loss(hidden, weight, target, cu, objective, bias=b, memory_budget=budget, **columns)
    assert len(calls[0]) > 2 and calls[0][0] == 0 and calls[0][-1] == 8
    plain = two_ops(hidden, weight, target, cu, objective, b, **columns)
    for name in ("loss", "losses", "logprob", "rewards"):
        torch.testing.assert_close(getattr(out, name), getattr(plain, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(out.length, plain.length)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, p in zip(gradients(out.loss, (hidden, weight, b)), gradients(plain.loss, (hidden, weight, b))):
        assert a.dtype == dtype and (a - p).norm() <= tolerance * p.norm()


def test_any_other_use_of_its_outputs_is_right_too(calls):
    """One factor serves a mean and a sum; weighted losses, log-probs and both together take the two ops."""
    hidden, weight, target, cu, _, _ = batch()
    weights, direction = torch.tensor([1.0, 2.0, -1.0, 0.0]), torch.arange(8.0)
    uses = (
        lambda o: o.losses.sum() / 7,
        lambda o: 2 * o.loss + o.losses.sum(),
        lambda o: (o.losses * weights).sum(),
        lambda o: o.logprob @ direction,
        lambda o: o.loss + (o.logprob * direction).sum() + (o.losses * weights).sum(),
    )
    for use in uses:
        out = fastpost.preference_loss(hidden, weight, target, cu, objectives.SimPO(), memory_budget=BUDGET)
        plain = two_ops(hidden, weight, target, cu, objectives.SimPO(), None)
        for a, p in zip(gradients(use(out), (hidden, weight)), gradients(use(plain), (hidden, weight))):
            assert (a - p).norm() <= 1e-4 * p.norm()
    assert len(calls) == len(uses) and None not in calls


def test_twice_and_second_derivatives():
    hidden, weight, target, cu, _, _ = batch(lengths=(30, 40, 70, 60))
    out = fastpost.preference_loss(hidden, weight, target, cu, objectives.SimPO(), memory_budget=3 << 20)
    first = gradients(out.loss, (hidden, weight), retain_graph=True)
    again = gradients(out.loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    (grad,) = torch.autograd.grad(out.loss, hidden, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), hidden)
    plain = two_ops(hidden, weight, target, cu, objectives.SimPO(), None)
    (grad,) = torch.autograd.grad(plain.loss, hidden, create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), hidden)
    assert (second - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen(frozen, calls):
    hidden, weight, target, cu, _, _ = batch()
    tensors = [hidden, weight]
    tensors[frozen].requires_grad_(False)
    out = fastpost.preference_loss(*tensors, target, cu, objectives.SimPO(), memory_budget=BUDGET)
    assert len(calls[0]) > 2
    out.loss.backward()
    plain = two_ops(*tensors, target, cu, objectives.SimPO(), None)
    (expected,) = torch.autograd.grad(plain.loss, tensors[1 - frozen])
    assert tensors[frozen].grad is None
    assert (tensors[1 - frozen].grad - expected).norm() <= 1e-5 * expected.norm()


def test_when_it_is_not_taken(calls):
    """All logits fit; no gradient is wanted; one pair alone is too long. The result is the same every time."""
    hidden, weight, target, cu, _, _ = batch()
    plain = two_ops(hidden, weight, target, cu, objectives.SimPO(), None).loss
    torch.testing.assert_close(fastpost.preference_loss(hidden, weight, target, cu, objectives.SimPO()).loss, plain)
    with torch.no_grad():
        out = fastpost.preference_loss(hidden, weight, target, cu, objectives.SimPO(), memory_budget=BUDGET)
    torch.testing.assert_close(out.loss, plain)
    assert calls == []
    one_pair = torch.tensor([0, 200, 318], dtype=torch.int32)
    fastpost.preference_loss(hidden, weight, target, one_pair, objectives.SimPO(), memory_budget=BUDGET)
    assert calls == [None]


def test_mistakes_are_named_as_without_it():
    hidden, weight, target, cu, _, _ = batch()
    with pytest.raises(ValueError, match=r"\[preference_loss\] cu_seqlens: "):
        fastpost.preference_loss(hidden, weight, target, cu[:-1], objectives.SimPO(), memory_budget=BUDGET)
    with pytest.raises(ValueError, match=r"\[linear_logprob\] target: "):
        fastpost.preference_loss(hidden, weight, target + V, cu, objectives.SimPO(), memory_budget=BUDGET)
    with pytest.raises(ValueError, match="reference_logprob"):
        fastpost.preference_loss(hidden, weight, target, cu, objectives.DPO(), memory_budget=BUDGET)


def test_the_schedule_is_told(gemms):
    hidden, weight, target, cu, _, _ = batch()

    def told(**options):
        return fastpost.preference_loss(
            hidden, weight, target, cu, objectives.SimPO(), return_schedule=True, **options
        )[1]

    scored = int((target != -100).sum())
    assert told(memory_budget=BUDGET)[:4] == ("one pass", scored, scored, 6.0)
    assert told()[:4] == ("kept", scored, scored, 6.0)
    if gemms == "fused":  # too little for one panel of 64 rows
        assert told(memory_budget=1 << 20)[:4] == ("recompute", scored, 0, 8.0)
    else:
        assert told(memory_budget=1 << 20).operations > 7.5
    with torch.no_grad():
        assert told()[:4] == ("forward", scored, 0, 2.0)
    assert told(softcap=5.0).operations == (8.0 if gemms == "fused" else 6.0)  # the core makes them again
    hidden.requires_grad_(False)
    assert told().operations == 4.0
    *_, schedule = fastpost.linear_logprob(hidden, weight, target, memory_budget=BUDGET, return_schedule=True)
    assert schedule.name == "kept" and 0 < schedule.kept < scored and 4 < schedule.operations < 6
    assert str(schedule).startswith("kept, 4.")


def test_opcheck():
    hidden, weight, target, cu, _, _ = batch()
    kind, params = objectives.SimPO().core()
    arguments = (hidden, weight, target, cu, *[None] * 5, kind, params, 1.0, -100, BUDGET, False, [True, True, False],
                 [0, 2, 4, 8])  # fmt: skip
    torch.library.opcheck(_one_pass.one_pass, arguments)
