# SPDX-License-Identifier: Apache-2.0
"""Inputs that found bugs in other libraries' losses and that test_<op>.py does not have among its cases.

Elsewhere: p -> 1, a vocabulary that is no multiple of anything, uneven and zero gradients, frozen inputs, retain_graph,
accumulation, autocast, tied weights, softcap with a scale (test_<op>.py, test_upstream_bugs.py).
"""

import math

import pytest
import torch

import fastpost
from compare import error
from drawn import MIB, cu, draw, gradients, pick
from fastpost import objectives
from fastpost.compat import cce
from fastpost.compat import torch as compat_torch
from fastpost.reference import linear_logprob as reference
from fastpost.reference.token_logprob import token_logprob as plain_token_logprob


def test_equal_logits(device):
    """log p = -log V and p = 1 / V exactly enough, whatever the common value."""
    hidden, weight = torch.ones(3, 4, device=device), torch.full((1000, 4), 25.0, device=device)
    target = torch.tensor([0, 500, 999], device=device)
    for budget in (MIB, None):
        out, (_, dw) = gradients(
            lambda h, w, b=budget: fastpost.linear_logprob(h, w, target, memory_budget=b), (hidden, weight),
            grad=torch.ones(3),
        )  # fmt: skip
        torch.testing.assert_close(out, torch.full_like(out, -math.log(1000)))
        torch.testing.assert_close(dw[1], torch.full_like(dw[1], -3e-3))


