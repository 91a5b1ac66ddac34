# SPDX-License-Identifier: Apache-2.0
"""The word problems in other columns say the same, and give nothing away."""

import json
import re

import pytest

from fastpost.data import word_problem_forms as forms
from fastpost.data.word_problems import final_answer, problems, reward


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(forms, "ROWS", {"train": 90, "same": 30, "new": 30})


@pytest.fixture
def pairs():
    return problems("train", 90)


def said(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


def test_forms_of_one_solution(pairs):
    for row, chat, mark, part in zip(pairs, forms.chats("train"), forms.marks("train"), forms.parts("train")):
        assert chat["messages"] == row["prompt"] + row["chosen"]
        assert mark["completion"] == row["chosen" if mark["label"] else "rejected"]
        assert mark["label"] == bool(reward(mark["completion"], row["answer"]))
        assert part["rationale"] + part["answer"] == row["chosen"][0]["content"]
        assert re.fullmatch(r"The answer is \d+\.", part["answer"])
    assert sum(m["label"] for m in forms.marks("train")) == 45


def test_dialogues_part_at_the_turn_that_is_named_and_count_right_answers(pairs):
    answers = {row["prompt"][-1]["content"]: row["answer"] for row in pairs}
    rows = forms.dialogues("train")
    assert len(rows) == 30 and {r["turn"] for r in rows} == {0, 1, 2}
    later = 0
    for row in rows:
        for side in ("chosen", "rejected"):
            users = [m["content"] for m in row[side] if m["role"] == "user"]
            right = [final_answer(text) == answers[user] for user, text in zip(users, said(row[side]))]
            assert row[f"{side}_reward"] == sum(right) and all(right[: row["turn"]])
            later += len(right) - 1 - row["turn"]
        assert row["chosen_reward"] > row["rejected_reward"]
        a, b = said(row["chosen"]), said(row["rejected"])
        assert a[: row["turn"]] == b[: row["turn"]] and a[row["turn"]] != b[row["turn"]]
    assert later > 10


def test_texts_go_from_easy_to_hard_and_drills_are_right():
    lines = [row["text"].count("\n") for row in forms.texts("train")]
    assert lines == sorted(lines) and lines[0] < lines[-1]
    for row in forms.drills("train"):
        for a, op, b, c in re.findall(r"^(\d+) (.) (\d+) = (\d+)$", row["text"], re.MULTILINE):
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) // int(b)}[op] == int(
                c
            )
        assert re.fullmatch(r"(\d+ . \d+ = \d+\n?)+", row["text"])
    assert not re.search(r"[\d{}]", "".join(row["text"] for row in forms.everyday("train")))


def test_rows_are_a_pure_function_and_splits_are_apart(tmp_path):
    for form, make in forms.FORMS.items():
        rows = {split: [json.dumps(r) for r in make(split)] for split in forms.ROWS}
        assert rows["train"] == [json.dumps(r) for r in make("train")]
        assert rows["train"] != [json.dumps(r) for r in make("train", seed=1)]
        if form != "drills":  # a line such as 8 - 3 = 5 may come up twice
            assert not set(rows["train"]) & set(rows["same"]) and not set(rows["same"]) & set(rows["new"])
    path = forms.write(tmp_path, "marks", "same")
    assert [json.loads(line) for line in path.read_text().splitlines()] == forms.marks("same")
    assert [p.name for p in path.parent.iterdir()] == ["same.jsonl"]
    with pytest.raises(ValueError, match=r"pairs/test.jsonl: expected a form \(pairs, chats"):
        forms.write(tmp_path, "pairs", "test")
