# SPDX-License-Identifier: Apache-2.0
"""GRPO's fields and the advantages; fastpost.policy_loss has its own tests in ops/."""

import math
import re
from pathlib import Path

import pytest
import torch

from fastpost import objectives as o

F64 = torch.float64


def rewards(*values):
    return torch.tensor(values, dtype=F64)


def test_names_equal_the_header():
    header = (Path(__file__).parent.parent / "cpp" / "policy_objectives.h").read_text()
    for macro, names in (("FP_POLICY_KINDS", o.POLICY_KINDS), ("FP_RATIO_LEVELS", o.LEVELS)):
        listed = re.search(rf"#define {macro}\(X\)((?:.*\\\n)*.*)", header).group(1)
        assert tuple(re.findall(r"X\((\w+)\)", listed)) == names
    fields = re.search(r"struct PolicyObjective \{(.*?)\n\};", header, re.S).group(1)
    order = [
        fields.index(f"{name} = ") for name in ("epsilon_low", "epsilon_high", "delta", "beta", "max_completion_length")
    ]
    assert order == sorted(order)  # as core() gives them


def test_core():
    assert o.GRPO().core() == (2, 0, (0.2, 0.2, 0.0, 0.0, 1.0))
    dr = o.GRPO("dr_grpo", 0.1, 0.28, 4, 0.04, "sequence", 256)
    assert dr.core() == (1, 1, (0.1, 0.28, 4.0, 0.04, 256.0)) and isinstance(dr.delta, float)
    assert o.GRPO("cispo", epsilon_high=5).core() == (4, 0, (0.2, 5.0, 0.0, 0.0, 1.0))
    assert o.GRPO(epsilon_low=0.1).epsilon_high == 0.1
    assert o.GRPO("grpo").count(torch.tensor([3, 4])) == 2 and o.GRPO("dapo").count(torch.tensor([3, 4])).item() == 7


def test_group_advantage_closed_forms():
    r = rewards(1, 0.5, 0, -1)
    population = o.group_advantage(r, 4, correction=0)
    torch.testing.assert_close(population, rewards(1.18322, 0.507093, -0.169031, -1.521278), rtol=2e-4, atol=0)
    torch.testing.assert_close(o.group_advantage(r, 4), population * (3 / 4) ** 0.5, rtol=2e-4, atol=0)
    torch.testing.assert_close(o.group_advantage(r, 4, scale="none"), r - 0.125)
    two = o.group_advantage(torch.cat([r, 2 * r + 1]), 4)
    torch.testing.assert_close(two[4:], two[:4], rtol=2e-4, atol=0)  # neither shift nor scale of a group matters
    batch = torch.cat([r, r + 5])
    torch.testing.assert_close(o.group_advantage(batch, 4, scale="batch"), (r - 0.125).repeat(2) / (batch.std() + 1e-4))


def test_leave_one_out_closed_forms():
    r = rewards(1, 0.5, 0, -1)
    torch.testing.assert_close(o.leave_one_out_advantage(r, 4), r - rewards(-0.5 / 3, 0, 0.5 / 3, 0.5))
    two = o.leave_one_out_advantage(r, 2)
    assert two.tolist() == [0.5, -0.5, 1.0, -1.0] and two.dtype == F64
    assert o.leave_one_out_advantage(r, 1).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("advantage", [o.group_advantage, o.leave_one_out_advantage])
def test_equal_rewards_give_exactly_nothing(advantage):
    """0.1 + 0.1 + 0.1 is not 0.3: a mean with rounding, divided by 1e-4, would be a gradient from nowhere."""
    r = rewards(0.1, 0.1, 0.1, 0.7, 0.7, 0.7)
    assert (r[:3] - r[:3].mean()).ne(0).any()
    assert advantage(r, 3).eq(0).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none", None])
def test_replies_without_reward_are_as_if_not_there(scale):
    def advantage(r, n):
        return o.leave_one_out_advantage(r, n) if scale is None else o.group_advantage(r, n, scale=scale)

    got = advantage(rewards(1, math.nan, 0.5, -1, 3, math.nan, 2, 1), 4)
    expected = advantage(rewards(1, 0.5, -1, 3, 2, 1), 3)
    torch.testing.assert_close(got[[0, 2, 3, 4, 6, 7]], expected)
    assert got[[1, 5]].tolist() == [0, 0]
    assert advantage(rewards(math.nan, math.nan, 1, math.nan), 2).eq(0).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: o.GRPO("grop"), r"\[GRPO\] loss_type: expected one of .*, got 'grop'. Did you mean 'grpo'\?"),
        (lambda: o.GRPO(level="tokens"), r"\[GRPO\] level: expected one of .* Did you mean 'token'\?"),
        (lambda: o.GRPO(epsilon_low=1.5), r"\[GRPO\] epsilon_low: .* of at least 0 and at most 1, got 1.5"),
        (lambda: o.GRPO(epsilon_high=-1), r"\[GRPO\] epsilon_high: expected a finite number of at least 0, got -1"),
        (lambda: o.GRPO(delta=0), r"\[GRPO\] delta: expected a finite number above 0, got 0"),
        (lambda: o.GRPO(beta=math.nan), r"\[GRPO\] beta: expected a finite number of at least 0, got nan"),
        (
            lambda: o.GRPO("cispo"),
            r"\[GRPO\] epsilon_high: expected a number of at least 1 .* got None. ScaleRL uses 5",
        ),
        (lambda: o.GRPO("cispo", epsilon_high=0.2), r"\[GRPO\] epsilon_high: .* caps the ratio itself, got 0.2"),
        (
            lambda: o.GRPO("cispo", epsilon_high=5, delta=2),
            r"\[GRPO\] delta: expected None with loss_type 'cispo', got 2",
        ),
        (lambda: o.GRPO("dr_grpo"), r"\[GRPO\] max_completion_length: expected the limit .* 'dr_grpo', got None"),
        (lambda: o.GRPO("dapo", max_completion_length=9), r"max_completion_length: expected None .* 'dapo', got 9"),
        (
            lambda: o.group_advantage(rewards(1, 2, 3), 2),
            r"\[group_advantage\] reward: .* whole groups of 2, got shape \[3\]",
        ),
        (lambda: o.group_advantage(rewards(1, 2), 2, scale="std"), r"\[group_advantage\] scale: expected .* got 'std'"),
        (
            lambda: o.leave_one_out_advantage(rewards(1, 2)[None], 2),
            r"\[leave_one_out_advantage\] .* got shape \[1, 2\]",
        ),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()
