# SPDX-License-Identifier: Apache-2.0
"""JetMoE from scratch, in miniature: pre-training with both router losses in JetMoE's convention equals plain torch
with transformers' eager modules; then SFT, then DPO."""

import json
import math

import pytest
import torch

import plain_jetmoe
import tiny
from fastpost.cli.dry_run import dry_run
from fastpost.data.loader import load_dataset
from fastpost.hf import folder
from fastpost.train import memory, metrics
from fastpost.train.config import load_config
from fastpost.train.loop import train
from fastpost.train.plan import Plan
from fastpost.train.recompute import recompute

pytestmark = pytest.mark.usefixtures("one_thread")
ROUTERS = {"router_loss": "jetmoe", "router_aux_loss": 0.01, "router_z_loss": 0.001}
STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A JetMoE of two layers without weights, and text."""
    path = tmp_path_factory.mktemp("jetmoe")
    tiny.folder(path / "new", "jetmoe", initializer_range=0.2)  # wide, so that rounding sends no token elsewhere
    (path / "new/model.safetensors").unlink()
    everyday = [{"text": "The basket is there. " * (1 + i % 3)} for i in range(40)]
    sums = [{"text": f"What is the sum of {i} and {3 * i}? The answer is {4 * i}."} for i in range(60)]
    for name, rows in {"everyday": everyday, "sums": sums}.items():
        tiny.write_jsonl(path / f"{name}.jsonl", rows)
    tiny.write_jsonl(path / "chats.jsonl", tiny.sft_rows(16))
    tiny.write_jsonl(path / "pairs.jsonl", tiny.preference_rows(16))
    return path


def pretrain(place, out, *overrides):
    """Nine steps at 3 : 1, then three of decay at 1 : 3."""
    sources = [("everyday", [3, 1]), ("sums", [1, 3])]
    train_on = [{"path": str(place / f"{name}.jsonl"), "ratio": r, "repeat": True} for name, r in sources]
    tree = {
        "model": {"path": place / "new", "from_scratch": True, **ROUTERS},
        "data": {"train": train_on, "pack": "unmasked-blocks", "max_length": 32, "epoch_tokens": [9 * 128, 3 * 128]},
        "objective": {"name": "sft"},
        "optim": {
            "lr": 5e-3, "schedule": "wsd", "warmup_ratio": 0.25, "warmup_from": 0.1, "stable_ratio": 0.75,
            "decay": "exponential", "min_lr_ratio": 0.1, "betas": [0.9, 0.95], "weight_decay": 0.1, "precision": "fp32",
        },
        "train": {"output_dir": out, "epochs": 2, "batch_size": 4},
        "log": {"plot": False},
    }  # fmt: skip
    return load_config(tiny.recipe(place / "pretrain.yaml", **tree), overrides)


@pytest.fixture(scope="module")
def pretrained(place):
    torch.set_num_threads(1)
    return train(pretrain(place, place / "pretrain"))


def rows(run):
    return [row for row in metrics.read(run / "metrics.jsonl") if "loss" in row]


def test_the_curve_is_that_of_plain_torch(place, pretrained):
    ours, plain = rows(pretrained), list(plain_jetmoe.train(load_config(pretrained / "config.yaml")))
    assert len(ours) == len(plain) == STEPS
    for name in ("loss", "aux_loss", "z_loss", "router/load_max", "router/load_min"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in plain], rel=2e-5), name
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.5
    # Both losses are in it, with sums over 4 routers: each is nowhere near a mean.
    assert all(4 <= row["aux_loss"] < 8 and row["z_loss"] > 4 for row in ours)
    assert all(0 <= row["router/load_min"] < 1 < row["router/load_max"] <= 2 for row in ours)  # top 2 of 4: 2 is all


def test_the_two_losses_and_their_sum_matter(place, pretrained):
    """The mistakes: transformers' mean in the place of the sum, and no z loss."""
    expected, cfg = rows(pretrained), load_config(pretrained / "config.yaml")
    for setting in ("--model.router_loss=transformers", "--model.router_z_loss=0"):
        wrong = rows(train(pretrain(place, place / setting[-8:], setting, "--train.max_steps", "2")))
        assert abs(wrong[0]["loss"] - expected[0]["loss"]) > 1e-3
    assert cfg.model.router_z_loss == 0.001


