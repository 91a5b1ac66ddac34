# SPDX-License-Identifier: Apache-2.0
"""A run that trains LoRA on a mixture whose experts are in four bits, too: from the recipe to merged floats."""

import pytest
import torch

import runs
from compare import overall
from fastpost.cli import main
from fastpost.hf import adapter, expert_lora, folder
from fastpost.hf.int4_experts import stacks
from fastpost.train import metrics
from fastpost.train.loop import train

EXPERTS = "[q_proj, experts.gate_up_proj, experts.down_proj]"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_upon_experts_in_four_bits(tmp_path, capsys):
    options = ["--model.lora.rank", "4", "--model.lora.alpha", "32", "--model.lora.targets", EXPERTS,
               "--model.quantize.scheme", "nf4", "--model.quantize.group_size", "32"]  # fmt: skip
    run = train(runs.recipe(tmp_path, *options, model={"kind": "mixtral"}))
    assert "4 stacks of experts in four bits" in capsys.readouterr().out
    rows = [r for r in metrics.read(run / "metrics.jsonl") if "rewards/margins" in r]
    assert rows[0]["rewards/margins"] == 0 and rows[-1]["loss"] < rows[0]["loss"]
    trained = adapter.load(run / "adapter")
    assert len(stacks(trained)) == 4
    changed = [p for n, p in trained.named_parameters() if "experts" in n and "lora_B" in n]
    assert len(changed) == 4 and all(p.any() for p in changed)

    ids = torch.arange(5, 25)[None]
    served = expert_lora.save_unfused(trained, tmp_path / "model", tmp_path / "served")
    again = adapter.load(served)
    assert len(stacks(again)) == 4 and torch.equal(again(ids).logits, trained(ids).logits)

    assert main(["export", str(run), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0
    merged = folder.load_model(tmp_path / "merged")
    assert not stacks(merged) and overall(merged(ids).logits, trained(ids).logits) < 1e-4
