# SPDX-License-Identifier: Apache-2.0
"""Moments in 8 bits: bitsandbytes' update on our pieces, what it costs, what it changes, and that a resume keeps it."""

import sys

import pytest
import torch

import runs
from fastpost.train import checkpoint, loop, metrics, moments
from fastpost.train import gradients as gradients_module
from fastpost.train.gradients import Gradients
from fastpost.train.loop import train
from fastpost.train.optim import AdamW

pytest.importorskip("bitsandbytes", reason="an extra: pip install 'fastpost[adamw8bit]'")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(torch.nn.Module):
    """A matrix that ends within a block of 256, a small one and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide = torch.nn.Linear(100, 83, bias=False)
        self.small = torch.nn.Linear(83, 7)
        self.embed = torch.nn.Embedding(50, 100)

    def forward(self, ids):
        return self.small(torch.tanh(self.wide(self.embed(ids))))


def run(optimizer, net, steps=30, first=0, lr=1e-3):
    for step in range(first, first + steps):
        ids = torch.randint(0, 50, (64,), generator=torch.Generator().manual_seed(step))
        with Gradients(optimizer.parameters) as gradients:
            net(ids).float().square().mean().backward()
            optimizer.step(gradients, step=step, lr=lr)


@pytest.mark.parametrize("piece", [gradients_module.CPU_PIECE, 512], ids=["whole", "pieces"])
def test_it_is_bitsandbytes_adamw(piece, monkeypatch):
    monkeypatch.setattr(gradients_module, "CPU_PIECE", piece)
    from bitsandbytes.optim import AdamW as Theirs

    ours, theirs = Net(), Net()
    run(AdamW(ours, precision="fp32", weight_decay=0.1, eight_bit=True), ours)
    reference = Theirs([theirs.wide.weight], lr=1e-3, weight_decay=0.1, optim_bits=8)
    plain = torch.optim.AdamW(
        [
            {"params": [theirs.small.weight, theirs.embed.weight], "weight_decay": 0.1},
            {"params": [theirs.small.bias], "weight_decay": 0.0},
        ],
        lr=1e-3,
        fused=True,
    )
    for step in range(30):
        ids = torch.randint(0, 50, (64,), generator=torch.Generator().manual_seed(step))
        theirs.zero_grad()
        theirs(ids).square().mean().backward()
        reference.step()
        plain.step()
    for name, p in ours.named_parameters():
        assert torch.equal(p, dict(theirs.named_parameters())[name]), name


@pytest.mark.parametrize("precision, wide", [("bf16", 6.03), ("fp32", 6.03), ("pure-bf16", 4.03)])
def test_bytes_a_weight_are_what_the_module_says(precision, wide):
    net = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False), torch.nn.Embedding(300, 256))
    optimizer = AdamW(net, precision=precision, eight_bit=True)
    tensors = dict(optimizer.tensors())
    per_weight = [
        (sum(t.nbytes for n, t in tensors.items() if n.endswith(f".{key}.weight")) + layer.weight.nbytes)
        / layer.weight.numel()
        for key, layer in enumerate(net)
    ]
    assert per_weight[0] == pytest.approx(wide, abs=0.005)
    assert per_weight[1] == (6 if precision == "pure-bf16" else 12)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "pure-bf16"])
def test_it_follows_wide_moments(precision):
    """Both go down the same valley; 8 bits end within some per cent of the way."""
    ends = {}
    for eight_bit in (False, True):
        net = Net()
        start = {n: p.detach().float().clone() for n, p in net.named_parameters()}
        run(AdamW(net, precision=precision, eight_bit=eight_bit), net, steps=60)
        ends[eight_bit] = torch.cat([(p.detach().float() - start[n]).flatten() for n, p in net.named_parameters()])
    away = (ends[True] - ends[False]).norm() / ends[False].norm()
    assert 0 < away < 0.15, away


@pytest.mark.parametrize("precision", ["bf16", "fp32", "pure-bf16"])
def test_a_fresh_optimizer_with_copied_state_goes_on(precision):
    whole, cut = Net(), Net()
    run(AdamW(whole, precision=precision, eight_bit=True), whole, 20)
    optimizer = AdamW(cut, precision=precision, eight_bit=True)
    run(optimizer, cut, 11)
    fresh = AdamW(cut, precision=precision, eight_bit=True)
    for (name, into), (other, value) in zip(fresh.tensors(), optimizer.tensors(), strict=True):
        assert name == other
        into.copy_(value)
    run(fresh, cut, 9, first=11)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rows_without_a_gradient_stay_finite():
    net = torch.nn.Linear(256, 64, bias=False)
    before = net.weight.detach().clone()
    optimizer = AdamW(net, precision="fp32", eight_bit=True)
    for step in range(3):
        with Gradients(optimizer.parameters) as gradients:
            net.weight.grad = torch.zeros_like(net.weight)
            net.weight.grad[:4] = 1.0
            optimizer.step(gradients, step=step, lr=1e-2)
    assert torch.equal(net.weight[4:], before[4:]) and (net.weight[:4] < before[:4]).all()


def test_a_run_resumes_to_the_bit(tmp_path):
    big = {"hidden_size": 64, "intermediate_size": 128}
    train(runs.recipe(tmp_path, "--optim.name", "adamw8bit", model=big))
    saved = runs.stored(checkpoint.latest(tmp_path / "run/checkpoints"), "optimizer")
    name = "model.layers.0.mlp.up_proj.weight"
    assert saved[f"exp_avg.{name}"].dtype == torch.uint8 and saved[f"exp_avg_scale.{name}"].shape == (32,)
    assert saved["exp_avg.model.embed_tokens.weight"].dtype == torch.float32
    assert saved["exp_avg.model.norm.weight"].dtype == torch.float32
    cut = runs.recipe(tmp_path, "--optim.name", "adamw8bit", "--train.output_dir", str(tmp_path / "cut"))
    assert runs.in_child(runs.killed_at(cut, loop, "train_step", 4)) != 0
    train(cut)
    assert runs.outcome(tmp_path / "cut") == runs.outcome(tmp_path / "run")
    train(runs.recipe(tmp_path, "--train.output_dir", str(tmp_path / "wide")))
    curves = [
        torch.tensor([r["loss"] for r in metrics.read(tmp_path / n / "metrics.jsonl") if "loss" in r])
        for n in ("run", "wide")
    ]
    assert 0 < (curves[0] - curves[1]).abs().max() < 0.05


def test_without_the_library(tmp_path, monkeypatch):
    """The message comes before data or weights are read, and names package and extra."""
    moments.library.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    cfg = runs.recipe(tmp_path, "--optim.name", "adamw8bit", "--data.train", str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError) as error:
        train(cfg)
    text = str(error.value)
    assert text.startswith("[optim] optim.name: adamw8bit needs the package bitsandbytes, which cannot be imported (")
    assert text.endswith("Install it with: pip install 'fastpost[adamw8bit]', or set optim.name to adamw.")
    tensors = dict(AdamW(Net(), precision="fp32", eight_bit=True).tensors())  # enough to read a checkpoint
    assert tensors["exp_avg.wide.weight"].dtype == torch.uint8
