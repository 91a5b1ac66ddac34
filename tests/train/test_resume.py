# SPDX-License-Identifier: Apache-2.0
"""An interrupted run, started again, is the unbroken run bit for bit: metrics.jsonl and the final weights."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

import runs
from fastpost.hf import folder
from fastpost.train import checkpoint, loop, metrics, run_folder
from fastpost.train.loop import train
from fastpost.train.optim import AdamW


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 250e3)  # two files a checkpoint
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run that every other must equal. Dropout is on, so the random state matters too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tmp = tmp_path_factory.mktemp("unbroken")
    cfg = runs.recipe(tmp, model={"attention_dropout": 0.2})
    train(cfg)
    torch.set_num_threads(before)
    return tmp


def copy_of(unbroken, tmp_path):
    """The same recipe with a run folder of its own."""
    return runs.recipe(unbroken, "--train.output_dir", str(tmp_path / "run"), model={"attention_dropout": 0.2})


def test_the_unbroken_run_uses_its_random_state(unbroken, tmp_path):
    other = runs.recipe(tmp_path, "--optim.lr", "1e-3", model={"attention_dropout": 0.0})
    train(other)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() != (unbroken / "run/metrics.jsonl").read_bytes()
    rows = metrics.read(unbroken / "run/metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows if "eval_loss" in r] == [0, 4, 6]


POINTS = {
    "before step 1": (loop, "train_step", 1, False),  # no checkpoint yet: starts from zero
    "after step 2, unsaved": (loop, "train_step", 2, True),
    "in step 3, end of epoch 0": (loop, "train_step", 3, False),
    "in step 4, epoch 1": (loop, "train_step", 4, True),
    "in step 6, the last": (loop, "train_step", 6, True),
    "in the reference pass": (loop.reference, "save_file", 1, False),
    "in an evaluation": (loop, "evaluate", 2, False),
    "first checkpoint, nothing written": (safetensors.torch, "save", 1, False),
    "first checkpoint, half written": (safetensors.torch, "save", 2, False),
    "first checkpoint, before the rename": (checkpoint.os, "rename", 1, False),
    "first checkpoint, after the rename": (checkpoint.os, "rename", 1, True),
    "second checkpoint, half written": (safetensors.torch, "save", 4, False),
    "deleting the first checkpoint": (checkpoint.shutil, "rmtree", 1, False),
    "writing the final model": (folder, "save_file", 1, True),
    "writing config.yaml": (run_folder.checkpoint.os, "replace", 1, False),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_started_again(unbroken, tmp_path, point):
    module, name, call, after = POINTS[point]
    cfg = copy_of(unbroken, tmp_path)
    cfg.train.keep_latest = 1
    assert runs.in_child(runs.killed_at(cfg, module, name, call, after=after)) == -signal.SIGKILL
    assert not (tmp_path / "run/model").exists()
    train(cfg)
    assert runs.outcome(tmp_path / "run") == runs.outcome(unbroken / "run")
    left = [p.name for p in (tmp_path / "run").rglob("*") if "unfinished" in p.name or "partial" in p.name]
    assert left == []
    assert len(checkpoint.checkpoints(tmp_path / "run/checkpoints")) == 1


def test_killed_again_and_again(unbroken, tmp_path):
    """Two steps further each time, torn lines in between."""
    cfg = copy_of(unbroken, tmp_path)
    for _ in range(2):
        assert runs.in_child(runs.killed_at(cfg, loop, "train_step", 3)) == -signal.SIGKILL
        for name in ("metrics.jsonl", "timing.jsonl"):
            with open(tmp_path / "run" / name, "a") as file:
                file.write('{"step": 99, "lo')
    train(cfg)
    assert runs.outcome(tmp_path / "run") == runs.outcome(unbroken / "run")


@pytest.mark.parametrize("precision", ["pure-bf16", "fp32"])
def test_the_other_precisions(tmp_path, precision):
    whole = runs.recipe(tmp_path, "--optim.precision", precision)
    train(whole)
    cut = runs.recipe(tmp_path, "--optim.precision", precision, "--train.output_dir", str(tmp_path / "cut"))
    assert runs.in_child(runs.killed_at(cut, loop, "train_step", 4)) == -signal.SIGKILL
    train(cut)
    assert runs.outcome(tmp_path / "cut") == runs.outcome(tmp_path / "run")


def test_killed_from_outside_through_the_command_line(unbroken, tmp_path):
    copy_of(unbroken, tmp_path)  # writes the recipe
    command = [
        sys.executable,
        "-m",
        "fastpost",
        "train",
        str(unbroken / "recipe.yaml"),
        "--train.output_dir",
        str(tmp_path / "run"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    log, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert runs.outcome(tmp_path / "run") == runs.outcome(unbroken / "run")


def test_a_finished_run_is_left_alone(unbroken, capsys):
    before = runs.outcome(unbroken / "run")
    train(runs.recipe(unbroken))
    assert "is finished" in capsys.readouterr().out
    assert runs.outcome(unbroken / "run") == before


# ---- a disk that fails ---------------------------------------------------------------------------------------------


def run_until_the_disk_fails(cfg, breaks):
    """Train in a child whose `breaks()` makes writing fail; returns the message of the error."""
    message = cfg.train.output_dir + ".message"

    def action():
        breaks()
        try:
            train(cfg)
        except checkpoint.CheckpointError as error:
            with open(message, "w") as file:
                file.write(str(error))

    assert runs.in_child(action) == 0
    return open(message).read()


def test_full_disk_in_the_second_checkpoint(unbroken, tmp_path):
    cfg = copy_of(unbroken, tmp_path)

    def breaks():
        calls = 0

        save = safetensors.torch.save

        def full(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 4:  # the second file of the second checkpoint
                raise OSError(28, "No space left on device")
            return save(*args, **kwargs)

        safetensors.torch.save = full

    message = run_until_the_disk_fails(cfg, breaks)
    first = tmp_path / "run/checkpoints/step-000002"
    assert "[checkpoint] step 4: could not write" in message and "No space left on device" in message
    assert f"The previous one, {first}, is untouched" in message and "same command again" in message
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]
    train(cfg)  # there is space now
    assert runs.outcome(tmp_path / "run") == runs.outcome(unbroken / "run")


def test_a_write_that_really_fails(unbroken, tmp_path):
    """The kernel refuses to let any file grow past 20 kB, so the first checkpoint cannot be written."""
    cfg = copy_of(unbroken, tmp_path)

    def breaks():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    message = run_until_the_disk_fails(cfg, breaks)
    assert "[checkpoint] step 2: could not write" in message and "There is no earlier one" in message
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    train(cfg)
    assert runs.outcome(tmp_path / "run") == runs.outcome(unbroken / "run")


def test_space_warning(unbroken, monkeypatch, tmp_path):
    model = folder.load_model(unbroken / "model", torch.float32)
    optimizer = AdamW(model)
    assert checkpoint.space_warning(tmp_path, model, optimizer) is None
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "saving will fail" in checkpoint.space_warning(tmp_path, model, optimizer)


# ---- checkpoints that do not fit -----------------------------------------------------------------------------------


@pytest.fixture
def saved(unbroken, tmp_path):
    model = folder.load_model(unbroken / "model", torch.float32)
    optimizer = AdamW(model)
    return checkpoint.save(tmp_path, 3, model, optimizer), model, optimizer


def test_no_pickle_in_a_checkpoint(saved):
    files = sorted(p.name for p in saved[0].iterdir())
    assert files == [*(f"shard-00001-model-0000{i}-of-00002.safetensors" for i in (1, 2)), "state.json"]


def damage(path, name, change):
    """Rewrite the file that holds tensor `name` with change(tensors) and the header it had."""
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            with safetensors.safe_open(file, "pt") as opened:
                header = opened.metadata()
            safetensors.torch.save_file(change(tensors), file, header)
            return
    raise AssertionError(name)


def test_damaged_checkpoint_is_named(saved):
    path, model, optimizer = saved
    file = path / "shard-00001-model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        checkpoint.CheckpointError, match=r"step-000003: cannot be loaded: .*Delete that folder to go on"
    ):
        checkpoint.load(path, model, optimizer)
    file.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"step-000003: cannot be loaded: it lacks"):
        checkpoint.load(path, model, optimizer)


def test_checkpoint_of_another_model_is_refused(saved):
    path, model, optimizer = saved
    name = "model.model.norm.weight"
    damage(path, name, lambda tensors: tensors | {name: tensors[name].float()})
    with pytest.raises(
        checkpoint.CheckpointError, match=r"model.norm.weight: expected bfloat16 \[32\], got float32 \[32\]"
    ):
        checkpoint.load(path, model, optimizer)
    damage(path, name, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(checkpoint.CheckpointError, match=r"lacks 'model.model.norm.weight' \(1 in all\)"):
        checkpoint.load(path, model, optimizer)


def test_newer_format_is_refused(saved):
    path, model, optimizer = saved
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(checkpoint.CheckpointError, match="format 99, this version reads 2"):
        checkpoint.load(path, model, optimizer)
