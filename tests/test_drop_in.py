# SPDX-License-Identifier: Apache-2.0
"""linear_logprob in the place of log_softmax(lm_head(h)).gather: a plain PyTorch loop gives the same training curve."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import tiny

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.drop_in import compare, curve, plain

pytest.importorskip("transformers")


@pytest.fixture
def batches():
    """15 steps of 4 x 24 tokens with something to learn: each token is the one before it plus one, mostly."""
    g = torch.Generator().manual_seed(0)
    start = torch.randint(0, 250, (15, 4, 1), generator=g)
    noise = torch.randint(0, 2, (15, 4, 24), generator=g)
    return (start + torch.arange(24) + noise) % 320


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind, tie", [("llama", True), ("llama", False), ("qwen3", True)])
def test_same_training_curve(batches, autocast, kind, tie):
    result = compare(lambda: tiny.model(kind, tie=tie).train(), batches, autocast, lr=1e-2)
    losses = result["curves"]["plain"]
    assert losses[-1] < losses[0] - 0.3, "the run must move, or equal curves mean nothing"
    assert 0 < result["noise_floor"] < (1e-4 if not autocast else 5e-2) * losses[0]
    assert result["difference"] <= 2 * result["noise_floor"]


def test_a_wrong_gradient_would_be_seen(batches):
    """The comparison has teeth: a gradient one percent too large for the hidden states leaves the noise at once."""

    def wrong(hidden, lm_head, target):
        return plain(hidden + 0.01 * (hidden - hidden.detach()), lm_head, target)

    right, off = (curve(tiny.model().train(), batches, f, False, 1e-2) for f in (plain, wrong))
    floor = compare(lambda: tiny.model().train(), batches, False, 1e-2)["noise_floor"]
    assert max(abs(a - b) for a, b in zip(right, off)) > 10 * floor
