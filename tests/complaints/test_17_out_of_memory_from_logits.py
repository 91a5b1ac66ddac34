# SPDX-License-Identifier: Apache-2.0
"""Complaint 17: training runs out of memory in float32 logits of [tokens, vocabulary]. Here: a step's memory stays
under a bound that knows nothing of tokens times vocabulary."""

from array import array

import pytest
import torch

import runs
import tiny
from fastpost import objectives
from fastpost.data.collate import Example, Sequence, collate
from fastpost.train import memory, step
from fastpost.train.forward import forward
from fastpost.train.optim import AdamW

VOCABULARY, PAIRS, LENGTH = 131072, 4, 512
LOGITS = 4 * VOCABULARY * PAIRS * 2 * (LENGTH - 1)  # bytes, float32: 2.1 GB
BUDGET, WEIGHT = 256 << 20, 4 * VOCABULARY * 32  # fastpost's default, and a float32 copy of the output matrix
BOUND = BUDGET + 8 * WEIGHT + (128 << 20)  # gradients, moments touched for the first time, activations of a tiny model
CPU = torch.device("cpu")


def batch():
    ids = [[(7 * i + 11 * j) % VOCABULARY for i in range(LENGTH)] for j in range(2 * PAIRS)]
    made = [Sequence(array("i", row), b"\0" + b"\1" * (LENGTH - 1)) for row in ids]
    return collate([Example(i, (made[2 * i], made[2 * i + 1])) for i in range(PAIRS)])


def added(action) -> float:
    """Bytes that `action` adds to this process at its worst moment."""
    before = memory.reset_peak(CPU)
    if before is None:
        pytest.skip("this system does not let a process forget its peak memory")
    action()
    return memory.peak(CPU) - before


def in_child(action, tmp_path) -> float:
    def measured():
        (tmp_path / "bytes").write_text(str(added(action)))

    assert runs.in_child(measured, 120) == 0
    return float((tmp_path / "bytes").read_text())


@pytest.mark.parametrize("name", ["simpo", "sft"])
def test_a_step_with_a_large_vocabulary_stays_small(tmp_path, name):
    model, b, objective = tiny.model(vocab_size=VOCABULARY), batch(), objectives.from_name(name)
    optimizer = AdamW(model, precision="fp32")

    def one():
        step.train_step(model, objective, optimizer, [b], step=0, lr=1e-4, max_grad_norm=1.0)

    used = in_child(one, tmp_path)
    assert used < BOUND < 0.6 * LOGITS, f"{used / 1e6:.0f} MB, bound {BOUND / 1e6:.0f}"


def test_scoring_too(tmp_path):
    model, b = tiny.model(vocab_size=VOCABULARY), batch()

    @torch.no_grad()
    def score():
        forward(model, b, objectives.SFT())

    assert in_child(score, tmp_path) < BUDGET + (128 << 20)


def test_the_mistake_would_be_seen(tmp_path):
    """The plain way: logits in float32, log-softmax, gather. It passes the bound several times over."""
    model, b = tiny.model(vocab_size=VOCABULARY), batch()

    def plain():
        out = model(input_ids=b.input_ids[:, :LENGTH])  # one sequence of eight
        logprob = out.logits[0, :-1].float().log_softmax(-1).gather(-1, b.target[: LENGTH - 1, None])
        logprob.sum().backward()

    assert 2 * PAIRS * in_child(plain, tmp_path) > 2 * BOUND
