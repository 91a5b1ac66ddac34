# SPDX-License-Identifier: Apache-2.0
"""Complaint 8: the assistant mask is all zero and nobody says so.

The mistakes: a mask from {% generation %} marks that the template has not; rows without a trained token that stay."""

import pytest

import tiny
from fastpost import cli, objectives
from fastpost.data.loader import load_dataset
from fastpost.train.config import DataConfig


def chat(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def load(tmp_path, rows, template=tiny.CHATML, objective=None, **options):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    return load_dataset(DataConfig(train=str(path), **options), tiny.tokenizer(template), objective)


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.LLAMA3])
@pytest.mark.parametrize("mask", ["reply", "last", "turn", "full"])
def test_every_row_trains_something_without_generation_marks(tmp_path, template, mask):
    assert "generation %" not in template
    data = load(tmp_path, tiny.sft_rows(6), template, mask=mask)
    assert len(data) == 6
    for i in range(6):
        assert any(data.examples[i].sequences[0].trained) and data.batch([i]).scored > 0


def test_rows_without_a_reply_are_dropped_and_counted(tmp_path):
    rows = [
        chat(("user", "a"), ("assistant", "b")),
        chat(("user", "a")),
        chat(("system", "s"), ("user", "a")),
        chat(("assistant", "b"), ("user", "a")),
    ]
    data = load(tmp_path, rows)
    assert data.report.line() == "rows 4 (kept 1, dropped 3: no assistant turn 2, begins with the assistant 1)"
    assert data.report.dropped_at["no assistant turn"] == [f"{tmp_path}/d.jsonl:2", f"{tmp_path}/d.jsonl:3"]
    assert [e.row for e in data.examples] == [0]
    assert load(tmp_path, [{"text": ""}, {"text": "ab"}]).report.dropped == {"nothing to train": 1}
    assert load(tmp_path, [{"text": ""}, {"text": "ab"}], mask="full").report.dropped == {"nothing to train": 1}


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"every row was dropped: rows 2 \(kept 0, dropped 2: no assistant turn 2\)"):
        load(tmp_path, [chat(("user", "a")), chat(("user", "b"))])


def test_a_pair_is_dropped_whole(tmp_path):
    rows = tiny.preference_rows(2)
    rows[0] = {"chosen": rows[0]["prompt"], "rejected": rows[0]["prompt"] + rows[0]["rejected"]}
    data = load(tmp_path, rows, objective=objectives.DPO())
    assert data.report.dropped == {"chosen or rejected is the beginning of the other": 1} and len(data) == 1


def test_the_share_of_trained_tokens_is_shown(tmp_path, capsys):
    tiny.folder(tmp_path / "model")
    train = tiny.write_jsonl(tmp_path / "d.jsonl", [*tiny.sft_rows(3), chat(("user", "a"))])
    recipe = tiny.recipe(tmp_path / "r.yaml", model={"path": tmp_path / "model"}, data={"train": train})
    assert cli.main(["data", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "dropped 1: no assistant turn 1" in out and f"no assistant turn: {train}:4" in out and "[[" in out
    assert "   trained " in out and "%)" in out
