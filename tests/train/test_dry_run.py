# SPDX-License-Identifier: Apache-2.0
"""`train --dry-run`: a true account of the run, and nothing written."""

import json
import re
import shutil

import pytest
import torch

import runs
import tiny
from fastpost.cli import main
from fastpost.train import checkpoint, jsonl, memory
from fastpost.train.loop import train


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dry(tmp_path, capsys, *overrides, status=0):
    capsys.readouterr()
    assert main(["train", str(tmp_path / "recipe.yaml"), "--dry-run", *overrides]) == status
    out, err = capsys.readouterr()
    return out if status == 0 else err


def test_the_account_agrees_with_the_run(tmp_path, capsys):
    cfg = runs.recipe(tmp_path)
    out = dry(tmp_path, capsys, "--optim.lr", "2e-3")
    assert not (tmp_path / "run").exists() and out.splitlines()[-1] == "nothing was written"
    assert "config  DPO(beta=0.1" in out and "--optim.lr 2e-3" in out and f"output  {tmp_path}/run (new)" in out
    assert "train  rows 22 (kept 22, dropped 0)" in out and "[[" in out and "BOS 0 a sequence" in out
    assert "LlamaForCausalLM, 0.0 M parameters (0.0 M trained), 2 layers, bfloat16 on cpu" in out
    assert "loss 0.6931" in out and "check  reference = start, loss at step 0: 0.693147" in out
    steps, tokens = re.search(r"steps   (\d+) of 8 rows .*?, ([\d.e+]+) tokens, ", out).groups()
    train(cfg)
    rows = [r for r in jsonl.read(tmp_path / "run/metrics.jsonl") if "loss" in r]
    assert int(steps) == len(rows) == 6 and float(tokens) == pytest.approx(rows[-1]["num_tokens"], rel=1e-2)
    timing = jsonl.read(tmp_path / "run/timing.jsonl")
    assert len(timing) == 6
    assert f"output  {tmp_path}/run (finished" in dry(tmp_path, capsys)
    assert "other settings (optim.lr is 0.001 there, 0.002 now)" in dry(tmp_path, capsys, "--optim.lr", "2e-3")


def test_flops_are_those_of_the_steps(tmp_path, capsys):
    cfg = runs.recipe(tmp_path, "--train.epochs", "1")
    from fastpost import objectives
    from fastpost.hf import folder
    from fastpost.train.flops import Flops
    from fastpost.train.loop import load_data
    from fastpost.train.plan import Plan

    data = load_data(
        cfg, folder.load_tokenizer(cfg.model.path), objectives.from_name("dpo"), {"reference_logprob": "start"}
    )
    plan, f = Plan(cfg, data["train"]), Flops(folder.load_model(cfg.model.path))
    exact = sum(f([data["train"].batch(part)]) for step in range(plan.steps) for part in plan.parts(step))
    out = dry(tmp_path, capsys, "--train.epochs", "1")
    assert float(re.search(r"tokens, ([\d.e+]+) FLOPs", out)[1]) == pytest.approx(exact, rel=0.05)


def test_files_of_a_run_in_progress_stay_as_they_are(tmp_path, capsys):
    cfg = runs.recipe(tmp_path)
    assert runs.in_child(runs.killed_at(cfg, checkpoint, "save", 2)) != 0
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "run").rglob("*")}
    assert "(a run: goes on from " in dry(tmp_path, capsys)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "run").rglob("*")} == before


def test_without_weights_the_shapes_go_through(tmp_path, capsys):
    runs.recipe(tmp_path, objective={"name": "simpo"})
    (tmp_path / "model/model.safetensors").unlink()
    out = dry(tmp_path, capsys)
    assert "step    not computed" in out and "memory  weights" in out and "FLOPs" in out


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["--optim.lrr", "1"], "unknown option --optim.lrr"),
        (["--objective.name", "dpoo"], "expected one of"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model.path", "nowhere"], "nowhere"),
        (["--model.reference", "none"], "DPO needs log-probs of a reference"),
    ],
)
def test_what_would_stop_the_run_stops_the_dry_run(tmp_path, capsys, overrides, said):
    runs.recipe(tmp_path)
    assert said in dry(tmp_path, capsys, *overrides, status=1)
    assert not (tmp_path / "run").exists()


