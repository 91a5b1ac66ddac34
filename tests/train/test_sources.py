# SPDX-License-Identifier: Apache-2.0
"""data.train as a list: the config, the account, and runs over several sources."""

import random
import signal

import pytest

import runs
import tiny
from fastpost import cli
from fastpost.train import checkpoint
from fastpost.train.config import dump, load_config
from fastpost.train.loop import train
from fastpost.train.run_folder import differences
from fastpost.train.sources import Source, config_of, sources_of


@pytest.fixture
def recipe(tmp_path):
    def recipe(train):
        return tiny.recipe(tmp_path / "r.yaml", model={"path": "m"}, data={"train": train})

    return recipe


def message(path, overrides=()):
    with pytest.raises(ValueError) as error:
        load_config(path, overrides)
    return str(error.value)


def test_a_list_reads_and_writes_back(recipe, tmp_path):
    cfg = load_config(recipe([{"path": "a.jsonl", "ratio": "8e-1"}, {"path": "b", "repeat": True, "mask": "full"}]))
    assert cfg.data.train == [Source("a.jsonl", 0.8), Source("b", repeat=True, mask="full")]
    copy = tmp_path / "config.yaml"
    copy.write_text(dump(cfg))
    assert load_config(copy) == cfg and "null" not in copy.read_text().partition("eval")[0].partition("train:")[2]
    a, b = sources_of(cfg.data)
    assert (a.mask, b.mask, a.shuffle, a.columns) == ("reply", "full", True, {})
    assert config_of(cfg.data, b).mask == "full" and config_of(cfg.data, b).train == "b"
    assert sources_of(load_config(recipe("a.jsonl")).data) == [
        Source("a.jsonl", 1.0, False, True, {}, "auto", "reply", "rows")
    ]


def test_overrides(recipe):
    path = recipe([{"path": "a.jsonl"}])
    assert load_config(path, ["--data.train", "007.jsonl"]).data.train == "007.jsonl"
    cfg = load_config(path, ["--data.train", "[{path: x, ratio: 3}, {path: y}]", "--data.epoch_tokens", "5e9"])
    assert cfg.data.train == [Source("x", 3.0), Source("y")] and cfg.data.epoch_tokens == 5_000_000_000
    stages = ["--data.train", "[{path: x, ratio: [3, 1e-1]}]", "--data.epoch_tokens", "[1e12, 2.5e11]"]
    cfg = load_config(path, stages)
    assert cfg.data.train == [Source("x", [3.0, 0.1])] and cfg.data.epoch_tokens == [10**12, 250 * 10**9]
    path.write_text(dump(cfg))
    assert load_config(path) == cfg
    with pytest.raises(ValueError, match=r"data.epoch_tokens: expected at least 1, got \[100, 0\]"):
        load_config(path, ["--data.epoch_tokens", "[100, 0]"])


@pytest.mark.parametrize(
    "train, expected",
    [
        ([{"path": "a", "ration": 3}], "r.yaml: unknown key 'data.train[0].ration'. Did you mean 'ratio'?"),
        ([{"path": "a"}, {"ratio": 3}], "r.yaml: data.train[1].path: expected a path, got nothing. Every source names"),
        (
            [{"path": "a", "ratio": 0}],
            "r.yaml: data.train[0].ratio: expected a number above 0, got 0.0. Leave a source",
        ),
        (
            [{"path": "a", "ratio": "much"}],
            "r.yaml: data.train[0].ratio: expected a number or a list of numbers, got a string 'much'.",
        ),
        ([{"path": "a", "ratio": []}], "r.yaml: data.train[0].ratio: expected a number above 0, got []."),
        ([{"path": "a", "ratio": [0, 0]}], "r.yaml: data.train[0].ratio: expected a number above 0, got [0.0, 0.0]."),
        ([{"path": "a", "ratio": [1, -1]}], "r.yaml: data.train[0].ratio: expected a number above 0, got [1.0, -1.0]"),
        ([{"path": "a", "ratio": [1, "b"]}], "r.yaml: data.train[0].ratio[1]: expected a number, got a string 'b'."),
        (
            [{"path": "a", "ratio": [1, 0]}, {"path": "b", "ratio": [0, 0, 1]}],
            "r.yaml: data.train: expected a source with a ratio above 0 in each epoch, got none in epoch 2. Give one",
        ),
        ([{"path": "a", "mask": "ful"}], "r.yaml: data.train[0].mask: expected one of reply, "),
        ([{"path": "a", "limit": 0}], "r.yaml: data.train[0].limit: expected at least 1, got 0."),
        (["a.jsonl"], "r.yaml: data.train[0]: expected a mapping of path, ratio, "),
        (3, "r.yaml: data.train: expected a string or a list of mappings, got a number (int) 3."),
        ({"path": "a"}, "r.yaml: data.train: expected a string or a list of mappings, got a mapping {'path': 'a'}."),
        ([], "r.yaml: data.train: expected a path, got nothing."),
    ],
)
def test_mistakes_are_named(recipe, train, expected):
    assert expected in message(recipe(train))


