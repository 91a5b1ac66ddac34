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
    assert lines[2] == f"  prompt fills max_length: {tmp_path}/train.jsonl:4"
    assert lines[3].split() == ["tokens", "min", "p5", "p50", "p95", "max"]
    table = {name: list(map(int, numbers)) for name, *numbers in map(str.split, lines[4:8])}
    assert list(table) == ["sequence", "prompt", "chosen", "rejected"]
    assert all(values == sorted(values) for values in table.values())
    assert table["sequence"][0] >= table["prompt"][0] + table["rejected"][0] and table["sequence"][-1] <= 64
    assert lines[8].startswith("tokens ") and "%)   truncated 0   dropped 1   empty replies 0   ident" in lines[8]
    assert "BOS 0 a sequence   end of turn <|im_end|> trained in 14/14   template " in lines[9]
    shown = "\n".join(lines[10:])
    assert shown.count("row ") == 6 and "row 0 chosen (" in shown and "row 2 rejected (" in shown
    answer = rows[0]["chosen"][0]["content"]
    assert f"<|im_start|>assistant\n  [[{answer}<|im_end|>]]" in shown
    ids = next(line for line in shown.split("\n") if line.startswith("  ids ")).split()
    assert ids[0] == "ids" and ids[9] == "..." and len(ids) == 18 and ids[1] == "1" and ids[-1] == "2"


def test_how_many_rows(recipe, capsys):
    path = str(recipe(tiny.preference_rows(6)))
    for arguments, rows in ((["--rows", "5"], 5), (["--rows=0"], 0), (["--rows", "99", "--data.limit", "4"], 4)):
        assert cli.main(["data", path, *arguments]) == 0
        assert capsys.readouterr().out.count("chosen (") == rows
    for arguments, message in (
        (["--rows", "-1"], "--rows: expected a whole number from 0 up, got '-1'"),
        (["--rows"], "--rows has no value. Write --rows VALUE."),
        (["--html", "/nowhere/x.html"], "--html /nowhere/x.html: No such file or directory. Name a file in a folder"),
    ):
        assert cli.main(["data", path, *arguments]) == 1
        assert message in capsys.readouterr().err


def test_what_was_translated_and_where_tokens_merge(recipe, capsys):
    rows = [{"instruction": f"{i}?", "output": ["b", "c"]} for i in range(3)]
    cli.main(["data", str(recipe(rows))])
    out = capsys.readouterr().out
    note = "note: columns instruction, input, output (alpaca) are read as prompt, chosen, rejected as a chat\n"
    assert out.count("note:") == 1 and note in out
    cli.main(["data", str(recipe([{"prompt": "The ", "chosen": "answer", "rejected": "x"}]))])
    assert "note: 1 sequences would share a token between prompt and reply" in capsys.readouterr().out


def test_empty_replies_are_counted(recipe, capsys):
    rows = tiny.preference_rows(3)
    rows[1]["rejected"][0]["content"] = ""
    cli.main(["data", str(recipe(rows))])
    assert "empty replies 1 " in capsys.readouterr().out


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
