# SPDX-License-Identifier: Apache-2.0
"""Complaint 19: DPO upon an SFT adapter measured against the base model (TRL #1193, PR #6591, #5292; LLaMA-Factory
#8459, #8974).

With adapters off a LoRA model is its base. That is the reference of a new adapter, and of no other: where an SFT
adapter goes on training, the reference is that adapter, frozen. `auto` and `start` give that; `base` is refused there.
"""

import pytest

from fastpost.hf import adapter
from fastpost.objectives import DPO
from fastpost.train import metrics, reference
from fastpost.train.loop import train
from train import runs

LN_2 = 0.6931471805599453


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sft(tmp_path):
    """A run that trained an adapter far enough from its base to tell the two apart; embedding and head with it."""
    cfg = runs.recipe(
        tmp_path, "--model.lora.rank", "4", "--model.lora.alpha", "32", "--model.lora.train_embeddings", "true",
        "--model.lora.train_head", "true", "--train.output_dir", str(tmp_path / "sft"), "--optim.lr", "3e-3",
        objective={"name": "simpo"}, model={"tie": False},
    )  # fmt: skip
    train(cfg)
    return tmp_path


def recipe(tmp, *overrides):
    """DPO that goes on from the SFT adapter."""
    first = ["--model.path", str(tmp / "sft/adapter"), "--train.max_steps", "1"]
    out = ["--train.output_dir", str(tmp / f"dpo{len(list(tmp.iterdir()))}"), "--optim.precision", "fp32"]
    return runs.recipe(tmp, *first, *out, *overrides)


def first_step(cfg) -> dict:
    return metrics.read(train(cfg) / "metrics.jsonl")[1]


def begins_at_the_adapter(cfg):
    first = first_step(cfg)
    assert first["loss"] == pytest.approx(LN_2, abs=1e-7) and first["rewards/chosen"] == 0.0


@pytest.mark.parametrize("setting", ["auto", "start"])
def test_the_reference_is_the_adapter_frozen(sft, setting):
    begins_at_the_adapter(recipe(sft, "--model.reference", setting))


def test_the_mistake_is_noticed(sft, monkeypatch):
    """What others did: adapters off, whatever the adapter is."""
    plain = reference.logprobs

    def adapters_off(model, *rest):
        with adapter.off(model):
            return plain(model, *rest)

    monkeypatch.setattr(reference, "logprobs", adapters_off)
    with pytest.raises(AssertionError):
        begins_at_the_adapter(recipe(sft, "--data.cache", "none"))


def test_base_is_refused_with_the_reason(sft):
    with pytest.raises(ValueError) as error:
        train(recipe(sft, "--model.reference", "base"))
    message = str(error.value)
    adapter_folder, base = sft / "sft/adapter", (sft / "model").resolve()
    assert message.startswith("[train] model.reference: expected start, because this run goes on training the adapter")
    assert str(adapter_folder) in message and "got 'base'" in message and "PR #6591" in message
    assert message.endswith(f"--model.reference {base}")
    with pytest.raises(ValueError, match=r"model\.previous: expected start"):
        cfg = recipe(sft, "--objective.name", "inpo", "--model.previous", "base")
        train(cfg)


def test_who_says_it_by_its_path_gets_it(sft, capsys):
    """The base model as reference on purpose; the run says that the first loss has no closed form then."""
    first = first_step(recipe(sft, "--model.reference", str(sft / "model")))
    assert abs(first["rewards/chosen"]) > 0.01 and abs(first["loss"] - LN_2) > 1e-3
    assert "only meaningful if the reference is the starting model" in capsys.readouterr().out


def test_base_is_right_for_a_new_adapter_and_the_reference_stays_where_it_was(sft):
    """A new adapter: base, start and the folder's path are one reference. It does not move while the policy does."""
    own = ["--model.path", str(sft / "model"), "--model.lora.rank", "4", "--train.max_steps", "4"]
    curves = []
    for setting in ("base", "start", str(sft / "model")):
        cfg = recipe(sft, *own, "--model.reference", setting, "--optim.lr", "3e-3")
        curves.append(metrics.read(train(cfg) / "metrics.jsonl"))
    assert curves[0] == curves[1] == curves[2]
    steps = [row["loss"] for row in curves[0] if "loss" in row]
    assert steps[0] == pytest.approx(LN_2, abs=1e-7) and steps[-1] < 0.6


def test_auto_never_means_base_for_an_adapter(sft):
    cfg = recipe(sft)
    assert reference.sources(cfg.model, DPO()) == {"reference_logprob": "start"}
