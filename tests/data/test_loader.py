# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest
import torch

import tiny
from fastpost import objectives
from fastpost.data.loader import load_dataset, order
from fastpost.train.config import DataConfig

GSM8K = Path(os.environ.get("FASTPOST_GSM8K", Path(__file__).parents[3] / "shared" / "data" / "gsm8k"))


@pytest.fixture
def load(tmp_path):
    def load(rows, objective=None, tokenizer=None, require=(), **options):
        path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
        tokenizer = tokenizer or tiny.tokenizer()
        return load_dataset(DataConfig(train=str(path), **options), tokenizer, objective, require=require)

    return load


def plain(prompt: int, completion: int) -> dict:
    """A row of so many tokens: 'x' is one token, and the completion gets an EOS."""
    return {"prompt": "x" * prompt, "completion": "y" * completion}


def test_completion_truncated_away_is_dropped_and_counted(load):
    data = load([plain(4, 3), plain(10, 3), plain(12, 3), plain(5, 20)], objectives.SFT(), max_length=10)
    report = data.report
    assert (report.rows, report.kept, dict(report.dropped)) == (4, 2, {"prompt fills max_length": 2})
    assert report.truncated == 1 and [e.row for e in data.examples] == [0, 3]
    assert report.line() == "rows 4 (kept 2, dropped 2: prompt fills max_length 2)   truncated 1"
    cut = data.examples[1].sequences[0]
    assert len(cut) == 10 and cut.truncated and sum(cut.trained) == 5
    assert (report.ends_trained, report.sequences) == (1, 2)  # the cut reply does not end


def test_a_pair_is_dropped_whole(load):
    rows = [
        {"prompt": "x" * 8, "chosen": "y", "rejected": "z" * 9},
        {"prompt": "x" * 10, "chosen": "y", "rejected": "z"},
    ]
    data = load(rows, objectives.DPO(), max_length=10)
    assert data.report.dropped == {"prompt fills max_length": 1}
    assert [len(s) for s in data.examples[0].sequences] == [10, 10] and data.report.truncated == 1


def test_drop_instead_of_cutting(load):
    rows = [plain(4, 3), plain(4, 9), plain(7, 1)]
    data = load(rows, max_length=10, max_prompt_length=6, truncation="drop")
    assert data.report.dropped == {"exceeds max_length": 1, "prompt exceeds max_prompt_length": 1}
    assert data.report.truncated == 0


def test_long_prompt_keeps_its_end_and_bos(load):
    tokenizer = tiny.tokenizer(bos=True)
    data = load([{"prompt": "abcdefgh", "completion": "y"}], tokenizer=tokenizer, max_prompt_length=4)
    sequence = data.examples[0].sequences[0]
    assert tokenizer.decode(list(sequence.ids)) == "<|bos|>fghy<|im_end|>"
    assert list(sequence.trained) == [0, 0, 0, 0, 1, 1] and sequence.truncated


def test_every_row_dropped(load):
    with pytest.raises(
        ValueError, match=r"every row was dropped: rows 1 \(kept 0, dropped 1: prompt fills max_length 1\)"
    ):
        load([plain(10, 1)], max_length=5)


def test_missing_column_names_file_and_line(load):
    rows = tiny.preference_rows(3)
    del rows[2]["rejected"]
    with pytest.raises(ValueError, match=r"d.jsonl:3: column 'rejected' is missing \(the row has: prompt, chosen\)"):
        load(rows, objectives.SimPO())
    with pytest.raises(
        ValueError, match=r"d.jsonl:1: column 'chosen' is missing \(the row has: prompt, completion, label\)"
    ):
        load(tiny.unpaired_rows(2), objectives.SimPO())
    with pytest.raises(ValueError, match=r"d.jsonl:1: column 'label' is missing"):
        load([plain(2, 2)], objectives.KTO())
    with pytest.raises(ValueError, match=r"d.jsonl:1: column 'reference_chosen_logps' is missing"):
        load(tiny.preference_rows(1), objectives.DPO(), require=("reference_logprob",))
    with pytest.raises(
        ValueError, match=r"d.jsonl:1: column 'chosen_reward' is missing|'previous_chosen_logps' is missing"
    ):
        load(tiny.preference_rows(1), objectives.REBEL())


