# SPDX-License-Identifier: Apache-2.0
import dataclasses
import subprocess
import sys
import typing

import pytest
import yaml

import tiny
from fastpost.train.config import Config, GroupConfig, dump, field_names, help_text, load_config


@pytest.fixture
def recipe(tmp_path):
    def write(text="", **groups):
        path = tmp_path / "my.yaml"
        if text:
            path.write_text("model: {path: m}\ndata: {train: d}\n" + text)
            return path
        return tiny.recipe(path, **{"model": {"path": "m"}, "data": {"train": "d"}, **groups})

    return write


def message(*args) -> str:
    with pytest.raises(ValueError) as error:
        load_config(*args)
    return str(error.value)


def test_misspelt_key_names_file_key_and_suggestion(recipe):
    path = recipe(optim={"lrr": 1e-6})
    assert message(path) == f"{path}: unknown key 'optim.lrr'. Did you mean 'lr'?"
    path = recipe("optimizer: {lr: 1}\n")
    assert message(path) == f"{path}: unknown key 'optimizer'. Did you mean 'optim'?"


def test_misspelt_choice(recipe):
    path = recipe(optim={"schedule": "cosin"})
    text = "optim.schedule: expected one of cosine, linear, constant, wsd, step; got 'cosin'. Did you mean 'cosine'?"
    assert message(path) == f"{path}: {text}"


def test_numbers_without_a_dot_are_floats(recipe):
    """PyYAML reads 1e-6 as a string."""
    assert yaml.safe_load("1e-6") == "1e-6"
    cfg = load_config(recipe("optim: {lr: 1e-6, eps: 1e-12}\nobjective: {name: simpo, beta: 2e0}\n"))
    assert (cfg.optim.lr, cfg.optim.eps, cfg.objective.fields) == (1e-6, 1e-12, {"beta": 2.0})
    assert load_config(recipe(), ["--optim.lr", "5e-7", "--train.max_steps", "1e3"]).optim.lr == 5e-7


@pytest.mark.parametrize(
    "yaml_text, expected",
    [
        (
            "optim: {lr: fast}",
            "optim.lr: expected a number, got a string 'fast'. Write a number such as 1e-6.",
        ),
        (
            "optim: {lr: true}",
            "optim.lr: expected a number, got a truth value True. Write a number such as 1e-6.",
        ),
        (
            "optim: {betas: [0.9]}",
            "optim.betas: expected a list of 2 numbers, got a list [0.9]. Write [0.9, 0.999].",
        ),
        (
            "optim: {betas: [0.9, x]}",
            "optim.betas[1]: expected a number, got a string 'x'. Write a number such as 1e-6.",
        ),
        (
            "train: {batch_size: 1.5}",
            "train.batch_size: expected a whole number, got a number (float) 1.5. Write a number such as 8.",
        ),
        (
            "log: {plot: 1}",
            "log.plot: expected true or false, got a number (int) 1. Write true or false.",
        ),
        (
            "train: [1]",
            "train: expected a group of keys, got a list. Write its keys below it.",
        ),
        (
            "train: {batch_size: 0}",
            "train.batch_size: expected at least 1, got 0. Set it to that or more.",
        ),
        (
            "optim: {lr: .nan}",
            "optim.lr: expected at least 0, got nan. Set it to that or more.",
        ),
        (
            "optim: {warmup_ratio: 3}",
            "optim.warmup_ratio: expected a share from 0 to 1, got 3.0. For a number of steps there is "
            "optim.warmup_steps.",
        ),
        (
            "optim: {stable_ratio: 90}",
            "optim.stable_ratio: expected a share from 0 to 1, got 90.0. Write 0.1 for 10 %.",
        ),
        (
            "optim: {schedule: step}",
            "optim.step_decay: expected [every, gamma] with optim.schedule step, got nothing. "
            "E.g. step_decay: [6212, 0.85].",
        ),
        (
            "optim: {schedule: step, step_decay: [0.85, 6212]}",
            "optim.step_decay[0]: expected a whole number, got a number (float) 0.85. Write a number such as 8.",
        ),
        (
            "optim: {schedule: step, step_decay: [10, 8.5]}",
            "optim.step_decay: expected [every, gamma] with every at least 1 and gamma above 0 and up to 1, "
            "got [10, 8.5].",
        ),
        (
            "optim: {step_decay: [10, 0.5]}",
            "optim.step_decay: has no effect with optim.schedule cosine. Set optim.schedule to step, or leave it out.",
        ),
        (
            "optim: {groups: {lm_head: {lr_ration: 0.1}}}",
            "unknown key 'optim.groups.lm_head.lr_ration'. Did you mean 'lr_ratio'?",
        ),
        (
            "optim: {groups: {lm_head: 0.1}}",
            "optim.groups.lm_head: expected a mapping of lr_ratio, weight_decay, got a number (float) 0.1.",
        ),
        (
            "optim: {groups: [lm_head]}",
            "optim.groups: expected a mapping, got a list ['lm_head']. Write {ours: theirs}.",
        ),
        (
            "optim: {groups: {lm_head: {lr_ratio: -1}}}",
            "optim.groups.lm_head.lr_ratio: expected at least 0, got -1.0. Set it to that or more.",
        ),
        (
            "optim: {ema: 1}",
            "optim.ema: expected a decay between 0 and 1, got 1.0. Write e.g. 0.999, or none.",
        ),
        (
            "optim: {ema: 0}",
            "optim.ema: expected a decay between 0 and 1, got 0.0. Write e.g. 0.999, or none.",
        ),
        (
            "optim: {name: adam8bit}",
            "optim.name: expected one of adamw, adamw8bit; got 'adam8bit'. Did you mean 'adamw8bit'?",
        ),
        (
            "optim: {schedule: wsd, decay: exponential}",
            "optim.min_lr_ratio: expected more than 0 with optim.decay exponential, which never reaches 0; got 0.0.",
        ),
    ],
)
def test_wrong_values_name_the_field(recipe, yaml_text, expected):
    path = recipe(yaml_text)
    assert message(path) == f"{path}: {expected}"