def test_classes_switched_off_by_the_bias(device):
    """-inf: probability 0, no gradient, no NaN; only the target left: log p = 0."""
    hidden, weight, target = draw(6, 8, device=device), draw(30, 8, seed=1, device=device), pick(10, 6, device=device)
    bias = torch.zeros(30, device=device)
    bias[10:] = -torch.inf
    out, grads = gradients(lambda h, w: fastpost.linear_logprob(h, w, target, bias=bias), (hidden, weight))
    few, few_grads = gradients(lambda h, w: fastpost.linear_logprob(h, w[:10], target), (hidden, weight))
    torch.testing.assert_close(out, few)
    for a, b in zip(grads, few_grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.all(grads[1][10:] == 0)
    bias[1:] = -torch.inf
    out, grads = gradients(lambda h, w: fastpost.linear_logprob(h, w, 0 * target, bias=bias), (hidden, weight))
    assert torch.all(out == 0) and all(torch.all(g == 0) for g in grads)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand(sign, device):
    hidden, weight, target = draw(6, 4, device=device), draw(40, 4, seed=1, device=device), pick(40, 6, device=device)
    shift = torch.full((40,), sign * 1e4, device=device)
    ours, grads = gradients(lambda h, w: fastpost.linear_logprob(h, w, target, bias=shift), (hidden, weight))
    truth, true_grads = gradients(
        lambda h, w: reference.linear_logprob(h, w, target, bias=shift.double()), (hidden, weight), torch.Tensor.double
    )
    assert (ours - truth).abs().max() < 4e-3  # two units of float32 at 1e4
    assert max(map(error, grads, true_grads)) < 1e-2


def test_views_with_offsets_and_strides(device):
    """Every input as a slice out of something larger gives the bits of its copy."""
    hidden, weight = draw(20, 3, 16, device=device)[4:, 1], draw(70, 33, seed=1, device=device)[5:65, 8:24]
    target, bias = pick(60, 40, device=device)[7:23], draw(90, seed=2, device=device)[11:71]
    assert (
        not hidden.is_contiguous() and not weight.is_contiguous() and target.storage_offset() and bias.storage_offset()
    )
    views = gradients(
        lambda h, w, b: fastpost.linear_logprob(h, w, target, bias=b), (hidden, weight, bias), lambda t: t
    )
    copies = gradients(
        lambda h, w, b: fastpost.linear_logprob(h, w, target.clone(), bias=b), (hidden, weight, bias),
        lambda t: t.clone(memory_format=torch.contiguous_format),
    )  # fmt: skip
    assert torch.equal(views[0], copies[0]) and all(torch.equal(a, b) for a, b in zip(views[1], copies[1]))
    logits = (
        draw(9, 50, device=device),
        draw(9, 2, 50, device=device)[:, 1],
        draw(90, device=device)[7:57].expand(9, 50),
    )
    for x in logits:
        expected = fastpost.token_logprob(x.contiguous(), target[:9] % 50)
        ours = fastpost.token_logprob(x, target[:9] % 50)
        # On a GPU, where a row begins decides which thread adds which of its logits.
        assert torch.equal(ours, expected) if device == "cpu" else error(ours, expected.double()) < 1e-6


@pytest.mark.parametrize("ignore", [0, 7])
def test_ignore_index_that_is_a_class(ignore, device):
    """Its rows are not scored, but it stays a class of the others."""
    hidden, weight, target = draw(30, 8, device=device), draw(9, 8, seed=1, device=device), pick(9, 30, device=device)
    ours, grads = gradients(lambda h, w: fastpost.linear_logprob(h, w, target, ignore_index=ignore), (hidden, weight))
    truth, true_grads = gradients(
        lambda h, w: reference.linear_logprob(h, w, target, ignore_index=ignore), (hidden, weight), torch.Tensor.double
    )
    assert torch.all(ours[target == ignore] == 0) and (target == ignore).any()
    assert max(map(error, (ours, *grads), (truth, *true_grads))) < 1e-5
    out = fastpost.preference_loss(
        hidden, weight, target, cu(14, 30, device=device), objectives.SimPO(), ignore_index=ignore
    )
    torch.testing.assert_close(out.logprob, torch.stack([ours[:14].sum(), ours[14:].sum()]))
    assert out.length.tolist() == [(part != ignore).sum().item() for part in (target[:14], target[14:])]


def test_labels_on_another_device_are_named(device):
    hidden, weight = draw(4, 8, device=device), draw(9, 8, device=device)
    target = torch.zeros(4, dtype=torch.int64, device="meta")
    message = rf"target: expected a tensor on {device}.*, got one on meta"
    with pytest.raises(ValueError, match=message):
        fastpost.linear_logprob(hidden, weight, target)
    with pytest.raises(ValueError, match=message):
        fastpost.preference_loss(hidden, weight, target, cu(2, 4, device=device), objectives.SimPO())


def test_more_than_two_to_the_31_logits():
    """Offsets of rows in 64 bits: the last rows of 70 001 x 32 768 logits. The rest of that memory is never touched."""
    n, v = 70_001, 32_768
    logits = torch.empty(n, v, dtype=torch.bfloat16)
    target = torch.full((n,), -100)
    logits[-3:], target[-3:] = draw(3, v, dtype=torch.bfloat16), torch.tensor([0, 5, v - 1])
    assert logits.numel() > 1 << 31
    out = fastpost.token_logprob(logits, target)
    assert torch.equal(out[-3:], fastpost.token_logprob(logits[-3:].clone(), target[-3:])) and torch.all(out[:-3] == 0)


@pytest.mark.parametrize("name", ["linear_logprob", "token_logprob", "cce", "torch"])
def test_no_rows_and_one_row(name, device):
    rows = {
        "linear_logprob": lambda h, w, t: fastpost.linear_logprob(h, w, t),
        "token_logprob": lambda h, w, t: fastpost.token_logprob(h @ w.T, t),
        "cce": lambda h, w, t: -cce.linear_cross_entropy(h, w, t, reduction="none", return_lse=True)[0],
        "torch": lambda h, w, t: -compat_torch.linear_cross_entropy(h, w, t, reduction="none", ignore_index=-1),
    }
    for n in (0, 1):
        hidden, weight, target = draw(n, 8, device=device), draw(9, 8, seed=1, device=device), pick(9, n, device=device)
        out, grads = gradients(lambda h, w, t=target: rows[name](h, w, t), (hidden, weight), grad=torch.ones(n))
        assert out.shape == (n,)
        torch.testing.assert_close(out, plain_token_logprob(hidden @ weight.T, target))
        assert all((g.abs().sum() > 0) == (n > 0) for g in grads)
