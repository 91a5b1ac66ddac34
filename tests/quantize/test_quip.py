# SPDX-License-Identifier: Apache-2.0
"""QuIP: rotations, LDLQ and greedy passes."""

from itertools import pairwise

import pytest
import torch
from drawn_matrices import draw

from fastpost.quantize.compensation import by_column, inverse_factor
from fastpost.quantize.grid import Grid
from fastpost.quantize.moments import proxy_loss
from fastpost.quantize.quip import RANGE, Rotation, even_grid, greedy, ldlq, quip
from fastpost.quantize.rtn import rtn


@pytest.mark.parametrize("n", [1, 7, 48, 576])
def test_rotations_are_orthogonal(n):
    turn = Rotation(n, torch.Generator().manual_seed(0), torch.float64)
    x = torch.randn(5, n, dtype=torch.float64)
    assert torch.allclose(turn.rows(x).norm(dim=1), x.norm(dim=1))
    assert torch.allclose(turn.undo(turn.rows(x)), x)
    matrix = turn.rows(torch.eye(n, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)


def test_without_rounding_nothing_changes():
    weight, hessian = draw(24, 96, dtype=torch.float64)
    made = quip(weight, hessian, 2, round_values=lambda values: values)
    assert torch.allclose(made.weight, weight, atol=1e-9)


def test_ldlq_is_gptq_without_range_and_groups():
    weight, hessian = draw(dtype=torch.float64)
    for damping in (0.0, 0.01):
        pulled = ldlq(weight, hessian, torch.round, damping=damping)
        pushed = by_column(weight, inverse_factor(hessian, damping), lambda j, moved: moved[j].round())
        assert torch.equal(pulled, pushed)


def test_greedy_passes_never_add_loss():
    weight, hessian = draw(dtype=torch.float64)
    hessian += 0.05 * torch.eye(256, dtype=torch.float64)
    grid = even_grid(2, RANGE * float(weight.square().mean().sqrt()))
    rounded, losses = grid(weight), []
    for _ in range(4):
        losses.append(proxy_loss(rounded - weight, hessian))
        rounded = greedy(rounded, weight, hessian, grid)
    assert losses[1] < losses[0] and all(b <= a * (1 + 1e-12) for a, b in pairwise(losses))
    assert torch.equal(rounded, grid(rounded))


def test_greedy_by_hand():
    """One row, two columns: from (0, 0) for (0.4, 0.4) with a correlation of 0.9 the first column goes to
    round(0.4 + 0.9 * 0.4) = 1 and the second stays at round(0.4 - 0.9 * 0.6) = 0."""
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    made = greedy(torch.zeros(1, 2), torch.full((1, 2), 0.4), hessian, torch.round)
    assert made.abs().tolist() == [[1.0, 0.0]]


def test_even_grid():
    grid = even_grid(2, 3.0)
    assert grid(torch.tensor([-9.0, -2.1, -0.1, 0.9, 2.5, 9.0])).tolist() == pytest.approx([-3, -3, -1, 1, 3, 3])


def test_two_bits_lose_less_than_rtn():
    ours = theirs = 0.0
    for seed in range(4):
        weight, hessian = draw(48, 256, seed=seed)
        ours += proxy_loss(quip(weight, hessian, 2).weight - weight, hessian)
        theirs += proxy_loss(rtn(weight, Grid(2), -1).weight - weight, hessian)
    assert ours < 0.5 * theirs


def test_seed_makes_the_result():
    weight, hessian = draw(24, 96)
    a, b, c = (quip(weight, hessian, 3, seed=seed).weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_dead_columns_and_zeros():
    weight, hessian = draw(24, 96)
    hessian[5], hessian[:, 5], weight[:, 9] = 0, 0, 0
    assert torch.isfinite(quip(weight, hessian, 2).weight).all()
    assert torch.isfinite(quip(weight * 0, hessian, 2).weight).all()
    with pytest.raises(ValueError, match="expected 1 to 8"):
        quip(weight, hessian, 0)
