# SPDX-License-Identifier: Apache-2.0
"""Binarisation, PB-LLM and BiLLM."""

from itertools import pairwise

import pytest
import torch
from drawn_matrices import draw

from fastpost.quantize.billm import billm, round_with, salient_columns
from fastpost.quantize.binary import binarize, binarize_twice
from fastpost.quantize.compensation import by_block, by_column, inverse_factor
from fastpost.quantize.grid import Grid
from fastpost.quantize.moments import proxy_loss
from fastpost.quantize.pb_llm import low_salience, pb_llm
from fastpost.quantize.rtn import rtn


def test_binarize_by_hand():
    values, mask = torch.tensor([[1.0, 3.0, 8.0, 100.0]]), torch.tensor([[True, True, True, False]])
    # Mean 4, distances 3, 1, 4: scale 8/3.
    assert binarize(values, mask).tolist()[0] == pytest.approx([4 - 8 / 3, 4 - 8 / 3, 4 + 8 / 3, 0])
    assert not binarize(values, ~mask & mask).any()
    assert (binarize_twice(values, mask) - values * mask).norm() < (binarize(values, mask) - values * mask).norm()


def test_rounding_block_by_block_compensates_as_column_by_column_does():
    """For the same rounded values, the moves of later columns are the same least squares answer."""
    weight, hessian = draw(8, 256, dtype=torch.float64)
    factor, seen = inverse_factor(hessian, 0.01), {}

    def column(j, moved):
        if j == 128:
            seen["column"] = moved[128:].t().clone()
        return weight[:, j].round()

    def block(lo, values):
        if lo == 128:
            seen["block"] = values.clone()
        return weight[:, lo : lo + 128].round()

    by_column(weight, factor, column)
    by_block(weight, factor, block)
    assert torch.allclose(seen["column"], seen["block"], atol=1e-9)


def test_compensation_is_the_least_squares_answer():
    weight, hessian = draw(4, 160, dtype=torch.float64)
    damped, seen = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160, dtype=torch.float64), {}

    def block(lo, values):
        seen[lo] = values.clone()
        return values.round()

    by_block(weight, inverse_factor(hessian, 0.01), block)
    error = weight[:, :128] - weight[:, :128].round()
    # The rest r of the change minimises tr(Δ H Δᵀ) with Δ = (-error, r):  r H_rr = error H_er.
    moved = torch.linalg.solve(damped[128:, 128:], (error @ damped[:128, 128:]).T).T
    assert torch.allclose(seen[128], weight[:, 128:] + moved, atol=1e-9)


def test_pb_llm_shares():
    weight, hessian = draw(16, 256)
    everything = pb_llm(weight, hessian, binary_share=0.0)
    assert torch.allclose(everything.weight, weight, atol=0.1) and everything.code_bits == 8
    nine = pb_llm(weight, hessian, binary_share=0.9)
    assert nine.code_bits == pytest.approx(1.7) and nine.bits > 2.7
    losses = [
        proxy_loss(pb_llm(weight, hessian, binary_share=s).weight - weight, hessian) for s in (0.0, 0.5, 0.8, 0.95, 1.0)
    ]
    assert all(a < b for a, b in pairwise(losses))
    # Binarised entries of a row take two values in each block of 128 columns.
    only = pb_llm(weight, hessian, binary_share=1.0).weight
    assert all(len(row.unique()) == 2 for row in only[:, :128])
    with pytest.raises(ValueError, match="between 0 and 1"):
        pb_llm(weight, hessian, binary_share=1.5)


def test_pb_llm_keeps_what_is_salient():
    weight, _ = draw(8, 128)
    mask = low_salience(weight, torch.ones(128), 0.75)
    assert mask.sum() == 0.75 * weight.numel()
    assert weight[mask].abs().max() <= weight[~mask].abs().min()


def test_pb_llm_with_unit_hessian_moves_nothing():
    weight, _ = draw(8, 256)
    made, mask = pb_llm(weight, torch.eye(256)).weight, low_salience(weight[:, 128:], torch.ones(128), 0.9)
    grid = Grid(8)
    scales, zeros = grid.parameters(weight)
    high = grid.round(weight[:, 128:], scales[:, None], zeros[:, None])
    assert torch.allclose(made[:, 128:], torch.where(mask, binarize(weight[:, 128:], mask), high), atol=1e-5)


def test_billm_finds_planted_columns():
    weight, _ = draw(32, 128)
    weight[:, [3, 50]] *= 40
    columns = salient_columns(weight, torch.ones(128))
    assert {3, 50} <= set(columns.tolist()) and len(columns) <= 50


def test_billm_split_beats_one_size():
    weight, _ = draw(32, 128)
    columns = salient_columns(weight, torch.ones(128))
    mask = torch.zeros(32, 128, dtype=torch.bool)
    mask[:, columns] = True
    plain = binarize_twice(weight, mask) + binarize(weight, ~mask)
    assert (round_with(weight, columns) - weight).norm() < (plain - weight).norm()
    for row in round_with(weight, columns):
        assert len(row[~mask[0]].unique()) <= 4 and len(row[mask[0]].unique()) <= 4


def test_billm_loses_less_than_one_and_two_bits_of_rtn():
    weight, hessian = draw(32, 256)
    made = billm(weight, hessian)
    loss = proxy_loss(made.weight - weight, hessian)
    assert loss < proxy_loss(rtn(weight, Grid(1), -1).weight - weight, hessian)
    assert loss < proxy_loss(rtn(weight, Grid(2), -1).weight - weight, hessian)
    assert 1.0 < made.code_bits < 1.4 < made.bits


def test_dead_columns():
    weight, hessian = draw(16, 200)  # a last block that is not whole
    hessian[5], hessian[:, 5] = 0, 0
    for made in (pb_llm(weight, hessian), billm(weight, hessian)):
        assert made.weight.shape == (16, 200) and torch.isfinite(made.weight).all()
