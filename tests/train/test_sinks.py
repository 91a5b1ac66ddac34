# SPDX-License-Identifier: Apache-2.0
"""TensorBoard for real where it is installed; wandb and trackio by stand-ins with their call names, so that no test
needs a login or a network. What was tried with the packages themselves is in the stand-ins' behaviour: wandb drops a
step below its own, trackio keeps every row it is sent."""

import builtins
import json
import sys
import types

import pytest

import runs
from fastpost.cli import main
from fastpost.train import checkpoint, jsonl, sinks
from fastpost.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def fakes(monkeypatch):
    """Modules wandb and trackio that write down what they are asked."""
    seen = {"init": [], "log": [], "finish": []}

    class Run:
        def __init__(self, kind):
            self.kind = kind

        def log(self, values, step):
            seen["log"].append((self.kind, step, values))

        def finish(self, exit_code=None):
            seen["finish"].append((self.kind, exit_code))

    def module(kind, **extra):
        made = types.ModuleType(kind)
        made.__spec__ = types.SimpleNamespace()

        def init(**options):
            seen["init"].append((kind, options))
            return Run(kind)

        made.init = init
        vars(made).update(extra)
        monkeypatch.setitem(sys.modules, kind, made)
        return made

    seen["wandb"] = module("wandb", Settings=dict, login=lambda prompt: False)
    seen["trackio"] = module("trackio")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a tracker asked a question"))
    return seen


