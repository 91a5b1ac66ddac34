# SPDX-License-Identifier: Apache-2.0
"""Complaint 18: policy and reference disagree before the first update (NeMo-Aligner #227).

A reference that was computed by another kernel, in another precision, with dropout on or over other tokens moves the
whole loss, and nothing but its first value shows it. Here both come from the same kernel over the same packing, so DPO
begins at ln 2 to the last bits of float32, in every precision, with and without an adapter; and a run says so itself.
"""

import copy
from dataclasses import replace

import pytest
import torch

import tiny
from fastpost.hf import folder
from fastpost.train import metrics, reference
from fastpost.train.loop import train
from train import runs

LN_2 = 0.6931471805599453
WAYS = {
    "whole model": [],
    "LoRA": ["--model.lora.rank", "4"],
    "LoRA against base": ["--model.lora.rank", "4", "--model.reference", "base"],
    "LoRA, embedding and head": [
        *("--model.lora.rank", "4", "--model.lora.train_embeddings", "true", "--model.lora.train_head", "true"),
    ],
    "LoRA on the head": ["--model.lora.rank", "4", "--model.lora.targets", "[q_proj, lm_head]"],
    "LoRA with dropout": ["--model.lora.rank", "4", "--model.lora.dropout", "0.5"],  # B = 0, so it drops zeros
    "a sampling temperature": ["--model.temperature", "0.8"],
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def first_step(tmp_path, *overrides) -> dict:
    out = ["--train.output_dir", str(tmp_path / f"run{len(list(tmp_path.iterdir()))}"), "--train.max_steps", "1"]
    cfg = runs.recipe(tmp_path, *out, "--data.cache", "none", *overrides, model={"tie": False})
    return metrics.read(train(cfg) / "metrics.jsonl")[1]


def begins_together(tmp_path, *overrides):
    first = first_step(tmp_path, *overrides)
    assert first["loss"] == pytest.approx(LN_2, abs=1e-7)
    assert first["rewards/margins"] == 0.0 and first["rewards/chosen"] == 0.0


SLOW = pytest.mark.slow


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=SLOW), pytest.param("pure-bf16", marks=SLOW)])
@pytest.mark.parametrize("way", WAYS)
def test_dpo_begins_at_ln_2(tmp_path, way, precision, capsys):
    begins_together(tmp_path, *WAYS[way], "--optim.precision", precision)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("check"))
    assert "expected 0.693147" in line and line.endswith("ok")


def another_precision(model, dataset, parts, temperature, *ranks):
    return plain(copy.deepcopy(model).float(), dataset, parts, temperature)


def stored_in_half_precision(model, dataset, parts, temperature, *ranks):
    return plain(model, dataset, parts, temperature).bfloat16().float()


def other_tokens_scored(model, dataset, parts, temperature, *ranks):
    """The end of the turn is left out, as where a mask comes from comparing ids with a padding token that is EOS."""
    cut = copy.copy(dataset)
    cut.examples = [
        replace(e, sequences=tuple(replace(s, trained=bytes(s.trained[:-1]) + b"\0") for s in e.sequences))
        for e in dataset.examples
    ]
    return plain(model, cut, parts, temperature)


def means_for_sums(model, dataset, parts, temperature, *ranks):
    lengths = torch.tensor([[s.trained.count(1) for s in e.sequences] for e in dataset.examples])
    return plain(model, dataset, parts, temperature) / lengths


def another_temperature(model, dataset, parts, temperature, *ranks):
    return plain(model, dataset, parts, 0.8 * temperature)


plain = reference.logprobs
MISTAKES = [another_precision, stored_in_half_precision, other_tokens_scored, means_for_sums, another_temperature]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_the_mistakes_are_noticed(tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(reference, "logprobs", mistake)
    with pytest.raises(AssertionError):
        begins_together(tmp_path)


def test_dropout_in_the_policy_is_noticed(tmp_path):
    """The reference is computed without dropout; a policy that drops from the first step on is another model."""
    tiny.folder(tmp_path / "model", tie=False, attention_dropout=0.2)
    tiny.write_jsonl(tmp_path / "train.jsonl", tiny.preference_rows(22))
    tiny.write_jsonl(tmp_path / "eval.jsonl", tiny.preference_rows(6, seed=7))
    with pytest.raises(AssertionError):
        begins_together(tmp_path)


@pytest.mark.parametrize("mistake", [means_for_sums, another_temperature], ids=lambda f: f.__name__)
def test_the_run_itself_speaks_up(tmp_path, monkeypatch, mistake, capsys):
    """What is beyond rounding is said in the output of the run."""
    monkeypatch.setattr(reference, "logprobs", mistake)
    first_step(tmp_path)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("check"))
    assert "WARNING: policy and reference disagree before the first update" in line


@SLOW
def test_the_cache_does_not_move_the_first_loss(tmp_path):
    """Values made by one run serve another, but only where computing them again would give the same bits."""
    cache = ["--data.cache", str(tmp_path / "cache")]
    for way in ("whole model", "LoRA", "LoRA on the head", "LoRA against base"):
        for precision in ("bf16", "pure-bf16"):
            begins_together(tmp_path, *WAYS[way], "--optim.precision", precision, *cache)


def test_tiny_differences_are_there_to_be_noticed(tmp_path):
    """The model of these tests tells precisions apart; a uniform one would pass whatever is broken."""
    path = tiny.folder(tmp_path / "m", tie=False)
    ids = torch.arange(5, 25)[None]
    logits = [folder.load_model(path, d)(ids).logits.float().log_softmax(-1) for d in (torch.float32, torch.bfloat16)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