def test_the_cache_is_no_setting_of_a_run(recipe):
    path = recipe([{"path": "a.jsonl"}])
    assert differences(load_config(path), load_config(path, ["--data.cache", "none"])) == []
    assert [n for n, *_ in differences(load_config(path), load_config(path, ["--data.draw", "fixed"]))] == ["data.draw"]


def mixed(tmp, *overrides, objective="sft", **groups):
    """Runs of 3 epochs: raw text in blocks, chats and completions 5 : 3 : 2, or two sets of pairs."""
    if objective == "sft":
        files = {
            "text": ([{"text": "The answer is " + "ab" * (i % 9)} for i in range(30)], {"ratio": 5, "pack": "blocks"}),
            "chat": (tiny.sft_rows(20), {"ratio": 3, "shuffle": False}),
            "plain": ([{"prompt": "a b c", "completion": "d e"}] * 3, {"ratio": 2, "repeat": True}),
        }
    else:
        files = {
            "a": (tiny.preference_rows(20), {"ratio": 3}),
            "b": (tiny.preference_rows(3, seed=5), {"ratio": 2, "repeat": True}),
        }
    train = []
    for name, (rows, keys) in files.items():
        train.append({"path": str(tiny.write_jsonl(tmp / f"{name}.jsonl", rows)), **keys})
    data = {"train": train, "eval": None, "max_length": 48}
    return runs.recipe(
        tmp, *overrides, objective={"name": objective}, data=data,
        train={"epochs": 3, "batch_size": 4, "eval_every": 0, "save_every": 3, **groups.pop("train", {})}, **groups,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_mixture_resumes_to_the_bit(tmp_path, objective):
    """Killed where it is drawn: the resumed run gives the bytes of the unbroken one."""
    runs.one_thread()
    whole = mixed(tmp_path, objective=objective, train={"output_dir": tmp_path / "whole"})
    assert runs.in_child(lambda: train(whole)) == 0
    expected = runs.outcome(tmp_path / "whole")
    steps = expected["metrics.jsonl"].count(b"\n")
    assert steps > 8
    draw = random.Random(objective)
    for k in range(2):
        cfg = mixed(tmp_path, objective=objective, train={"output_dir": tmp_path / f"run{k}"})
        kill = draw.randrange(2, steps)
        from fastpost.train import loop

        assert runs.in_child(runs.killed_at(cfg, loop, "train_step", kill, after=True)) == -signal.SIGKILL
        assert runs.in_child(lambda cfg=cfg: train(cfg)) == 0
        assert runs.outcome(tmp_path / f"run{k}") == expected
        assert checkpoint.latest(tmp_path / f"run{k}" / "checkpoints")


def test_the_account_names_every_source(tmp_path, capsys):
    mixed(tmp_path)
    assert cli.main(["data", str(tmp_path / "recipe.yaml")]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/text.jsonl  (text)\nrows 30 (kept 30, dropped 0)" in out and "blocks" in out
    assert f"{tmp_path}/chat.jsonl  (messages)\nrows 20 (kept 20" in out
    lines = [line for line in out.splitlines() if line.startswith("mix ")]
    assert "ratios 5:3:2, draw dynamic" in lines[0] and len(lines) == 4
    assert "text.jsonl: wanted 50.00%, is " in lines[1] and lines[1].endswith("shuffled")
    assert "chat.jsonl: wanted 30.00%, is " in lines[2] and lines[2].endswith("in file order")
    assert "plain.jsonl: wanted 20.00%, is " in lines[3] and "read " in lines[3]
    cfg = mixed(tmp_path, "--train.max_steps", "1")
    train(cfg)
    out = capsys.readouterr().out
    assert f"train  {tmp_path}/chat.jsonl: rows 20 (kept 20" in out and "mix    " in out and "train  cache  " in out


def test_an_exhausted_source_is_told_before_the_model_is_read(tmp_path, capsys):
    mixed(tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    arguments = ["train", str(tmp_path / "recipe.yaml"), "--data.epoch_tokens", "1000000"]
    assert cli.main(arguments) == 1
    assert "data.train[0] " in (err := capsys.readouterr().err) and "runs out: an epoch of 1000000 tokens wants" in err