def events(run):
    """{tag: [(step, value)]} as TensorBoard itself reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def same(points, rows, key):
    wanted = [(r["step"], r[key]) for r in rows if key in r]
    assert [s for s, _ in points] == [s for s, _ in wanted]
    assert [v for _, v in points] == pytest.approx([v for _, v in wanted], rel=1e-6)


def test_tensorboard_has_every_number_under_trls_names(tmp_path):
    pytest.importorskip("tensorboard")
    train(runs.recipe(tmp_path, "--log.to", "tensorboard"))
    rows, found = jsonl.read(tmp_path / "run/metrics.jsonl"), events(tmp_path / "run")
    for key in ("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "learning_rate", "num_tokens"):
        same(found[f"train/{key}"], rows, key)
    for key in ("loss", "rewards/margins"):
        same(found[f"eval/{key}"], rows, f"eval_{key}")
    same(found["train/tps"], jsonl.read(tmp_path / "run/timing.jsonl"), "tps")


def test_tensorboard_after_a_kill_has_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    cfg = runs.recipe(tmp_path, "--log.to", "[tensorboard]", "--train.save_every", "3")
    assert runs.in_child(runs.killed_at(cfg, checkpoint, "save", 1)) != 0  # before a checkpoint: from the beginning
    train(cfg)
    same(events(tmp_path / "run")["train/loss"], jsonl.read(tmp_path / "run/metrics.jsonl"), "loss")


def interrupted(tmp_path, monkeypatch, *overrides):
    """A run that dies after five steps with a checkpoint of two, in this process, and is then resumed."""
    from fastpost.train import loop

    cfg = runs.recipe(tmp_path, *overrides, "--train.save_every", "2")
    real, calls = loop.train_step, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise OSError("the power went")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dies)
        with pytest.raises(OSError):
            train(cfg)
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run/checkpoints")] == ["step-000002"]
    return cfg


def test_tensorboard_resumed_from_a_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    cfg = interrupted(tmp_path, monkeypatch, "--log.to", "tensorboard")
    assert [s for s, _ in events(tmp_path / "run")["train/loss"]] == [1, 2, 3]
    train(cfg)
    same(events(tmp_path / "run")["train/loss"], jsonl.read(tmp_path / "run/metrics.jsonl"), "loss")


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_run_and_sends_each_step_once(tmp_path, monkeypatch, fakes, kind):
    cfg = interrupted(tmp_path, monkeypatch, "--log.to", kind, "--log.project", "mine")
    train(cfg)
    (_, first), (_, second) = fakes["init"]
    assert first["name"] == second["name"] and first["name"].startswith("run-") and first["project"] == "mine"
    assert first["resume"] == second["resume"] == "allow" and first["config"]["optim"]["lr"] == 1e-3
    if kind == "wandb":
        assert first["id"] == second["id"] == json.loads((tmp_path / "run/tracking.json").read_text())["id"]
        assert first["dir"] == str(tmp_path / "run")
    rows = jsonl.read(tmp_path / "run/metrics.jsonl")
    assert [(s, "train/loss" in v) for _, s, v in fakes["log"]] == [(r["step"], "loss" in r) for r in rows]
    sent = [v["train/loss"] for _, _, v in fakes["log"] if "train/loss" in v]
    assert sent == [r["loss"] for r in rows if "loss" in r]
    codes = [1, 0] if kind == "wandb" else [None, None]
    assert fakes["finish"] == [(kind, code) for code in codes]


def test_trackio_gets_what_a_kill_made_it_lose(tmp_path, monkeypatch, fakes):
    """It writes from a thread, half a second late: its own count of steps says what is missing."""
    cfg = interrupted(tmp_path, monkeypatch, "--log.to", "trackio")
    fakes["log"][:] = [entry for entry in fakes["log"] if entry[1] <= 1]  # the rest never arrived
    init = fakes["trackio"].init

    def resumed(**options):
        run = init(**options)
        run._next_step = 2
        return run

    fakes["trackio"].init = resumed
    train(cfg)
    rows = jsonl.read(tmp_path / "run/metrics.jsonl")
    assert [(s, "train/loss" in v) for _, s, v in fakes["log"]] == [(r["step"], "loss" in r) for r in rows]
    assert [v["train/loss"] for _, _, v in fakes["log"] if "train/loss" in v] == [
        r["loss"] for r in rows if "loss" in r
    ]
    assert all("train/tps" in v for _, _, v in fakes["log"] if "train/loss" in v)


def test_two_folders_of_one_name_are_two_runs(tmp_path, fakes):
    for place in ("a", "b"):
        train(runs.recipe(tmp_path, "--log.to", "trackio", "--train.output_dir", str(tmp_path / place / "run"),
                          "--train.max_steps", "1"))  # fmt: skip
    names = [options["name"] for _, options in fakes["init"]]
    assert len(set(names)) == 2 and all(n.startswith("run-") for n in names)


def test_wandb_without_a_login_stays_offline_and_says_so(tmp_path, fakes, capsys, monkeypatch):
    train(runs.recipe(tmp_path, "--log.to", "wandb", "--train.max_steps", "1"))
    assert fakes["init"][0][1]["mode"] == "offline"
    assert "wandb  not logged in: kept offline in " in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ValueError, match=r"expected a login for wandb because WANDB_MODE is online, got none. Run"):
        train(runs.recipe(tmp_path, "--log.to", "wandb", "--train.output_dir", str(tmp_path / "other")))
    monkeypatch.setenv("WANDB_MODE", "disabled")  # the user's own word goes
    train(runs.recipe(tmp_path, "--log.to", "wandb", "--train.output_dir", str(tmp_path / "third"),
                      "--train.max_steps", "1"))  # fmt: skip
    assert fakes["init"][-1][1]["mode"] == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    fakes["wandb"].login = lambda prompt: True
    train(runs.recipe(tmp_path, "--log.to", "wandb", "--train.output_dir", str(tmp_path / "fourth"),
                      "--train.max_steps", "1"))  # fmt: skip
    assert fakes["init"][-1][1]["mode"] is None


def test_a_tracker_that_breaks_does_not_take_the_run_with_it(tmp_path, fakes, capsys):
    train(runs.recipe(tmp_path, train={"save_every": 0}))
    plain = runs.outcome(tmp_path / "run")

    class Broken:
        def log(self, values, step):
            raise ConnectionError("no route to host")

        def finish(self):
            raise AssertionError("it was dropped")

    fakes["trackio"].init = lambda **_: Broken()
    cfg = runs.recipe(tmp_path, "--log.to", "[trackio, wandb]", "--train.output_dir", str(tmp_path / "b"),
                      train={"save_every": 0})  # fmt: skip
    train(cfg)
    err = capsys.readouterr().err
    assert err.count("WARNING: trackio failed and is left out from here on: ConnectionError: no route to host") == 1
    assert runs.outcome(tmp_path / "b") == plain
    assert len(fakes["log"]) == len(jsonl.read(tmp_path / "b/metrics.jsonl"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_said_before_any_weight_is_read(tmp_path, monkeypatch, capsys, name):
    from fastpost.hf import folder

    runs.recipe(tmp_path)
    monkeypatch.setattr(sinks, "find_spec", lambda _: None)
    monkeypatch.setattr(folder, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--log.to", name]) == 1
    err = capsys.readouterr().err
    assert f"log.to: expected installed packages, got {name}" in err and f"pip install {name};" in err


def test_unknown_tracker(tmp_path):
    with pytest.raises(
        ValueError, match=r"log.to\[1\]: expected one of tensorboard, wandb, trackio; got 'wandbb'. Did"
    ):
        runs.recipe(tmp_path, "--log.to", "[trackio, wandbb]")
