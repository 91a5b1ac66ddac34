# SPDX-License-Identifier: Apache-2.0
"""Schedules against values worked out by hand."""

import math

import pytest

from fastpost.train.schedule import factor, warmup_steps


def test_warmup_rises_to_the_peak():
    values = [factor(s, total=100, warmup=5, shape="cosine") for s in range(6)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])  # at 5 % of the steps: the peak


def test_first_step_moves_and_last_step_too():
    for shape in ("constant", "linear", "cosine"):
        assert factor(0, total=10, warmup=0, shape=shape) == 1.0
        assert factor(9, total=10, warmup=0, shape=shape) > 0.0


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_shapes(floor):
    def value(step, shape):
        return factor(step, total=110, warmup=10, shape=shape, floor=floor)

    for step in (10, 35, 60, 85, 110):
        progress = (step - 10) / 100
        assert value(step, "constant") == 1.0
        assert value(step, "linear") == pytest.approx(floor + (1 - floor) * (1 - progress))
        assert value(step, "cosine") == pytest.approx(floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
    assert value(110, "cosine") == value(500, "cosine") == pytest.approx(floor)


def test_degenerate_lengths():
    assert factor(0, total=1, warmup=1, shape="cosine") == 1.0
    assert factor(0, total=1, warmup=0, shape="linear") == 1.0
    assert factor(2, total=3, warmup=9, shape="linear") == pytest.approx(1 / 3)  # a warm-up longer than the run


def test_warmup_steps():
    assert warmup_steps(248, 0.1) == 25
    assert warmup_steps(100, 0.05) == 5  # not 6: 100 * 0.05 is 5.000000000000001 / 5.0 depending on the ratio
    assert warmup_steps(100, 0.07) == 7
    assert warmup_steps(100, 0.1, steps=3) == 3
    assert warmup_steps(100, 0.1, steps=0) == 0


def test_unknown_shape():
    with pytest.raises(ValueError, match=r"\[schedule\] shape: expected one of constant, linear, cosine, got 'wsd'"):
        factor(0, total=1, shape="wsd")
