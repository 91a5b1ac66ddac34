# SPDX-License-Identifier: Apache-2.0
"""A run that trains LoRA on experts, from the recipe to the served folder and on."""

import pytest
import torch

import runs
from fastpost.hf import adapter, expert_lora, folder
from fastpost.train import metrics
from fastpost.train.loop import train

EXPERTS = "[q_proj, experts.gate_up_proj, experts.down_proj]"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_and_one_that_goes_on_from_what_was_served(tmp_path):
    lora = ["--model.lora.rank", "4", "--model.lora.alpha", "32", "--model.lora.targets", EXPERTS]
    cfg = runs.recipe(tmp_path, *lora, model={"kind": "mixtral"})
    run = train(cfg)
    rows = [r for r in metrics.read(run / "metrics.jsonl") if "rewards/margins" in r]
    assert rows[0]["rewards/margins"] == 0 and rows[-1]["loss"] < rows[0]["loss"]
    trained = adapter.load(run / "adapter")
    changed = [n for n, p in trained.named_parameters() if "experts" in n and "lora_B" in n]
    assert len(changed) == 4 and all(p.any() for n, p in trained.named_parameters() if n in changed)

    served = expert_lora.save_unfused(trained, tmp_path / "model", tmp_path / "served")
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(adapter.load(served)(ids).logits, trained(ids).logits, rtol=0, atol=0)
    more = ["--model.adapter", str(served), "--train.output_dir", str(tmp_path / "again"), "--train.max_steps", "2"]
    again = train(runs.recipe(tmp_path, *more))
    assert adapter.load(again / "adapter").peft_config["default"].target_parameters
    merged = adapter.merged(adapter.load(again / "adapter"))
    out = folder.save_folder(merged, tmp_path / "model", tmp_path / "merged")
    assert torch.allclose(folder.load_model(out)(ids).logits, adapter.load(again / "adapter")(ids).logits, atol=1e-4)
