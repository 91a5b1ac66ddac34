# SPDX-License-Identifier: Apache-2.0
"""The moving average of the weights: its closed form, what is evaluated and written of it, and that a resume keeps
it."""

import pytest
import torch
from safetensors.torch import load_file

import runs
from fastpost.hf import folder
from fastpost.train import checkpoint, loop, metrics
from fastpost.train.evaluate import evaluate_config
from fastpost.train.export import export
from fastpost.train.gradients import Gradients
from fastpost.train.loop import train
from fastpost.train.optim import AdamW, join

EMA = ("--optim.ema", "0.5")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Linear(37, 37)
        self.unused = torch.nn.Linear(3, 3)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "pure-bf16"])
def test_it_is_the_closed_form(precision):
    """At lr 1e-5 the bf16 weight hardly moves in a step; its float32 master does, and that is what is averaged."""
    net = Net()
    first = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = AdamW(net, precision=precision, ema=0.9)
    if precision == "pure-bf16":
        first = {n: p.detach().float() for n, p in net.named_parameters()}
    expected = {n: w.double() for n, w in first.items()}
    for step in range(12):
        with Gradients(optimizer.parameters) as gradients:
            net.a(torch.ones(2, 37, dtype=net.a.weight.dtype)).float().square().mean().backward()
            optimizer.step(gradients, step=step, lr=1e-5)
        state = dict(optimizer.tensors())
        for n, p in net.named_parameters():
            w = join(p, state[f"remainder.{n}"]) if precision == "bf16" else p.float()
            expected[n] = 0.9 * expected[n] + 0.1 * w.detach().double()
    for n, average in expected.items():
        assert state[f"ema.{n}"].dtype == torch.float32
        torch.testing.assert_close(state[f"ema.{n}"].double(), average, rtol=0, atol=1e-7)
    moved = (state["ema.a.weight"] - first["a.weight"]).abs().max()
    assert moved > 1e-6 and (moved < 12e-5 or precision == "pure-bf16")
    assert torch.equal(state["ema.unused.weight"], first["unused.weight"])


@pytest.mark.parametrize("precision", ["bf16", "fp32", "pure-bf16"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_applied_and_taken_off_again(precision, dtype):
    net = Net()
    optimizer = AdamW(net, precision=precision, ema=0.9)
    with Gradients(optimizer.parameters) as gradients:
        net.a(torch.ones(2, 37, dtype=net.a.weight.dtype)).float().square().mean().backward()
        optimizer.step(gradients, step=0, lr=0.1)
    before = {n: (p.dtype, p.detach().clone()) for n, p in net.named_parameters()}
    average = dict(optimizer.ema.tensors())
    kept = {n: t.clone() for n, t in average.items()}
    with pytest.raises(RuntimeError, match="stop"), optimizer.ema.applied(dtype):
        for n, p in net.named_parameters():
            assert torch.equal(p, average[f"ema.{n}"].to(dtype or before[n][0]))
        assert not torch.equal(net.a.weight.float(), before["a.weight"][1].float())
        raise RuntimeError("stop")
    for n, p in net.named_parameters():
        assert p.dtype == before[n][0] and torch.equal(p, before[n][1])
    assert all(torch.equal(t, kept[n]) for n, t in average.items())


@pytest.mark.parametrize("precision", ["bf16", "fp32", "pure-bf16"])
def test_a_run_evaluates_writes_and_resumes_it(tmp_path, precision):
    options = (*EMA, "--optim.precision", precision, "--optim.lr", "0.01")
    cfg = runs.recipe(tmp_path, *options)
    train(cfg)
    plain = runs.recipe(tmp_path, *options, "--optim.ema", "none", "--train.output_dir", str(tmp_path / "plain"))
    train(plain)
    # Training does not notice it.
    weights = [(tmp_path / n / "model/model.safetensors").read_bytes() for n in ("run", "plain")]
    assert weights[0] == weights[1]
    rows, others = (metrics.read(tmp_path / n / "metrics.jsonl") for n in ("run", "plain"))
    assert [{k: v for k, v in r.items() if "ema/" not in k} for r in rows] == others

    evaluations = [r for r in rows if "eval_loss" in r]
    assert "eval_ema/loss" not in evaluations[0]  # nothing is averaged before the first step
    for r in evaluations[1:]:
        assert r["eval_ema/loss"] != r["eval_loss"] and "eval_ema/rewards/accuracies" in r and "eval_ema/rows" not in r
    again = evaluate_config(cfg, tmp_path / "run/model-ema")
    assert again["loss"] == pytest.approx(evaluations[-1]["eval_ema/loss"], abs=1e-5)
    assert again["loss"] != pytest.approx(evaluations[-1]["eval_loss"], abs=1e-4)

    cut = runs.recipe(tmp_path, *options, "--train.output_dir", str(tmp_path / "cut"))
    assert runs.in_child(runs.killed_at(cut, loop, "train_step", 4)) != 0
    train(cut)
    assert runs.outcome(tmp_path / "cut") == runs.outcome(tmp_path / "run")
    averages = [(tmp_path / n / "model-ema/model.safetensors").read_bytes() for n in ("run", "cut")]
    assert averages[0] == averages[1]


def test_killed_while_the_average_is_written(tmp_path):
    train(runs.recipe(tmp_path, *EMA))
    for call in (1, 2):  # model-ema is first, model second
        name = tmp_path / f"cut{call}"
        cut = runs.recipe(tmp_path, *EMA, "--train.output_dir", str(name))
        assert runs.in_child(runs.killed_at(cut, folder, "save_file", call, after=True)) != 0
        assert not (name / "model").exists()
        train(cut)
        for part in ("model", "model-ema"):
            written, whole = (load_file(p / part / "model.safetensors") for p in (name, tmp_path / "run"))
            assert all(torch.equal(written[k], whole[k]) for k in whole)


def test_export_takes_it_from_the_end_and_from_checkpoints(tmp_path):
    train(runs.recipe(tmp_path, *EMA))
    final = load_file(export(tmp_path / "run", tmp_path / "final", ema=True) / "model.safetensors")
    written = load_file(tmp_path / "run/model-ema/model.safetensors")
    assert all(torch.equal(final[k], written[k]) for k in written)
    state = runs.stored(checkpoint.latest(tmp_path / "run/checkpoints"), "optimizer")
    four = load_file(export(tmp_path / "run", tmp_path / "four", step=4, ema=True, dtype="fp32") / "model.safetensors")
    assert all(torch.equal(four[k], state[f"ema.{k}"]) for k in four if f"ema.{k}" in state) and len(four) > 10
    weights = load_file(export(tmp_path / "run", tmp_path / "weights", step=4, dtype="fp32") / "model.safetensors")
    assert not torch.equal(four["model.norm.weight"], weights["model.norm.weight"])


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"optim.ema: expected a decay between 0 and 1, got 1.0"):
        runs.recipe(tmp_path, "--optim.ema", "1")
    with pytest.raises(ValueError, match=r"\[optim\] optim.ema: expected a decay between 0 and 1"):
        AdamW(Net(), ema=0.0)
    train(runs.recipe(tmp_path, "--train.max_steps", "1"))
    with pytest.raises(ValueError, match=r"--ema: .* kept no average of its weights \(optim.ema is none\)"):
        export(tmp_path / "run", tmp_path / "x", ema=True)
