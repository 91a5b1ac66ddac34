# SPDX-License-Identifier: Apache-2.0
import json

import pytest

import tiny
from fastpost import cli


@pytest.fixture
def recipe(tmp_path):
    def write(rows, template=tiny.CHATML, objective="simpo", **data):
        tiny.folder(tmp_path / "model", template=template)
        train = tiny.write_jsonl(tmp_path / "train.jsonl", rows)
        return tiny.recipe(
            tmp_path / "r.yaml", model={"path": tmp_path / "model"}, data={"train": train, **data},
            objective={"name": objective},
        )  # fmt: skip

    return write


def test_shows_what_the_model_will_see(recipe, capsys, tmp_path):
    rows = tiny.preference_rows(8)
    rows[3]["prompt"][0]["content"] = "x" * 80
    path = recipe(rows, max_length=64)
    assert cli.main(["data", str(path)]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == f"{tmp_path}/train.jsonl  (preference)"
    assert lines[1] == "rows 8 (kept 7, dropped 1: prompt fills max_length 1)"
    assert lines[2].startswith("tokens ") and "p50 " in lines[2] and "max " in lines[2] and "%)" in lines[2]
    assert "BOS 0 a sequence   end of turn <|im_end|> trained in 14/14   template " in lines[3]
    shown = "\n".join(lines[4:])
    assert shown.count("row ") == 6 and "row 0 chosen (" in shown and "row 2 rejected (" in shown
    answer = rows[0]["chosen"][0]["content"]
    assert f"<|im_start|>assistant\n  [[{answer}<|im_end|>]]" in shown


def test_colour_on_a_terminal(recipe, capsys, monkeypatch):
    monkeypatch.setattr("fastpost.cli.data.colour", lambda: True)
    cli.main(["data", str(recipe(tiny.preference_rows(2)))])
    out = capsys.readouterr().out
    assert "\033[1;32m" in out and "[[" not in out


def test_held_out_rows_and_overrides(recipe, capsys, tmp_path):
    held_out = tiny.write_jsonl(tmp_path / "eval.jsonl", tiny.preference_rows(5, seed=1))
    assert cli.main(["data", str(recipe(tiny.preference_rows(4))), "--data.eval", str(held_out)]) == 0
    out = capsys.readouterr().out
    assert "rows 4 (kept 4" in out and f"{held_out}  (preference)\nrows 5 (kept 5, dropped 0)" in out


def test_warns_when_turns_end_where_generation_does_not_stop(recipe, capsys, tmp_path):
    path = recipe(tiny.preference_rows(2), template=tiny.LLAMA3)
    cli.main(["data", str(path)])
    assert "warning: turns end with <|eot|>, but generation stops at <|im_end|>" in capsys.readouterr().out
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, 5]}))
    cli.main(["data", str(path)])
    assert "warning" not in capsys.readouterr().out


def test_warns_when_no_end_of_turn_is_trained(recipe, capsys):
    endless = "{% for m in messages %}\n{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    endless += "{% if add_generation_prompt %}\nassistant: {% endif %}"
    cli.main(["data", str(recipe(tiny.preference_rows(2), template=endless))])
    assert "warning: no sequence trains a token that ends a turn" in capsys.readouterr().out


@pytest.mark.parametrize(
    "template, objective, expected",
    [
        (tiny.NO_GENERATION_PROMPT, "simpo", "train.jsonl:1: the chat template has no generation prompt"),
        (tiny.CHATML, "kto", "train.jsonl:1: column 'completion' is missing"),
        (tiny.CHATML, "simpoo", "expected one of"),
    ],
)
def test_mistakes(recipe, capsys, template, objective, expected):
    assert cli.main(["data", str(recipe(tiny.preference_rows(2), template, objective))]) == 1
    out, err = capsys.readouterr()
    assert expected in err and err.startswith("fastpost: ") and err.count("\n") == 1 and out == ""