def test_somebody_elses_folder(tmp_path, capsys):
    runs.recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("x")
    assert "expected a new folder or one of a run, got" in dry(tmp_path, capsys, status=1)


def test_more_than_there_is_is_said(tmp_path, capsys, monkeypatch):
    runs.recipe(tmp_path)
    monkeypatch.setattr(memory, "available", lambda _: 1e6)
    assert "WARNING: that is more than there is. Lower train.max_tokens_per_micro_batch" in dry(tmp_path, capsys)


def test_live_counts_what_is_alive():
    with memory.Live() as live:
        a = torch.empty(1000, device="meta")
        b = a[:500]
        c = a + 1
        assert live.now == 8000
        del a
        assert live.now == 8000  # b still holds it
        del b
        assert live.now == 4000
        del c
    assert (live.now, live.peak) == (0, 8000)


def test_recomputation_and_precision_show_in_the_estimate(tmp_path):
    from fastpost import objectives
    from fastpost.hf import folder
    from fastpost.train.loop import load_data
    from fastpost.train.plan import Plan

    def guess(*overrides, micro_batches=1):
        cfg = runs.recipe(tmp_path, "--data.eval", "none", *overrides)
        tokenizer = folder.load_tokenizer(cfg.model.path)
        data = load_data(cfg, tokenizer, objectives.from_name("dpo"), {"reference_logprob": "start"})["train"]
        model = memory.shape_model(cfg.model.path, {"fp32": torch.float32}.get(cfg.optim.precision, torch.bfloat16))
        return memory.estimate(model, cfg, data.batch(Plan(cfg, data).rows(0)), micro_batches, torch.device("cpu"))

    how = "--train.gradient_checkpointing"
    none, selective, full = (guess(how, kind) for kind in ("none", "selective", "full"))
    assert none.activations > 1.3 * selective.activations > 1.3 * full.activations > 0
    count = sum(p.numel() for p in tiny.model().parameters())
    assert none.gradients == 2 * count and none.optimizer == 10 * count and count < none.weights / 2 < count + 100
    wide, narrow = guess("--optim.precision", "fp32"), guess("--optim.precision", "pure-bf16")
    assert (wide.gradients, wide.optimizer, narrow.optimizer) == (4 * count, 8 * count, 4 * count)
    assert guess(micro_batches=3).gradients == 4 * count


@pytest.mark.slow
@pytest.mark.parametrize("precision, how", [("bf16", "selective"), ("fp32", "none")])
def test_estimate_against_what_a_run_takes(tmp_path, precision, how):
    """A model of 42 M parameters, in a process of its own: within a quarter of the measured peak."""
    tiny.folder(tmp_path / "model", vocab_size=8192, hidden_size=512, intermediate_size=1536, layers=10,
                num_attention_heads=8, num_key_value_heads=4, head_dim=64)  # fmt: skip
    rows = tiny.preference_rows(24)
    for row in rows:
        for name in ("chosen", "rejected"):
            row[name][0]["content"] *= 6
    tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    how = ["--train.gradient_checkpointing", how, "--optim.precision", precision, "--data.eval", "none"]
    how += ["--train.max_steps", "2", "--train.batch_size", "12", "--train.max_tokens_per_micro_batch", "4000"]
    cfg = runs.recipe(tmp_path, *how, objective={"name": "simpo"})
    assert cfg.train.batch_size == 12

    def measure():
        train(cfg)

    def guess():
        from fastpost.cli import dry_run

        parts = []
        real = memory.estimate
        memory.estimate = lambda *a: parts.append(real(*a)) or parts[0]
        dry_run.fake_step = lambda *a: ""
        dry_run.dry_run(cfg, [])
        (tmp_path / "estimate.json").write_text(json.dumps(parts[0].total))

    assert runs.in_child(guess) == 0 and runs.in_child(measure, 200) == 0
    peak = jsonl.read(tmp_path / "run/timing.jsonl")[-1]["memory/peak_gb"] * 1e9
    estimated = json.loads((tmp_path / "estimate.json").read_text())
    assert 0.75 < estimated / peak < 1.33, (estimated, peak)
    shutil.rmtree(tmp_path / "run")
