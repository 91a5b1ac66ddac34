# SPDX-License-Identifier: Apache-2.0
"""Complaint 14: gradient accumulation changes the loss, and the last, short window of an epoch most of all.

(transformers PR #34191, #35438, #37766; TRL #2175; ms-swift PR #10084; axolotl #1100)"""

import pytest

import launch
import runs
import tiny
from fastpost.train import loop, step
from fastpost.train.forward import lengths
from fastpost.train.loop import train

NAMES = ("sft", "simpo")


def curve(tmp, name, micro_batch_size):
    """Two epochs of 8 + 8 + 3 rows of different lengths; SFT's loss is a mean over tokens."""
    out = tmp / f"{name}-{micro_batch_size}"
    cfg = runs.recipe(
        tmp,
        rows=19,
        objective={"name": name},
        optim={"lr": 1e-3, "precision": "fp32"},
        train={"output_dir": out, "micro_batch_size": micro_batch_size, "save_every": 0, "eval_every": 0},
    )
    tiny.write_jsonl(tmp / "train.jsonl", (tiny.sft_rows if name == "sft" else tiny.preference_rows)(19))
    cfg.data.eval = None
    assert launch.Forked(lambda: train(cfg), 1).wait() == [0]
    return launch.losses(out)


def differ(tmp, name):
    whole = curve(tmp, name, 8)
    return max((curve(tmp, name, size) - whole).abs().max() for size in (1, 3))


@pytest.mark.parametrize("name", NAMES)
def test_accumulation_does_not_change_the_loss(tmp_path, name):
    assert differ(tmp_path, name) < 2e-6


def test_a_mean_of_means_would_be_seen(tmp_path, monkeypatch):
    """The mistake: each micro-batch is divided by its own count, and the means are averaged."""
    right_step, right_forward = loop.train_step, step.forward

    def wrong_step(model, objective, optimizer, batches, **keywords):
        counts = [float(objective.count(lengths(b))) for b in batches]

        def forward(model, batch, objective, temperature):
            output = right_forward(model, batch, objective, temperature)
            own = float(objective.count(lengths(batch)))
            return output._replace(losses=output.losses * (sum(counts) / (len(counts) * own)))

        monkeypatch.setattr(step, "forward", forward)
        return right_step(model, objective, optimizer, batches, **keywords)

    monkeypatch.setattr(loop, "train_step", wrong_step)
    for name in NAMES:
        assert differ(tmp_path, name) > 1e-3


def test_a_window_taken_for_a_full_one_would_be_seen(tmp_path, monkeypatch):
    """The mistake: the short last window is divided by the size of a full one."""
    right = loop.train_step

    def wrong(model, objective, optimizer, batches, **keywords):
        forward = step.forward
        rows = sum(len(b.rows) for b in batches)

        def scaled(*args):
            output = forward(*args)
            return output._replace(losses=output.losses * (rows / 8 if len(batches) > 1 else 1.0))

        monkeypatch.setattr(step, "forward", scaled)
        values = right(model, objective, optimizer, batches, **keywords)
        monkeypatch.setattr(step, "forward", forward)
        return values

    monkeypatch.setattr(loop, "train_step", wrong)
    assert differ(tmp_path, "simpo") > 1e-3
