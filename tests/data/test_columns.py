# SPDX-License-Identifier: Apache-2.0
import json

import pytest

import tiny
from fastpost.data.columns import Row, is_chat, need, numbers, read_rows, row_type


def message(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        result = call(*args, **kwargs)
        list(result) if hasattr(result, "__next__") else None
    return str(error.value)


def row(**values) -> Row:
    return Row(0, "f.jsonl:1", values)


def test_broken_line_is_named_by_number(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n')
    text = message(read_rows, path)
    assert text.startswith(f"{path}:3: expected JSON, got broken JSON (character ") and "Correct or remove it." in text


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'{"text": "a"}\n[1]\n', ":2: expected an object with columns, got list."),
        (b'{"text": "\xff"}\n', ":1: not UTF-8"),
    ],
)
def test_other_bad_lines(tmp_path, content, expected):
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    assert message(read_rows, path).startswith(f"{path}{expected}")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "d.csv").write_text("a,b")
    (tmp_path / "e.jsonl").write_text("\n")
    (tmp_path / "o.json").write_text('{"text": "a"}')
    assert "expected a file named .jsonl, .json or .parquet, got '.csv'" in message(read_rows, tmp_path / "d.csv")
    assert message(read_rows, tmp_path / "none.jsonl").endswith("got no such file. Check the path.")
    assert message(read_rows, tmp_path / "e.jsonl").endswith(
        "expected rows, got no rows. Write one object a line, or name another file."
    )
    assert "expected a list of rows, got dict" in message(read_rows, tmp_path / "o.json")


def test_json_parquet_and_jsonl_agree(tmp_path):
    rows = tiny.preference_rows(5)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    read = [[r.values for r in read_rows(tmp_path / name)] for name in ("a.json", "a.jsonl")]
    assert read == [rows, rows]
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [r.values for r in read_rows(tmp_path / "a.parquet")] == rows


def test_limit_and_blank_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\n{"text": "c"}\n')  # with a byte order mark
    rows = list(read_rows(path, limit=2))
    assert [(r.index, r.where, r.values["text"]) for r in rows] == [(0, f"{path}:1", "a"), (1, f"{path}:3", "b")]


def test_rename(tmp_path):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"question": "q", "answer": "a"}])
    (read,) = read_rows(path, rename={"prompt": "question", "completion": "answer"})
    assert row_type(read) == "prompt_completion" and read.values["prompt"] == "q"
    text = message(read_rows, path, rename={"prompt": "questoin"})
    assert text == f"{path}:1: column 'questoin' (data.columns.prompt) is missing. Did you mean 'question'?"


def test_types_by_columns():
    assert row_type(row(prompt="", chosen="", rejected="", text="")) == "preference"
    assert row_type(row(prompt="", completion="", label=True)) == "unpaired"
    assert row_type(row(prompt="", completion="")) == "prompt_completion"
    assert row_type(row(messages=[])) == "messages"
    assert row_type(row(text="")) == "text"
    text = message(row_type, row(question="", answer=""))
    assert text.startswith("f.jsonl:1: columns question, answer are not a row type.") and "data.columns" in text


def test_missing_column_names_line_and_columns():
    assert message(need, row(chosen="a"), ("chosen", "rejected")) == (
        "f.jsonl:1: column 'rejected' is missing (the row has: chosen). Rename another with data.columns, "
        "or drop the row."
    )
    assert "is null" in message(need, row(chosen=None), ("chosen",))


def test_string_or_messages():
    assert is_chat(row(a="x"), "a") is False
    assert is_chat(row(a=[{"role": "user", "content": "x"}]), "a") is True
    assert "expected a string or a list of messages, got int" in message(is_chat, row(a=1), "a")
    assert "got an empty list" in message(is_chat, row(a=[]), "a")
    assert "a[0]: expected {'role', 'content'}, got keys from, value" in message(
        is_chat, row(a=[{"from": "human", "value": "x"}]), "a"
    )


def test_numbers_that_ride_along():
    pair = row(ref_chosen_logps=-1, reference_rejected_logps=-2.5, chosen_reward=1, rejected_reward=0)
    expected = {"reference_logprob": (-1.0, -2.5), "previous_logprob": None, "reward": (1.0, 0.0)}
    assert numbers(pair, paired=True) == expected
    assert numbers(row(label=False, reference_logps=-3), paired=False) == {
        "reference_logprob": (-3.0,), "previous_logprob": None, "reward": (-1.0,),
    }  # fmt: skip
    assert "'reference_rejected_logps': expected a finite number, got None" in message(
        numbers, row(reference_chosen_logps=-1.0), True
    )
    assert "expected a finite number, got nan" in message(numbers, row(reward=float("nan")), False)
    assert "'label': expected true or false, got 'yes'" in message(numbers, row(label="yes"), False)