def test_pairs_for_an_objective_on_single_replies(load):
    with pytest.raises(
        ValueError, match=r"SFT trains on single replies, but the rows are pairs .*\{completion: chosen\}"
    ):
        load(tiny.preference_rows(2), objectives.SFT())
    data = load(tiny.preference_rows(2), objectives.SFT(), columns={"completion": "chosen"})
    assert data.report.kind == "prompt_completion" and len(data.examples[0].sequences) == 1


def test_labels_and_stored_numbers_reach_the_batch(load):
    batch = load(tiny.unpaired_rows(4), objectives.KTO()).batch([2, 1])
    assert batch.reward.tolist() == [1, -1] and batch.rows == [2, 1]
    rows = [
        {**r, "reference_chosen_logps": -i, "reference_rejected_logps": -i - 0.5}
        for i, r in enumerate(tiny.preference_rows(3))
    ]
    batch = load(rows, objectives.DPO(), require=("reference_logprob",)).batch([2, 0])
    assert batch.reference_logprob.tolist() == [-2, -2.5, 0, -0.5]


def test_numbers_that_some_rows_have_not(load):
    rows = tiny.preference_rows(3)
    rows[1] |= {"reference_chosen_logps": -1.5, "reference_rejected_logps": -2}
    data = load(rows, objectives.DPO())
    assert [e.reference_logprob for e in data.examples] == [None, (-1.5, -2), None]
    with pytest.raises(ValueError, match=r"data row 2: reference_logprob: other rows have it, this one has not"):
        data.batch([1, 2])
    data.examples.put("reference_logprob", torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    assert data.batch([1, 2]).reference_logprob.tolist() == [3, 4, 5, 6]


def test_rows_in_chunks_are_the_same_rows(load, monkeypatch):
    rows = tiny.preference_rows(23)
    whole = load(rows).examples
    monkeypatch.setattr("fastpost.data.loader.CHUNK", 4)
    assert load(rows, cache=None).examples == whole and len(whole) == 23
    assert load(rows, limit=9).examples == whole[:9]


def test_order_is_a_fixed_pure_function():
    assert order(0, 0, 10) == [8, 9, 0, 3, 7, 4, 1, 5, 2, 6]  # written down: a change would break every resume
    assert order(0, 0, 10) != order(0, 1, 10) != order(1, 1, 10)
    assert sorted(order(3, 2, 1000)) == list(range(1000))
    assert order(3, 2, 5, shuffle=False) == [0, 1, 2, 3, 4]


def test_micro_batches_keep_order_and_budget(load):
    data = load([plain(n % 7 + 1, n % 5 + 1) for n in range(40)] + [plain(50, 1)])
    indices = order(0, 0, len(data))
    parts = data.micro_batches(indices, max_tokens=30)
    assert [i for part in parts for i in part] == indices
    tokens = [sum(data.examples[i].tokens for i in part) for part in parts]
    assert all(t <= 30 or len(part) == 1 for t, part in zip(tokens, parts)) and max(tokens) == 52
    # Greedy: no part could have taken the first row of the next one.
    assert all(t + data.examples[after[0]].tokens > 30 for t, after in zip(tokens, parts[1:]))
    assert [len(p) for p in data.micro_batches(indices, 1, rows=16)] == [16, 16, 9]


@pytest.mark.skipif(
    not (GSM8K / "test.jsonl").exists(), reason="set FASTPOST_GSM8K to a folder with GSM8K's test.jsonl"
)
@pytest.mark.parametrize("form", ["plain", "chat"])
def test_real_rows(form):
    """GSM8K's test set: calculator notes, currency signs, long numbers; trained text = answer, byte for byte."""
    import json

    lines = (GSM8K / "test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    cfg = DataConfig(
        train=str(GSM8K / "test.jsonl"), columns={"prompt": "question", "completion": "answer"}, format=form, limit=200,
        max_length=4096,
    )  # fmt: skip
    tokenizer = tiny.tokenizer()
    data = load_dataset(cfg, tokenizer, objectives.SFT())
    assert data.report.kept == data.report.ends_trained == 200
    for line, example in zip(lines, data.examples):
        (s,) = example.sequences
        trained = tokenizer.decode([i for i, on in zip(s.ids, s.trained) if on], clean_up_tokenization_spaces=False)
        assert trained == json.loads(line)["answer"] + "<|im_end|>"
