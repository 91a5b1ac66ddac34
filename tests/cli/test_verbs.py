# SPDX-License-Identifier: Apache-2.0
"""train, eval, generate, plot and export through the command line."""

import io
import json

import pytest
import torch

import tiny
from fastpost.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of 50 steps and its recipe."""
    tmp = tmp_path_factory.mktemp("verbs")
    tiny.folder(tmp / "model")
    tiny.write_jsonl(tmp / "train.jsonl", tiny.preference_rows(10))
    tiny.write_jsonl(tmp / "eval.jsonl", tiny.preference_rows(6, seed=7))
    tiny.recipe(
        tmp / "recipe.yaml",
        model={"path": tmp / "model"},
        data={"train": tmp / "train.jsonl", "eval": tmp / "eval.jsonl"},
        objective={"name": "simpo"},
        optim={"lr": 1e-3},
        train={
            "output_dir": tmp / "run",
            "epochs": 25,
            "batch_size": 5,
            "save_every": 20,
            "threads": torch.get_num_threads(),
        },
    )
    assert main(["train", str(tmp / "recipe.yaml")]) == 0
    return tmp


def test_train_draws_a_picture(run):
    picture = (run / "run/loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_train_help_and_mistakes(run, capsys):
    assert main(["train", "--help"]) == 0
    assert "--optim.lr" in capsys.readouterr().out
    assert main(["train", str(run / "recipe.yaml"), "--optim.lr", "1"]) == 1
    assert "optim.lr is 0.001 there, 1.0 now" in capsys.readouterr().err


def test_eval(run, capsys):
    assert main(["eval", str(run / "recipe.yaml"), "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert main(["eval", str(run / "recipe.yaml"), "--json", "--model", str(run / "run/model")]) == 0
    after = json.loads(capsys.readouterr().out)
    assert before["rows"] == after["rows"] == 6
    assert after["loss"] < before["loss"] and after["rewards/margins"] > before["rewards/margins"]
    assert main(["eval", str(run / "recipe.yaml")]) == 0
    assert "rewards/accuracies" in capsys.readouterr().out
    assert main(["eval", str(run / "recipe.yaml"), "--model"]) == 1


def test_eval_with_a_reference_starts_at_the_closed_form(run, capsys):
    assert main(["eval", str(run / "recipe.yaml"), "--json", "--objective.name", "ipo"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(25.0)


def test_generate(run, capsys, monkeypatch):
    short = ["--max-new-tokens", "5", "--dtype", "fp32"]
    assert main(["generate", str(run / "run"), "What is 2 + 3?", "--prompt", "Hello", *short, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["prompt"] for r in rows] == ["What is 2 + 3?", "Hello"] and all(len(r["answers"]) == 1 for r in rows)
    assert main(["generate", str(run / "model"), "--file", str(run / "eval.jsonl"), "--limit", "2", *short]) == 0
    assert capsys.readouterr().out.count("> What is") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert main(["generate", str(run / "model"), "--temperature", "1", "--samples", "3", *short, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["prompt"] for r in rows] == ["one", "two"] and all(len(r["answers"]) == 3 for r in rows)


def test_generate_mistakes(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["generate", str(run / "model")]) == 1
    assert "no prompt" in capsys.readouterr().err
    (run / "broken.jsonl").write_text('{"prompt": "x"}\n{"question": "y"}\n')
    assert main(["generate", str(run / "model"), "--file", str(run / "broken.jsonl")]) == 1
    assert "broken.jsonl:2: expected an object with 'prompt'" in capsys.readouterr().err


def test_plot_one_and_several(run, capsys):
    out = run / "both.png"
    assert main(["plot", str(run / "run"), str(run / "run"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(run / "model")]) == 1
    assert "expected a run folder with metrics.jsonl" in capsys.readouterr().err


def test_export(run, capsys):
    assert main(["export", str(run / "run"), str(run / "out"), "--step", "40", "--dtype", "bf16"]) == 0
    assert main(["generate", str(run / "out"), "Hello", "--max-new-tokens", "2"]) == 0
    assert main(["export", str(run / "run"), str(run / "out")]) == 1
    assert "not empty" in capsys.readouterr().err
