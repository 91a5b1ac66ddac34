# SPDX-License-Identifier: Apache-2.0
import pytest

import tiny
from fastpost import cli, objectives
from fastpost.cli.recipes import recipes, summary
from fastpost.data.loader import load_dataset
from fastpost.train.config import load_config


def test_ls_and_cp(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "ls"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("simpo", "dpo", "sft", "kto"))
    assert cli.main(["recipes", "cp", "simpo"]) == 0
    assert (tmp_path / "simpo.yaml").read_text() == recipes()["simpo"].read_text()
    assert cli.main(["recipes", "cp", "dpo.yaml", "mine.yaml"]) == 0 and (tmp_path / "mine.yaml").exists()
    capsys.readouterr()
    (tmp_path / "simpo.yaml").write_text("edited")
    assert cli.main(["recipes", "cp", "simpo"]) == 1
    assert capsys.readouterr().err == (
        "fastpost: simpo.yaml: expected a new file, got one that exists already and is not overwritten. "
        "Name another file.\n"
    )
    assert (tmp_path / "simpo.yaml").read_text() == "edited"
    assert cli.main(["recipes", "cp", "simppo"]) == 1
    assert "there is no recipe 'simppo'. Did you mean 'simpo'?" in capsys.readouterr().err
    assert cli.main(["recipes", "rm", "simpo"]) == 1


@pytest.mark.parametrize("name", sorted(recipes()))
def test_each_recipe_reads_and_its_data_loads(name, tmp_path):
    """Strict reading, the objective's own checks, and rows of the kind that the recipe asks for."""
    assert (
        recipes()[name].read_text().startswith(f"# {summary(recipes()[name])}\n") and len(summary(recipes()[name])) > 20
    )
    cfg = load_config(recipes()[name], ["--model.path", "m", "--data.train", "d"])
    objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
    rows = {"kto": tiny.unpaired_rows, "sft": tiny.sft_rows}.get(name, tiny.preference_rows)(4)
    if name == "two-part-sft":
        rows = [{"prompt": "2 + 3?", "rationale": "It is ", "answer": f"{i}"} for i in range(4)]
    cfg.data.train = str(tiny.write_jsonl(tmp_path / "d.jsonl", rows))
    data = load_dataset(cfg.data, tiny.tokenizer(), objective)
    assert len(data) == 4 and data.batch([0, 1]).scored > 0
