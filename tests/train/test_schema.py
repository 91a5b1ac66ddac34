# SPDX-License-Identifier: Apache-2.0
"""The schema says what the strict reader says."""

import dataclasses
import json
import re
import typing

import pytest
import yaml

from fastpost import objectives
from fastpost.cli import main
from fastpost.cli.recipes import recipes
from fastpost.train.config import Config, dump, field_names, load_config
from fastpost.train.schema import docs, schema

jsonschema = pytest.importorskip("jsonschema")


class Yaml12(yaml.SafeLoader):
    """As editors read: 1e-6 is a number."""


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"), list("-+0123456789.")
)


@pytest.fixture(scope="module")
def validator():
    made = schema()
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


def errors(validator, text):
    return [e.message for e in validator.iter_errors(yaml.load(text, Loader=Yaml12))]


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_is_valid(validator, name):
    assert errors(validator, recipes()[name].read_text()) == []
    cfg = load_config(recipes()[name], ["--model.path", "m", "--data.train", "d"])
    assert errors(validator, dump(cfg)) == []  # so is every config.yaml that a run writes


def test_the_command_prints_it(capsys):
    assert main(["train", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()


def test_every_field_has_type_default_and_text(validator):
    groups = typing.get_type_hints(Config)
    for name in field_names():
        entry = validator.schema
        for key in name.split("."):
            entry = entry["properties"][key]
        assert len(entry["description"]) > 10, name
        assert "default" in entry and {"type", "enum", "anyOf"} & set(entry), name
    assert "fields" not in validator.schema["properties"]["objective"]["properties"]
    assert docs(groups["optim"])["betas"] == "AdamW's decay rates."


@pytest.mark.parametrize(
    "text, said",
    [
        ("optimizer: {lr: 1}", "'optimizer' was unexpected"),
        ("optim: {lrr: 1}", "'lrr' was unexpected"),
        ("optim: {lr: fast}", "'fast' is not of type 'number'"),
        ("optim: {schedule: cosin}", "'cosin' is not one of ['cosine', 'linear', 'constant', 'wsd', 'step']"),
        ("optim: {betas: [0.9]}", "is too short"),
        ("train: {batch_size: 1.5}", "1.5 is not of type 'integer'"),
        ("log: {to: [wandbb]}", "is not valid under any of the given schemas"),
        ("objective: {name: simppo}", "'simppo' is not one of"),
        ("objective: {name: simpo, bta: 1}", "'bta' was unexpected"),
        ("objective: {name: ipo, loss_type: hinge}", "'loss_type' was unexpected"),
        ("objective: {name: dpo, loss_type: hing}", "'hing' is not one of"),
        ("objective: {name: dpo, beta: -1}", "less than or equal to the minimum of 0"),
        ("train: [1]", "is not of type 'object', 'null'"),
    ],
)
def test_what_the_reader_refuses_the_schema_refuses(validator, tmp_path, text, said):
    found = errors(validator, text)
    assert found and said in " ".join(found)
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: m}\ndata: {train: d}\n" + text + "\n")
    with pytest.raises(ValueError):
        cfg = load_config(path)
        objectives.from_name(cfg.objective.name, **cfg.objective.fields)


@pytest.mark.parametrize(
    "text",
    [
        "optim:",
        "optim: {lr: 1e-6, max_grad_norm: none, betas: [0.9, 0.95]}",
        "data: {eval: null, columns: {prompt: question}, limit: 100}",
        "log: {to: wandb, samples: 3}\ndata: {eval: x}",
        "log: {to: [trackio, tensorboard], samples: [What is 1 + 1, Hello]}",
        "objective: {name: ln-dpo, beta: 2}",
        "objective: {name: SimPO, gamma_beta_ratio: 0.5}",
    ],
)
def test_what_the_reader_takes_the_schema_takes(validator, tmp_path, text):
    assert errors(validator, text) == []
    path = tmp_path / "r.yaml"
    path.write_text(text + "\n")
    cfg = load_config(path, ["--model.path", "m", "--data.train", "d"])
    objectives.from_name(cfg.objective.name, **cfg.objective.fields)


def test_every_objective_and_its_fields_are_there(validator):
    cases = validator.schema["properties"]["objective"]["allOf"]
    assert len(cases) == len(objectives.BY_NAME)
    for case, kind in zip(cases, objectives.BY_NAME.values(), strict=True):
        assert set(case["then"]["properties"]) == {"name", *(f.name for f in dataclasses.fields(kind))}
        assert all("default" in v for k, v in case["then"]["properties"].items() if k != "name")
