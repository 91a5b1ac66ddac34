# SPDX-License-Identifier: Apache-2.0
"""One loss curve through the command line, however rows are split over micro-batches, ranks and interruptions."""

import os
import random
import signal
import subprocess

import pytest
import torch

import launch
import runs
from fastpost.train import metrics

SPLITS = {
    "1 x 8": (1, ["--train.max_tokens_per_micro_batch", "100000"]),
    "8 x 1": (1, ["--train.micro_batch_size", "1"]),
    "2 x 4": (1, ["--train.micro_batch_size", "4"]),
    "packed": (1, ["--train.max_tokens_per_micro_batch", "300"]),
    "ddp": (2, ["--train.micro_batch_size", "4", "--train.parallel", "ddp"]),
    "fsdp": (2, ["--train.micro_batch_size", "4", "--train.parallel", "fsdp"]),
}


@pytest.mark.slow
def test_one_curve(tmp_path):
    """fp32: rounding alone. "ddp" and "fsdp" add the same two micro-batches as "2 x 4": their steps are its bits.
    bf16, for two of them: zero-mean noise."""
    runs.recipe(tmp_path, rows=24, optim={"lr": 1e-3, "precision": "fp32", "max_grad_norm": None},
                train={"save_every": 0, "eval_every": 0})  # fmt: skip
    curves = {}
    for name, (ranks, overrides) in SPLITS.items():
        run = tmp_path / name.replace(" ", "")
        launch.run(launch.torchrun(tmp_path / "recipe.yaml", *overrides, "--train.output_dir", str(run), ranks=ranks))
        curves[name] = launch.losses(run)
    for name, curve in curves.items():
        residual = curve - curves["1 x 8"]
        assert len(residual) == 6 and residual.abs().max() < 2e-6, f"{name}: {residual}"
    for name in ("ddp", "fsdp"):
        assert (curves[name] - curves["2 x 4"]).abs().max() < 1e-15, name
    assert curves["1 x 8"][-1] < 0.6 * curves["1 x 8"][0]


@pytest.mark.slow
def test_stopped_by_the_scheduler_and_resumed_at_a_random_step(tmp_path):
    """SIGTERM to torchrun, as a batch system sends it; one line says what was done, and the rest is as if nothing had
    happened. The second start has other ranks."""
    runs.recipe(tmp_path, model={"attention_dropout": 0.1}, train={"save_every": 0, "eval_every": 0, "epochs": 6})
    at = random.Random(7).randint(3, 9)

    def command(out, ranks, *overrides):
        where = ["--train.output_dir", str(tmp_path / out)]
        return launch.torchrun(tmp_path / "recipe.yaml", *where, *overrides, ranks=ranks)

    process = subprocess.Popen(
        command("cut", 2, "--train.parallel", "fsdp"), env=launch.environment(), stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    launch.wait_for_step(tmp_path / "cut", at, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    done = len(launch.losses(tmp_path / "cut"))
    assert process.returncode and f"stopped after step {done}/18; the same command goes on from there" in out
    assert at <= done < 18 and os.listdir(tmp_path / "cut/checkpoints") == [f"step-{done:06d}"]
    out = launch.run(command("cut", 2, "--train.parallel", "fsdp"))
    assert "resume from" in out and "written by" not in out
    launch.run(command("whole", 2, "--train.parallel", "fsdp"))
    assert runs.outcome(tmp_path / "cut") == runs.outcome(tmp_path / "whole")


@pytest.mark.slow
def test_a_mistake_is_said_once_under_torchrun(tmp_path):
    runs.recipe(tmp_path)
    for overrides, message in (
        (["--data.train", "none.jsonl"], "got none.jsonl, and there is no such file."),
        (["--train.paralel", "ddp"], "fastpost: command line: unknown option --train.paralel. Did you mean"),
        (["--train.parallel", "tp"], "expected one of auto, ddp, fsdp; got 'tp'"),
    ):
        done = subprocess.run(
            launch.torchrun(tmp_path / "recipe.yaml", *overrides), env=launch.environment(), capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode and done.stderr.count(message) == 1, done.stderr


def test_the_torchrun_line_for_idle_gpus(tmp_path, monkeypatch, capsys):
    """Several GPUs and one process: it says how to use them, and goes on with one."""
    from fastpost.cli import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    runs.recipe(tmp_path)
    monkeypatch.setattr("fastpost.train.loop.train", lambda cfg: None)
    assert main(["train", str(tmp_path / "recipe.yaml"), "--objective.beta", "0.2"]) == 0
    line = f"torchrun --nproc-per-node 4 -m fastpost train {tmp_path / 'recipe.yaml'} --objective.beta 0.2"
    assert f"4 GPUs are visible and one is used. For all of them: {line}" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "recipe.yaml"), "--train.device", "cpu"]) == 0
    assert "torchrun" not in capsys.readouterr().out


def test_a_gpu_for_each_rank(monkeypatch):
    from fastpost.train.device import pick_device
    from fastpost.train.distributed import Ranks

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert pick_device("auto", Ranks(5, 8, local=1)) == torch.device("cuda:1")
    assert pick_device("auto") == torch.device("cuda") and pick_device("cpu", Ranks(5, 8, 2)) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"got 2 GPUs and a process number 3. Start fewer with --nproc-per-node"):
        pick_device("cuda", Ranks(5, 8, local=2))
    assert metrics.NoLog().anything(1, key=2) is None