def test_key_written_twice(recipe):
    path = recipe("optim:\n  lr: 1e-6\n  lr: 1e-5\n")
    assert message(path) == f"{path}: not valid YAML: line 5: key 'lr' is written twice. Keep one."


def test_prompt_must_leave_room(tmp_path):
    path = tiny.recipe(
        tmp_path / "r.yaml", model={"path": "m"}, data={"train": "d", "max_length": 8, "max_prompt_length": 8}
    )
    assert "data.max_prompt_length: expected less than data.max_length (8), got 8." in message(path)


def test_missing_paths(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model:\n  path:       # to be filled in\n")
    assert message(path) == f"{path}: model.path: expected a path, got nothing. Set it there or pass --model.path PATH."
    assert "data.train" in message(path, ["--model.path", "m"])
    assert "no such recipe" in message(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--optim.lrr", "1"], "unknown option --optim.lrr. Did you mean 'optim.lr'?"),
        (["--lr", "1"], "unknown option --lr. Did you mean '--optim.lr'?"),
        (["--optim.lr"], "--optim.lr: expected a value, got nothing. Write --optim.lr VALUE."),
        (["--optim.lr", "fast"], "--optim.lr: expected a number, got a string 'fast'. Write a number such as 1e-6."),
        (["lr=1"], "expected --group.key, got 'lr'. Write --lr VALUE, or --help for the names."),
    ],
)
def test_wrong_overrides(recipe, arguments, expected):
    assert message(recipe(), arguments) == f"command line: {expected}"


def test_overrides_win_and_may_fill_in(recipe):
    cfg = load_config(
        recipe(objective={"name": "simpo", "beta": 2.0}),
        [
            "--objective.beta=2.5",
            "--objective.name",
            "dpo",
            "--data.columns",
            "{prompt: question}",
            "--log.plot",
            "false",
        ]
        + ["--train.max-steps", "7", "--data.eval", "none", "--optim.betas", "[0.9, 0.95]", "--model.path", "007"],
    )
    assert cfg.objective.name == "dpo" and cfg.objective.fields == {"beta": 2.5}
    assert cfg.data.columns == {"prompt": "question"} and cfg.data.eval is None and cfg.log.plot is False
    assert cfg.train.max_steps == 7 and cfg.optim.betas == (0.9, 0.95) and cfg.model.path == "007"


def test_dump_reads_back_equal(recipe, tmp_path):
    cfg = load_config(recipe(objective={"name": "simpo", "beta": 2.5}), ["--optim.lr", "1e-6", "--data.limit", "5"])
    copy = tmp_path / "config.yaml"
    copy.write_text(dump(cfg))
    assert load_config(copy) == cfg
    assert "lr: 1.0e-06" in copy.read_text()  # a float for every YAML reader, not only ours
    assert cfg.train.output_dir == "runs/my"


def test_groups_and_lists_read_back_equal(recipe, tmp_path):
    path = recipe("optim: {groups: {embed|head: {lr_ratio: 0.1}, mlp: {weight_decay: 1e-2}}, schedule: wsd}\n")
    cfg = load_config(path, ["--model.train", "[last:4, lm_head]", "--model.freeze", "last:1", "--data.limit", "3"])
    assert cfg.model.train == ["last:4", "lm_head"] and cfg.model.freeze == ["last:1"]  # one alone needs no brackets
    assert cfg.optim.groups == {"embed|head": GroupConfig(lr_ratio=0.1), "mlp": GroupConfig(weight_decay=0.01)}
    copy = tmp_path / "config.yaml"
    copy.write_text(dump(cfg))
    assert load_config(copy) == cfg
    stepped = load_config(recipe("optim: {schedule: step, step_decay: [6212, 0.85]}\n"))
    copy.write_text(dump(stepped))
    assert load_config(copy) == stepped and stepped.optim.step_decay == (6212, 0.85)


def test_every_field_is_documented_and_there_are_few():
    text = help_text()
    for name in field_names():
        assert f"--{name} [" in text, name
    groups = typing.get_type_hints(Config).values()
    assert sum(len(dataclasses.fields(group)) for group in groups) <= 73


def test_reading_a_recipe_needs_no_torch(recipe):
    code = f"import sys; from fastpost.train.config import *; load_config({str(recipe())!r}); help_text()"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_packed_attention_shares_a_prompt(recipe):
    path = recipe(model={"path": "m", "attention": "sdpa"})
    assert (
        "data.share_prompt: expected false with attention 'sdpa', which cannot share the prompt of a pair"
        in message(path)
    )
    load_config(path, ["--data.share_prompt", "false"])