def test_the_rate_and_the_mixture_have_three_stages(pretrained):
    cfg = load_config(pretrained / "config.yaml")
    rates = [row["learning_rate"] for row in rows(pretrained)]
    warm, stable = [0.4, 0.7, 1.0], [1.0] * 7
    decay = [0.1 ** (k / 3) for k in (1, 2)]  # a tenth would be reached one step after the last
    assert rates == pytest.approx([5e-3 * x for x in (*warm, *stable, *decay)])
    data = load_dataset(cfg.data, folder.load_tokenizer(cfg.model.path))
    plan = Plan(cfg, data)
    assert plan.steps == STEPS
    sums = [sum(row >= data.parts[1].start for row in plan.rows(step)) for step in range(STEPS)]
    assert (sum(sums[:9]), sum(sums[9:])) == (9, 9)  # blocks of four a step: a quarter, then three quarters


def stage(place, name, start, objective, data, *overrides):
    tree = {
        "model": {"path": start, **ROUTERS},
        "data": {"train": place / data},
        "objective": {"name": objective},
        "optim": {"lr": 1e-2, "precision": "fp32"},
        "train": {"output_dir": place / name, "epochs": 2, "batch_size": 8, "max_tokens_per_micro_batch": 200},
        "log": {"plot": False},
    }
    return train(load_config(tiny.recipe(place / f"{name}.yaml", **tree), overrides))


@pytest.mark.parametrize("precision, close", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_sft_and_dpo_go_on_from_it(place, pretrained, capsys, precision, close):
    start = json.loads((pretrained / "model/config.json").read_text())
    assert (start["model_type"], start["dtype"]) == ("jetmoe", "float32")
    precise = ("--optim.precision", precision)
    sft = stage(place, f"sft-{precision}", pretrained, "sft", "chats.jsonl", *precise)
    found = rows(sft)
    assert found[-1]["loss"] < found[0]["loss"] - 0.1
    capsys.readouterr()
    dpo = stage(place, f"dpo-{precision}", sft, "dpo", "pairs.jsonl", *precise)
    found = rows(dpo)
    own = [row["loss"] - 0.01 * row["aux_loss"] - 0.001 * row["z_loss"] for row in found]
    assert own[0] == pytest.approx(math.log(2), abs=close)
    assert own[-1] < 0.6 and found[-1]["rewards/accuracies"] > 0.8
    said = capsys.readouterr().out
    assert "(expected 0.693147, difference" in said and "   ok\n" in said
    assert "aux loss 0.01 x load balance, z loss 0.001 x logsumexp^2, summed over routers\n" in said


def test_a_dry_run_goes_through_its_shapes(place, capsys):
    """Where transformers' loop over experts asks for numbers, which shapes have not."""
    cfg = pretrain(place, place / "dry", "--train.batch_size", "32")
    dry_run(cfg, [])
    said = capsys.readouterr().out
    assert "\nsteps   3 of 32 rows" in said and "\nmemory  weights " in said and "\nrouter  4 experts, top 2, " in said
    batch = load_dataset(cfg.data, folder.load_tokenizer(cfg.model.path)).batch(list(range(32)))
    peaks = {}
    for name, model in (("jetmoe", memory.shape_model(place / "new", torch.float32)), ("llama", None)):
        if model is None:
            tiny.folder(place / "llama")
            model = memory.shape_model(place / "llama", torch.float32)
        peaks[name] = memory.estimate(model, cfg, batch, 1, torch.device("cpu")).activations
    assert 1.5 < peaks["jetmoe"] / peaks["llama"] < 10  # two experts a token in attention and MLP, not none and not all


def test_recomputation_that_transformers_lacks_is_refused(place):
    model = tiny.model("jetmoe")
    recompute(model, "auto", torch.device("cpu"))
    for how in ("selective", "full"):
        with pytest.raises(ValueError, match=f"expected auto or none, because .* JetMoeForCausalLM, got {how}"):
            recompute(model, how, torch.device("cpu"))
