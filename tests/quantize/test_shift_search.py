# SPDX-License-Identifier: Apache-2.0
"""The quick search of shifts finds what looking at every weight for every shift finds."""

import pytest
import torch

from fastpost.quantize.ir_qlora import POINTS, SIGMA, entropy, shifted_codes
from fastpost.quantize.shift_search import best_shifts

REACH = 0.1 * SIGMA


def slow(blocks, points=POINTS):
    """Every shift in turn, nearest to the median first, quantised and counted."""
    median = blocks.median(1).values
    unit = (blocks - median[:, None]).abs().amax(1)
    found = []
    for k in sorted(range(points), key=lambda k: abs(k - points // 2)):
        shift = median + (k - points // 2) * (2 * REACH / (points - 1)) * unit
        found.append((entropy(shifted_codes(blocks, shift)[0]), shift))
    best = torch.stack([e for e, _ in found]).sub_(torch.arange(points)[:, None] * 1e-9).argmax(0)
    return torch.stack([s for _, s in found])[best, torch.arange(len(blocks))]


@pytest.mark.parametrize("g", [32, 64, 128])
@pytest.mark.parametrize("offset", [0.0, 0.02, 5.0])
def test_it_finds_the_same(g, offset):
    blocks = torch.randn(200, g, dtype=torch.float64) * 0.04 + offset
    quick, exact = best_shifts(blocks, POINTS, REACH), slow(blocks)
    reached = [entropy(shifted_codes(blocks, s)[0]) for s in (quick, exact)]
    same = (quick - exact).abs() < 1e-12
    # A weight on a border may count on either side: then the two differ by little.
    assert same.float().mean() > 0.98 and (reached[0] - reached[1]).abs().max() < 0.05
    plain = entropy(shifted_codes(blocks, blocks.median(1).values)[0])
    assert (reached[0] >= plain - 1e-9).float().mean() > 0.99 and reached[0].mean() > plain.mean() + 0.03


def test_the_scale_of_weights_changes_nothing_and_pieces_neither():
    blocks = torch.randn(1000, 64)
    shifts = best_shifts(blocks, POINTS, REACH)
    assert shifts.dtype == torch.float32 and torch.equal(best_shifts(blocks * 2**-20, POINTS, REACH), shifts * 2**-20)
    assert torch.equal(torch.cat([best_shifts(b, POINTS, REACH) for b in blocks.split(7)]), shifts)


def test_flat_and_empty_blocks():
    flat = torch.full((3, 32), 0.25)
    assert torch.equal(best_shifts(flat, POINTS, REACH), torch.full((3,), 0.25))
    assert best_shifts(torch.empty(0, 32), POINTS, REACH).shape == (0,)
