# SPDX-License-Identifier: Apache-2.0
"""Complaint 6: the template writes BOS, the tokenizer writes another, and every row begins with two.

The mistake: rendered text is tokenised with special tokens."""

import pytest

import tiny
from fastpost.cli.account import account
from fastpost.data.loader import load_dataset
from fastpost.train.config import Config, DataConfig


def load(tmp_path, rows, tokenizer, **options):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    return load_dataset(DataConfig(train=str(path), **options), tokenizer)


@pytest.mark.parametrize("rows", [tiny.preference_rows(3), tiny.sft_rows(3), tiny.unpaired_rows(3)])
def test_one_bos_however_many_would_write_it(tmp_path, rows):
    tokenizer = tiny.tokenizer(tiny.LLAMA3, bos=True)  # as Llama 3's: template and tokenizer both write it
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2
    data = load(tmp_path, rows, tokenizer)
    for example in data.examples:
        for s in example.sequences:
            assert s.ids[0] == tokenizer.bos_token_id and list(s.ids).count(tokenizer.bos_token_id) == 1
            assert not s.trained[0]


def test_one_bos_on_plain_strings_with_and_without_their_own(tmp_path):
    tokenizer = tiny.tokenizer(None, bos=True)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "<|bos|>a", "completion": "b"}]
    one, two = load(tmp_path, rows, tokenizer).examples
    assert one.sequences == two.sequences and list(one.sequences[0].ids).count(tokenizer.bos_token_id) == 1


def test_data_with_a_bos_of_its_own_is_refused_by_line(tmp_path):
    tokenizer = tiny.tokenizer(tiny.LLAMA3, bos=True)
    rows = tiny.preference_rows(2)
    rows[1]["chosen"][0]["content"] = "<|bos|>" + rows[1]["chosen"][0]["content"]
    with pytest.raises(ValueError, match=r"d.jsonl:2: the BOS token '<\|bos\|>' stands in the middle of the row"):
        load(tmp_path, rows, tokenizer)


def test_the_count_is_shown(tmp_path):
    tokenizer = tiny.tokenizer(tiny.LLAMA3, bos=True)
    data = load(tmp_path, tiny.preference_rows(2), tokenizer)
    assert account(Config(), data, tokenizer).bos == 1
