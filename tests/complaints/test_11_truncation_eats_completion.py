# SPDX-License-Identifier: Apache-2.0
"""Complaint 11: a long prompt leaves no room for the reply, and the loss is zero or NaN.

The mistakes: such rows stay in the batch; nobody counts what was cut."""

import json
import math

import pytest

import tiny
from fastpost.data.loader import load_dataset
from fastpost.train.config import DataConfig
from fastpost.train.loop import train
from train import runs


def rows_with(prompt: str, where: int = 1, count: int = 6) -> list[dict]:
    rows = tiny.preference_rows(count)
    rows[where]["prompt"][0]["content"] = prompt
    return rows


def load(tmp_path, rows, **options):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    return load_dataset(DataConfig(train=str(path), **options), tiny.tokenizer())


def test_a_prompt_that_fills_the_row_drops_it_and_counts_it(tmp_path):
    data = load(tmp_path, rows_with("x" * 90), max_length=64)
    assert data.report.line() == "rows 6 (kept 5, dropped 1: prompt fills max_length 1)"
    assert data.report.dropped_at == {"prompt fills max_length": [f"{tmp_path}/d.jsonl:2"]}
    assert [e.row for e in data.examples] == [0, 2, 3, 4, 5]
    assert all(any(s.trained) for e in data.examples for s in e.sequences)


def test_a_reply_that_is_cut_is_counted_and_has_no_end(tmp_path):
    rows = tiny.preference_rows(4)
    rows[2]["chosen"][0]["content"] = "seven " * 40
    data = load(tmp_path, rows, max_length=64)
    assert data.report.truncated == 1 and "truncated 1" in data.report.line()
    assert data.report.ends_trained == data.report.sequences - 1
    chosen = data.examples[2].sequences[0]
    assert len(chosen) == 64 and chosen.truncated and chosen.trained[-1]
    assert load(tmp_path, rows, max_length=64, truncation="drop").report.dropped == {"exceeds max_length": 1}


def test_a_prompt_loses_its_beginning_and_never_its_reply(tmp_path):
    data = load(tmp_path, rows_with("x" * 90), max_length=64, max_prompt_length=40)
    assert len(data) == 6 and data.report.truncated == 1
    whole = load(tmp_path, rows_with("x" * 90), max_length=1000)
    for cut, full in zip(data.examples[1].sequences, whole.examples[1].sequences):
        assert list(cut.ids) == list(full.ids[-len(cut) :]) and sum(cut.trained) == sum(full.trained)
        assert bytes(cut.trained).find(1) == 40


def test_nothing_left_is_an_error(tmp_path):
    rows = [row for i in range(3) for row in rows_with("x" * 90, where=0, count=1)]
    with pytest.raises(ValueError, match=r"every row was dropped: rows 3 .*prompt fills max_length 3"):
        load(tmp_path, rows, max_length=64)


@pytest.mark.parametrize("objective", ["simpo", "orpo", "dpo"])
def test_the_loss_stays_a_number(tmp_path, objective):
    """SimPO and ORPO divide by the length of the reply."""
    tiny.folder(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "train.jsonl", rows_with("x" * 90))
    data = {"max_length": 64, "eval": None}
    steps = {"epochs": 1, "batch_size": 2, "save_every": 0, "output_dir": tmp_path / "run"}
    run = train(runs.recipe(tmp_path, data=data, objective={"name": objective}, train=steps))
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(math.isfinite(x) and x != 0 for x in losses)
