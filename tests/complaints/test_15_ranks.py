# SPDX-License-Identifier: Apache-2.0
"""Complaint 15: the loss depends on the number of ranks, because each divides by its own count.

(transformers #34242, PR #34373; torchtitan PR #2206; prime-rl PR #2562, #1960)"""

import pytest

import launch
import runs
import tiny
from fastpost.train.distributed import Ranks
from fastpost.train.loop import train


def curve(tmp, ranks, parallel, before=lambda: None):
    """SFT, a mean over tokens; the two micro-batches of a step have unlike numbers of them."""
    out = tmp / f"{parallel}-{ranks}"
    cfg = runs.recipe(
        tmp,
        objective={"name": "sft"},
        optim={"lr": 1e-3, "precision": "fp32", "max_grad_norm": None},
        train={"output_dir": out, "batch_size": 4, "micro_batch_size": 3, "save_every": 0, "parallel": parallel,
               "max_steps": 4},
    )  # fmt: skip
    tiny.write_jsonl(tmp / "train.jsonl", tiny.sft_rows(16))
    cfg.data.eval = None

    def action():
        before()
        train(cfg)

    assert launch.Forked(action, ranks).wait() == [0] * ranks
    return launch.losses(out)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_do_not_change_the_loss(tmp_path, parallel):
    assert (curve(tmp_path, 2, parallel) - curve(tmp_path, 1, "auto")).abs().max() < 1e-7


def each_its_own():
    """The mistake: a rank divides by its own count, and gradients are averaged over ranks."""
    Ranks.sum = lambda self, value: value * self.size


def test_a_denominator_of_its_own_would_be_seen(tmp_path):
    assert (curve(tmp_path, 2, "ddp", each_its_own) - curve(tmp_path, 1, "auto")).abs().max() > 1e-4
