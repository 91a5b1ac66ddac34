# SPDX-License-Identifier: Apache-2.0
"""model.from_scratch: a run that starts from config.json alone, by transformers' own initialisation."""

import json
import signal

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import launch
import runs
import tiny
from fastpost import cli
from fastpost.cli.dry_run import dry_run
from fastpost.hf import folder
from fastpost.train import loop, metrics
from fastpost.train.config import load_config
from fastpost.train.evaluate import evaluate_config
from fastpost.train.export import export
from fastpost.train.forward import load_policy
from fastpost.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(tmp, *overrides, kind="llama", out="run", objective="sft"):
    """SFT on 16 chats from random weights: 4 steps of 8 rows in micro-batches of 4."""
    place = tmp / "new"
    if not place.exists():
        tiny.folder(place, kind)
        (place / "model.safetensors").unlink()
        tiny.write_jsonl(tmp / "chats.jsonl", tiny.sft_rows(16))
    tree = {
        "model": {"path": place, "from_scratch": True},
        "data": {"train": tmp / "chats.jsonl"},
        "objective": {"name": objective},
        "optim": {"lr": 1e-2, "warmup_ratio": 0},
        "train": {"output_dir": tmp / out, "epochs": 2, "batch_size": 8, "micro_batch_size": 4, "save_every": 2},
        "log": {"plot": False},
    }
    return load_config(tiny.recipe(tmp / "recipe.yaml", **tree), overrides)


def drawn(path, seed):
    """transformers' own model of a config.json."""
    torch.manual_seed(seed)
    return tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(path), dtype=torch.float32)


def losses(run):
    return [row["loss"] for row in metrics.read(run / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("kind", ["llama", "mixtral", "jetmoe"])
def test_the_start_is_transformers_own(tmp_path, kind):
    cfg = recipe(tmp_path, "--train.seed", "3", "--optim.precision", "fp32", kind=kind)
    before = torch.random.get_rng_state()
    ours = load_policy(cfg, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)
    own = drawn(cfg.model.path, 3).state_dict()
    assert ours.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in ours.state_dict().items())
    cfg.train.seed = 4
    other = load_policy(cfg, torch.device("cpu")).state_dict()
    assert not torch.equal(other["model.embed_tokens.weight"], own["model.embed_tokens.weight"])


@pytest.mark.parametrize("precision, dtype", [("bf16", "F32"), ("fp32", "F32"), ("pure-bf16", "BF16")])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])  # the second has keys that transformers renames on the way in
def test_the_result_is_a_folder_that_others_load(tmp_path, kind, precision, dtype):
    cfg = recipe(tmp_path, "--optim.precision", precision, kind=kind)
    model = train(cfg) / "model"
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.05
    assert {entry["dtype"] for entry in folder.header(model / "model.safetensors").values()} == {dtype}
    config = json.loads((model / "config.json").read_text())
    assert config["dtype"] == ("float32" if dtype == "F32" else "bfloat16")
    own = json.loads((tmp_path / "new" / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "dtype"} == {k: v for k, v in own.items() if k != "dtype"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (model / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    loaded, report = tf.AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    ours = folder.load_model(model)
    ids = torch.tensor([[5, 9, 200, 31]])
    torch.testing.assert_close(ours(ids).logits, loaded.float()(ids).logits, rtol=1e-4, atol=1e-4)
    # And it goes on as any other folder does.
    again = recipe(tmp_path, "--model.path", str(tmp_path / "run"), "--model.from_scratch", "false", out="second")
    assert losses(train(again))[0] < found[0]


def test_a_broken_run_goes_on_to_the_bit(tmp_path):
    whole = recipe(tmp_path, out="whole")
    train(whole)
    cfg = recipe(tmp_path)
    assert runs.in_child(runs.killed_at(cfg, loop, "train_step", 3, after=True)) == -signal.SIGKILL
    train(cfg)
    assert runs.outcome(tmp_path / "run") == runs.outcome(tmp_path / "whole")
    # Another seed is another start, so it is another run.
    with pytest.raises(ValueError, match=r"train\.seed is 0 there, 1 now"):
        train(recipe(tmp_path, "--train.seed", "1"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["llama", "jetmoe"])
def test_all_ranks_start_alike(tmp_path, kind, parallel):
    for ranks, name in ((1, "auto"), (2, parallel)):
        cfg = recipe(tmp_path, "--optim.precision", "fp32", kind=kind, out=name)
        cfg.train.parallel = name
        assert launch.Forked(lambda cfg=cfg: train(cfg), ranks).wait() == [0] * ranks
    assert losses(tmp_path / parallel) == pytest.approx(losses(tmp_path / "auto"), rel=1e-5)
    alone, ours = (load_file(tmp_path / name / "model/model.safetensors") for name in ("auto", parallel))
    assert alone.keys() == ours.keys()
    for name, value in alone.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_what_comes_before_and_after_the_run(tmp_path, capsys):
    """A dry run, an evaluation of the random start, and the export of a run that is not finished."""
    cfg = recipe(tmp_path)
    cfg.data.eval = cfg.data.train
    dry_run(cfg, [])
    assert "forward and backward of the longest micro-batch" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    start = evaluate_config(cfg)["loss"]
    assert runs.in_child(runs.killed_at(cfg, loop, "train_step", 3, after=True)) == -signal.SIGKILL
    assert metrics.read(tmp_path / "run/metrics.jsonl")[0]["eval_loss"] == pytest.approx(start, rel=1e-5)
    export(tmp_path / "run", tmp_path / "out", updates=True)
    assert evaluate_config(cfg, tmp_path / "out")["loss"] < start
    assert "loaded again" in capsys.readouterr().out


def message(tmp, capsys, *overrides) -> str:
    recipe(tmp)
    assert cli.main(["train", str(tmp / "recipe.yaml"), *overrides]) == 1
    assert not (tmp / "run/metrics.jsonl").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["--model.lora.rank", "4"], "model.lora.rank: expected nothing with model.from_scratch, which trains every"),
        (["--model.freeze", "[embed_tokens]"], "model.freeze: expected nothing with model.from_scratch"),
        (["--model.train", "[last:1]"], "model.train: expected nothing with model.from_scratch"),
        (["--model.quantize.scheme", "nf4"], "model.quantize.scheme: expected nothing with model.from_scratch"),
        (["--model.adapter", "a"], "model.adapter: expected nothing with model.from_scratch"),
        (["--model.from_scratch", "false"], "expected model*.safetensors, found none."),
        (["--objective.name", "dpo"], "model.reference: expected columns or the folder of a model, because model."),
        (["--model.from_scratch", "never"], "--model.from_scratch: expected true or false, got a string 'never'."),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, capsys, overrides, said):
    assert said in message(tmp_path, capsys, *overrides)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_are_not_passed_over(tmp_path, capsys, name):
    recipe(tmp_path)
    (tmp_path / "new" / name).write_bytes(b"")
    assert message(tmp_path, capsys) == (
        f"fastpost: [train] model.from_scratch: expected a folder with config.json and tokenizer but no weights, got "
        f"{tmp_path}/new with {name}. Leave it out to train these weights, or copy config.json and the tokenizer's "
        "files into a folder of their own.\n"
    )


def test_a_quantised_config_is_refused(tmp_path, capsys):
    recipe(tmp_path)
    file = tmp_path / "new/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    assert "expected a config.json without quantization_config" in message(tmp_path, capsys)
