# SPDX-License-Identifier: Apache-2.0
"""AdamW against torch.optim.AdamW, the split master weight, stochastic rounding, clipping and accumulation."""

import pytest
import torch

from fastpost.train import gradients as gradients_module
from fastpost.train.gradients import Gradients
from fastpost.train.optim import AdamW, join, split, stochastic_round


class Net(torch.nn.Module):
    """A tied matrix, a bias, and a size that is no multiple of any vector width."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(37, 37)
        self.last = torch.nn.Linear(37, 37, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def backward(net, x):
    net(x.to(net.first.weight.dtype)).float().square().mean().backward()


def inputs(steps=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 37, generator=generator) for _ in range(steps)]


@pytest.fixture(params=[gradients_module.CPU_PIECE, 128], ids=["whole", "pieces"])
def piece(request, monkeypatch):
    # a multiple of every vector width, so that torch treats the same elements in its scalar tail
    monkeypatch.setattr(gradients_module, "CPU_PIECE", request.param)


def test_fp32_is_torch_adamw_to_the_bit(piece):
    ours, theirs = Net(), Net()
    optimizer = AdamW(ours, precision="fp32", betas=(0.8, 0.95), weight_decay=0.3)
    groups = [
        {"params": [theirs.first.weight], "weight_decay": 0.3},
        {"params": [theirs.first.bias], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), fused=True)
    for step, x in enumerate(inputs()):
        for group in reference.param_groups:
            group["lr"] = 0.01 * (step + 1)
        reference.zero_grad()
        backward(theirs, x)
        reference.step()
        with Gradients(optimizer.parameters) as gradients:
            backward(ours, x)
            optimizer.step(gradients, step=step, lr=0.01 * (step + 1))
    assert torch.equal(ours.first.weight, theirs.first.weight)
    assert torch.equal(ours.first.bias, theirs.first.bias)
    assert ours.last.weight is ours.first.weight
    assert len(optimizer.parameters) == 2  # the tied weight once


def test_clipping_is_torch_clip_grad_norm():
    ours, theirs = Net(), Net()
    optimizer = AdamW(ours, precision="fp32")
    for x in inputs(2):
        theirs.zero_grad()
        backward(theirs, 10 * x)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        with Gradients(optimizer.parameters) as gradients:
            backward(ours, 10 * x)
            norm = gradients.norm()
            assert norm == pytest.approx(float(expected), rel=1e-6)
            scaled = gradients.get(ours.first.weight) * (0.5 / (norm + 1e-6))
            torch.testing.assert_close(scaled, theirs.first.weight.grad)


def test_norm_of_bf16_gradients_is_float32():
    p = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    with Gradients([p]) as gradients:
        p.grad = torch.full_like(p, 1e-3)
        expected = float(p.grad.double().norm())
        assert gradients.norm() == pytest.approx(expected, rel=2e-4)  # bf16 would be 20 times worse


def test_bf16_follows_float32_where_plain_bf16_stands_still(piece):
    """lr 1e-6 on weights near 0.1: the float32 trajectory, rounded once, is what the model must hold."""
    exact, ours = Net(), Net()
    in_bf16 = Net().bfloat16()
    optimizer = AdamW(ours, precision="bf16")
    assert ours.first.weight.dtype == torch.bfloat16
    # fused AdamW over float32 copies fed with the same bf16 gradients
    reference = torch.optim.AdamW(exact.parameters(), weight_decay=0.0, fused=True)
    plain = torch.optim.AdamW(in_bf16.parameters(), lr=1e-6, weight_decay=0.0)
    for group in reference.param_groups:
        group["lr"] = 1e-6
    start = ours.first.weight.clone()
    for step, x in enumerate(inputs(60)):
        with Gradients(optimizer.parameters) as gradients:
            backward(ours, x)
            exact.first.weight.grad = ours.first.weight.grad.float()
            exact.first.bias.grad = ours.first.bias.grad.float()
            in_bf16.first.weight.grad = ours.first.weight.grad.clone()
            optimizer.step(gradients, step=step, lr=1e-6)
        reference.step()
        plain.step()
    assert float((ours.first.weight != exact.first.weight.bfloat16()).float().mean()) < 1e-3  # ties
    master = dict(optimizer.tensors())["remainder.first.weight"]
    assert torch.equal(join(ours.first.weight, master), exact.first.weight)
    moved = (ours.first.weight != start).float().mean()
    stuck = (in_bf16.first.weight != start).float().mean()
    assert moved > 0.02 > 0.01 > stuck


def test_master_keeps_what_the_files_had():
    net = Net()
    full = net.first.weight.detach().clone()
    optimizer = AdamW(net, precision="bf16")
    assert torch.equal(net.first.weight, full.bfloat16())
    optimizer.widen()
    assert net.first.weight.dtype == torch.float32
    assert torch.equal(net.first.weight, full)
    assert net.last.weight is net.first.weight


def test_split_and_join_are_inverse():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(1 << 18, generator=generator) * torch.logspace(-38, 38, 1 << 18)
    wide[:6] = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3e38, 1.17e-38])
    weight, remainder = torch.empty_like(wide, dtype=torch.bfloat16), torch.empty(wide.shape, dtype=torch.int16)
    split(wide, weight, remainder)
    tie = (wide.view(torch.int32) & 0xFFFF) == 0x8000
    assert tie.any()
    assert torch.equal(weight[~tie], wide[~tie].bfloat16())
    assert torch.equal(join(weight, remainder).view(torch.int32), wide.view(torch.int32))  # also -0.0


def test_stochastic_rounding_is_unbiased_and_exact_on_bf16():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(64, generator=generator), torch.tensor([1e-30, -1e30, 1.0, -0.5])])
    draws = 1 << 14
    bits = torch.randint(0, 1 << 16, (draws, len(values)), generator=generator, dtype=torch.int32)
    rounded = stochastic_round(values.repeat(draws, 1), bits)
    assert torch.equal(rounded, rounded.bfloat16().float())
    ulp = 2.0 ** (torch.floor(torch.log2(values.abs())) - 7)
    assert ((rounded - values).abs() <= ulp).all()
    # the mean of n draws has a standard error of at most ulp / (2 sqrt n); five of them
    assert ((rounded.double().mean(0) - values).abs() <= 5 * ulp / (2 * draws**0.5)).all()
    assert torch.equal(rounded[:, -2:], values[-2:].expand(draws, 2))


def test_pure_bf16_tracks_float32_and_repeats_itself():
    def run(seed, resume_at=None):
        net = Net()
        optimizer = AdamW(net, precision="pure-bf16", seed=seed)
        assert {t.dtype for _, t in optimizer.tensors()} == {torch.bfloat16}
        for step, x in enumerate(inputs(40)):
            if step == resume_at:  # a fresh optimizer with copied state goes on as if nothing had happened
                fresh = AdamW(net, precision="pure-bf16", seed=seed)
                for (_, into), (_, value) in zip(fresh.tensors(), optimizer.tensors(), strict=True):
                    into.copy_(value)
                optimizer = fresh
            with Gradients(optimizer.parameters) as gradients:
                backward(net, x)
                optimizer.step(gradients, step=step, lr=1e-5)
        return net.first.weight.detach()

    assert torch.equal(run(0), run(0))
    assert torch.equal(run(0), run(0, resume_at=17))
    assert not torch.equal(run(0), run(1))

    exact = Net()
    optimizer = AdamW(exact, precision="fp32")
    start = exact.first.weight.detach().clone()
    for step, x in enumerate(inputs(40)):
        with Gradients(optimizer.parameters) as gradients:
            backward(exact, x)
            optimizer.step(gradients, step=step, lr=1e-5)
    moved = exact.first.weight.detach() - start
    average = torch.stack([run(seed).float() for seed in range(24)]).mean(0) - start.bfloat16().float()
    # Rounded-away updates would give a slope of 0. Along the direction of the true update the noise averages out.
    slope = float((average * moved).sum() / moved.square().sum())
    assert slope == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_sums_in_float32(dtype):
    net = Net().to(dtype)
    expected = 0
    for x in inputs(8):
        net.zero_grad()
        backward(net, x)
        expected = expected + net.first.weight.grad.float()
    with Gradients(net.parameters(), 8) as gradients:
        for x in inputs(8):
            backward(net, x)
            assert all(p.grad is None for p in net.parameters())  # no second copy stays
        summed = gradients.get(net.first.weight)
        assert summed.dtype == torch.float32
        assert torch.equal(summed, expected)
        assert gradients.take(net.first.weight) is summed and gradients.get(net.first.weight) is None
    backward(net, inputs(1)[0])  # the hooks are gone
    assert net.first.weight.grad is not None


def test_nothing_is_left_after_an_error():
    net = Net()
    with pytest.raises(RuntimeError, match="stop"):
        with Gradients(net.parameters(), 2):
            backward(net, inputs(1)[0])
            raise RuntimeError("stop")
    backward(net, inputs(1)[0])
    assert net.first.weight.grad is not None


def test_frozen_parameters_keep_their_values_and_cost_no_state():
    net = Net()
    net.first.bias.requires_grad_(False)
    optimizer = AdamW(net, precision="bf16")
    assert [n for n, _ in optimizer.tensors() if "bias" in n] == []
    assert net.first.bias.dtype == torch.bfloat16


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[optim\] precision: expected one of bf16, fp32, pure-bf16, got 'fp16'"):
        AdamW(Net(), precision="fp16")
    net = Net().requires_grad_(False)
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        AdamW(net)
