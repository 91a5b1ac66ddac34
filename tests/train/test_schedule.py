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


def test_warmup_from_a_share_of_the_peak():
    values = [factor(s, total=100, warmup=5, shape="constant", warmup_from=0.1) for s in range(6)]
    assert values == pytest.approx([0.28, 0.46, 0.64, 0.82, 1.0, 1.0])


# ---- wsd -----------------------------------------------------------------------------------------------------------


def wsd(step, total=100, **options):
    return factor(step, total=total, shape="wsd", **options)


def test_wsd_is_the_one_of_llama_3_syne():
    """Their factor: 1 up to stable_ratio * T, then max(.1, (T - s) / (T - stable_ratio * T)); s counts from 0, as
    torch's LambdaLR hands it out: step 99 is the last of 100."""
    values = [wsd(s, stable_ratio=0.9, floor=0.1) for s in range(100)]
    assert values[:91] == [1.0] * 91
    assert values[91] == pytest.approx(0.9) and values[95] == pytest.approx(0.5) and values[99] == pytest.approx(0.1)
    assert values == [1.0 if s < 90 else pytest.approx(max(0.1, (100 - s) / 10)) for s in range(100)]
    assert [wsd(s, stable_ratio=1.0, floor=0.1) for s in (0, 50, 99, 100, 500)] == [1.0] * 5  # as their script sets it


def test_wsd_of_jetmoe_has_three_stages():
    """1.25T tokens, 4M a step: 10B of warm-up, 250B of decay, both ends at a tenth of the peak."""
    total = 312_500
    options = {"total": total, "warmup": warmup_steps(total, 0.008), "stable_ratio": 0.8, "floor": 0.1}
    options |= {"warmup_from": 0.1, "decay": "exponential"}
    assert options["warmup"] == 2500
    assert wsd(0, **options) == pytest.approx(0.1, rel=0.01)
    assert wsd(1249, **options) == pytest.approx(0.55)
    assert wsd(2499, **options) == wsd(2500, **options) == wsd(250_000, **options) == 1.0
    assert wsd(250_001, **options) < 1.0
    assert wsd(281_250, **options) == pytest.approx(10**-0.5)
    assert 0.1 < wsd(total - 1, **options) < 0.10001
    assert wsd(total, **options) == pytest.approx(0.1)


@pytest.mark.parametrize("decay, half", [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - 0.5**0.5)])
def test_wsd_decays_from_the_peak_to_the_floor(decay, half):
    values = [wsd(s, stable_ratio=0.5, decay=decay) for s in range(101)]
    assert values[50] == 1.0 and values[75] == pytest.approx(half) and values[99] > 0.0
    assert values[100] == pytest.approx(0.0, abs=1e-12)
    assert values == sorted(values, reverse=True)
    assert min(wsd(s, stable_ratio=0.5, decay=decay, floor=0.25) for s in range(200)) == 0.25


def test_wsd_that_does_not_fit():
    with pytest.raises(ValueError, match=r"stable_ratio: 0.1 of 100 steps is 10, within the warm-up of 20"):
        wsd(50, stable_ratio=0.1, warmup=20)
    with pytest.raises(ValueError, match=r"decay: expected one of linear, cosine, sqrt, exponential, got 'exp'"):
        wsd(0, decay="exp")
    with pytest.raises(ValueError, match=r"floor: expected more than 0 with an exponential decay, got 0.0"):
        wsd(0, decay="exponential")


# ---- steps ---------------------------------------------------------------------------------------------------------


def test_steps_of_chocollama():
    """3e-4, times .85 every 6212 of 62115 steps: nine decays by the end."""

    def lr(step):
        return 3e-4 * factor(step, total=62_115, shape="step", step_decay=(6212, 0.85))

    for k in range(9):
        assert lr(6212 * k) == lr(6212 * k + 6211) == pytest.approx(3e-4 * 0.85**k)
    assert lr(62_114) == pytest.approx(6.95e-5, rel=1e-3)


def test_steps_are_torchs_after_a_warmup_and_stop_at_the_floor():
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    for step in range(12):
        ours = factor(step + 4, total=16, warmup=4, shape="step", step_decay=(3, 0.5), floor=0.2)
        assert ours == max(0.2, optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_unknown_shape():
    text = r"\[schedule\] shape: expected one of constant, linear, cosine, wsd, step, got 'wds'"
    with pytest.raises(ValueError, match=text):
        factor(0, total=1, shape="wds")
    with pytest.raises(ValueError, match=r"step_decay: expected \(every, gamma\)"):
        factor(0, total=1, shape="step")
