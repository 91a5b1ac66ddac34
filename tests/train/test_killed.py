# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at twenty random moments, half of them in the middle of a checkpoint: nothing is lost, the curve is the
same."""

import random
import signal
import time

import pytest
import safetensors.torch
import torch

import launch
import runs
from fastpost.train import checkpoint
from fastpost.train.loop import train


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def slow_disk():
    """Each file of a checkpoint takes a while, so that a kill hits the middle of it."""
    save = safetensors.torch.save

    def slow(*args, **kwargs):
        data = save(*args, **kwargs)
        time.sleep(0.05)
        return data

    safetensors.torch.save = slow


def recipe(tmp, kind, out):
    train = {"output_dir": tmp / out, "epochs": 3, "save_every": 1, "keep_latest": 1, "parallel": kind}
    return runs.recipe(tmp, model={"attention_dropout": 0.2}, train=train)


def kill(cfg, size, draw, in_checkpoint):
    """Start, and kill one rank or all: while a checkpoint is being written, or at a random moment. Whether it still
    ran."""

    def action():
        slow_disk()
        train(cfg)

    run = launch.Forked(action, size)
    folder = checkpoint.Path(cfg.train.output_dir) / "checkpoints"
    moment = time.monotonic() + draw.uniform(0.1, 2.5)
    while run.running() and not any(folder.glob(".unfinished-step-*")) if in_checkpoint else time.monotonic() < moment:
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.1) if in_checkpoint else 0)
    if run.running():
        run.send(signal.SIGKILL, rank=draw.choice([None, *range(size)]) if size > 1 else None)
    # The others leave by themselves once they are connected; before that, and in the end, torchrun would stop them.
    patience = time.monotonic() + 8
    while run.running() and time.monotonic() < patience:
        time.sleep(0.01)
    run.send(signal.SIGKILL)
    return -signal.SIGKILL in run.wait()


@pytest.mark.slow
@pytest.mark.parametrize("kind,size,kills", [("auto", 1, 10), ("ddp", 2, 5), ("fsdp", 2, 5)])
def test_killed_at_random_moments(tmp_path, kind, size, kills):
    assert launch.Forked(lambda: train(recipe(tmp_path, kind, "unbroken")), size).wait() == [0] * size
    draw, done, run, newest = random.Random(kind), 0, 0, 0
    while done < kills:
        cut = recipe(tmp_path, kind, f"cut{run}")
        if kill(cut, size, draw, in_checkpoint=done % 2 == 0):
            done += 1
            complete = [int(p.name[5:]) for p in checkpoint.checkpoints(tmp_path / f"cut{run}/checkpoints")]
            assert max(complete, default=0) >= newest, "a finished checkpoint was lost"
            newest = max(complete, default=0)
        else:  # it was over before the moment came
            run, newest = run + 1, 0
    assert launch.Forked(lambda: train(cut), size).wait() == [0] * size
    for i in range(run + 1):
        assert runs.outcome(tmp_path / f"cut{i}") == runs.outcome(tmp_path / "unbroken")
        assert not [p for p in (tmp_path / f"cut{i}").rglob("*") if "unfinished" in p.name]
