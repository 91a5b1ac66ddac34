# SPDX-License-Identifier: Apache-2.0
"""Complaint 22: a tokenisation cache that is stale, or never used again."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from fastpost import objectives
from fastpost.data import cache, loader
from fastpost.data.loader import load_dataset
from fastpost.train.config import DataConfig


@pytest.fixture
def data(tmp_path):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.preference_rows(6))
    return DataConfig(train=str(path), cache=str(tmp_path / "cache"))


def load(cfg, tokenizer=None, objective=None, **options):
    """(dataset, "made" or "hit", key)."""
    found = load_dataset(cfg, tokenizer or tiny.tokenizer(), objective or objectives.DPO(), **options)
    _, key, word, *_ = found.parts[0].cache.split(maxsplit=3)
    return found, word.rstrip(","), key


def test_the_same_rows_are_found_again_even_by_another_object(data, monkeypatch):
    first, word, key = load(data)
    assert word == "made"
    monkeypatch.setattr(loader, "read_rows", None)  # nothing is read or tokenised again
    again, word, same = load(replace(data, shuffle=False, epoch_tokens=9, draw="fixed", eval="x", eval_limit=3))
    assert (word, same) == ("hit", key) and again.examples == first.examples and again.report == first.report
    assert str(first.batch([2, 0])) == str(again.batch([2, 0]))


def change_data(cfg, tmp_path):
    rows = tiny.preference_rows(6)
    rows[5]["chosen"][0]["content"] += "?"
    before = (tmp_path / "d.jsonl").stat()
    tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    os.utime(tmp_path / "d.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))  # a clock would not have told
    return {}


def change_template(cfg, tmp_path):
    return {"tokenizer": tiny.tokenizer(tiny.CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"))}


def change_special_token(cfg, tmp_path):
    return {"tokenizer": tiny.tokenizer(eos="<|eot|>")}


def change_vocabulary(cfg, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["answer"])
    return {"tokenizer": tokenizer}


def change_mark_of_a_token(cfg, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["!"]})
    return {"tokenizer": tokenizer}


def change_code(cfg, tmp_path):
    cache.code_hash.cache_clear()
    real = cache.Path.read_bytes
    patch = pytest.MonkeyPatch()
    patch.setattr(cache.Path, "read_bytes", lambda p: real(p) + b"#" * (p.name == "encode.py"))
    return {"undo": patch.undo}


CHANGES = [change_data, change_template, change_special_token, change_vocabulary, change_mark_of_a_token, change_code]
SETTINGS = [
    {"mask": "full"}, {"max_length": 40}, {"max_prompt_length": 20}, {"truncation": "drop"}, {"limit": 3},
    {"min_length": 30}, {"format": "chat"}, {"columns": {"chosen": "rejected"}},
]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [change_data, change_template, change_special_token, change_vocabulary, change_mark_of_a_token, change_code],
)
def test_whatever_tokens_depend_on_makes_a_new_one(data, tmp_path, change):
    _, _, key = load(data)
    options = change(data, tmp_path)
    undo = options.pop("undo", cache.code_hash.cache_clear)
    try:
        found, word, other = load(data, **options)
    finally:
        undo()
        cache.code_hash.cache_clear()
    assert word == "made" and other != key
    fresh = load_dataset(replace(data, cache=None), options.get("tokenizer", tiny.tokenizer()), objectives.DPO())
    assert found.examples == fresh.examples


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: next(iter(s)))
def test_every_setting_that_matters_makes_a_new_one(data, settings):
    load(data)
    found, word, _ = load(replace(data, **settings))
    assert word == "made"
    fresh = load_dataset(replace(data, cache=None, **settings), tiny.tokenizer(), objectives.DPO())
    assert found.examples == fresh.examples and found.parts[0].report == fresh.parts[0].report


def test_no_setting_is_forgotten(data):
    """A field that is added to DataConfig is part of the key unless someone says that it does not matter."""

    def key(cfg):
        return cache.key_of(cfg, "", tiny.tokenizer(), None, ())

    (copy := Path(data.train).with_name("copy.jsonl")).write_bytes(Path(data.train).read_bytes())
    for name in DataConfig.__dataclass_fields__:
        other = replace(data, **{name: str(copy) if name == "train" else "changed"})
        assert (key(other) == key(data)) == (name in cache.ELSEWHERE), name
    assert set(cache.ELSEWHERE) <= set(DataConfig.__dataclass_fields__)


def test_the_objective_and_the_date_count(data, monkeypatch):
    _, _, key = load(data)
    assert load(data, objective=objectives.SimPO())[1:] == ("made", load(data, objective=objectives.SimPO())[2])
    assert load(data, objective=objectives.IPO())[2] == key  # asks the same of a row
    tokenizer = tiny.tokenizer("{{ strftime_now('%Y') }}" + tiny.CHATML)
    today = load(data, tokenizer)[2]
    assert load(data, tokenizer)[1:] == ("hit", today)

    class Tomorrow(cache.date):
        @classmethod
        def today(cls):
            return cls(2999, 1, 1)

    monkeypatch.setattr(cache, "date", Tomorrow)
    assert load(data, tokenizer)[2] != today and load(data)[2] == key


@pytest.mark.parametrize("how", ["cut", "flipped bit", "empty", "another key", "not safetensors"])
def test_a_damaged_one_is_made_again_with_a_notice(data, tmp_path, how):
    first, _, _ = load(data)
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    whole = file.read_bytes()
    at = len(whole) - len(whole) // 4
    broken = {
        "cut": whole[:-100],
        "flipped bit": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        "empty": b"",
        "another key": whole.replace(file.stem.encode(), file.stem[::-1].encode()),
        "not safetensors": b"\x80\x04pickle" * 100,
    }
    file.write_bytes(broken[how])
    again = load_dataset(data, tiny.tokenizer(), objectives.DPO())
    assert "made, the old one was damaged" in again.parts[0].cache
    assert again.examples == first.examples and len(file.read_bytes()) == len(whole)
    assert load(data)[1] == "hit"


def test_every_flipped_bit_is_seen(data, tmp_path):
    first, _, _ = load(data)
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    whole = file.read_bytes()
    table, account = cache.read(file, file.stem)
    assert loader.Examples([table]) == first.examples
    seen = 0
    for at in range(8, len(whole), 101):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        found = cache.read(file, file.stem)
        seen += found is None
        if found is not None:  # white space between the header and the numbers
            assert loader.Examples([found[0]]) == first.examples and found[1] == account, at
    assert seen > 0.9 * len(range(8, len(whole), 101))


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(data, tmp_path):
    (tmp_path / "file").write_text("")
    found = load_dataset(replace(data, cache=str(tmp_path / "file")), tiny.tokenizer(), objectives.DPO())
    assert len(found) == 6 and "not written: " in found.parts[0].cache
    assert load_dataset(replace(data, cache=None), tiny.tokenizer()).parts[0].cache == ""


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.location("auto") == tmp_path / "fastpost" and cache.location(None) is None
    assert cache.location(str(tmp_path / "here")) == tmp_path / "here"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.location("auto") == tmp_path / ".cache" / "fastpost"


def test_it_is_printed(data, tmp_path, capsys):
    from fastpost import cli

    tiny.folder(tmp_path / "model")
    recipe = tiny.recipe(
        tmp_path / "r.yaml", model={"path": tmp_path / "model"}, objective={"name": "dpo"},
        data={"train": data.train, "cache": data.cache},
    )  # fmt: skip
    for word in ("made", "hit"):
        assert cli.main(["data", str(recipe)]) == 0
        (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("cache ")]
        assert line.split()[2] == word and len(line.split()[1]) == 12


def test_nothing_in_it_runs(data, tmp_path):
    load(data)
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    assert header["token.ids"]["dtype"] == "I32" and header["token.trained"]["dtype"] == "U8"
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".lock")) == [
        ".safetensors"
    ]
