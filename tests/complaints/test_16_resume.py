# SPDX-License-Identifier: Apache-2.0
"""Complaint 16: a resumed run is another run: rows come again or never, dropout and Adam's moments start anew.

(transformers #11323, #17032, PR #40691, PR #46628; accelerate PR #4071; ms-swift #10050; meta-pytorch/data #1437;
torchtitan #811)"""

import signal

import pytest

import launch
import runs
from fastpost.train import checkpoint, loop, metrics
from fastpost.train.loop import train
from fastpost.train.optim import AdamW
from fastpost.train.plan import Plan


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("unbroken")
    assert launch.Forked(lambda: train(recipe(tmp, "run")), 1).wait() == [0]
    return tmp


def recipe(tmp, out):
    """Steps 1 to 3 are epoch 0, 4 to 6 epoch 1; checkpoints after 2 and 4. Dropout is on."""
    return runs.recipe(tmp, model={"attention_dropout": 0.2}, train={"output_dir": tmp / out, "eval_every": 0})


def resumed(tmp, out, at, before=lambda: None):
    """The steps of a run that is killed in step `at` and started again, after `before()`."""
    cfg = recipe(tmp, out)
    assert launch.Forked(runs.killed_at(cfg, loop, "train_step", at), 1).wait() == [-signal.SIGKILL]

    def action():
        before()
        train(cfg)

    assert launch.Forked(action, 1).wait() == [0]
    return metrics.read(tmp / out / "metrics.jsonl")


@pytest.mark.parametrize("at", [3, 4, 5, 6])
def test_resumed_in_the_middle_of_an_epoch(unbroken, at):
    """Mid-epoch, at the end of an epoch, in the second one: every logged number is the same to the last bit."""
    assert resumed(unbroken, f"at{at}", at) == metrics.read(unbroken / "run/metrics.jsonl")


def forget_the_place():
    """The data begin anew after the checkpoint of step 4."""
    parts = Plan.parts
    Plan.parts = lambda self, step: parts(self, step - 4 if step >= 4 else step)


def forget_the_random_state():
    checkpoint._set_random = lambda states, ranks: None


def forget_the_moments():
    AdamW.tensors = lambda self: ((n, t) for n, t in [*tensors(self)] if not n.startswith("exp_avg"))


tensors = AdamW.tensors


@pytest.mark.parametrize("mistake", [forget_the_place, forget_the_random_state, forget_the_moments])
def test_each_kind_of_forgetting_would_be_seen(unbroken, mistake):
    ours = resumed(unbroken, mistake.__name__, 5, mistake)
    assert [r["step"] for r in ours] == [r["step"] for r in metrics.read(unbroken / "run/metrics.jsonl")]
    assert ours != metrics.read(unbroken / "run/metrics.jsonl")
