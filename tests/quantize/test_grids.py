# SPDX-License-Identifier: Apache-2.0
"""Grids, RTN, NF4, IR-QLoRA's shifts and DB-LLM's planes: what needs the weight alone."""

from itertools import pairwise

import pytest
import torch
from drawn_matrices import draw

from fastpost.int4 import int4_quantize
from fastpost.quantize.db_llm import db_llm, refined, values
from fastpost.quantize.grid import Grid
from fastpost.quantize.ir_qlora import SIGMA, best_shifts, entropy, ir_qlora, shifted_codes
from fastpost.quantize.nf4 import nf4
from fastpost.quantize.rtn import rtn


def test_two_bits_by_hand():
    """Scale 2/3, zero round(1.5) = 2 and codes 0, 2, 3, 3: halves go to even numbers."""
    groups, grid = torch.tensor([[-1.0, -0.2, 0.4, 1.0]]), Grid(2, scales_dtype=torch.float32)
    scales, zeros = grid.parameters(groups)
    assert scales.item() == pytest.approx(2 / 3) and zeros.item() == 2
    assert grid.codes(groups, scales[..., None], zeros[..., None]).tolist() == [[0, 2, 3, 3]]
    made = rtn(groups, grid, -1)
    assert made.weight.tolist()[0] == pytest.approx([-4 / 3, 0, 2 / 3, 2 / 3]) and made.bits == 2 + (32 + 2) / 4


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_four_bits_are_int4_quantize(symmetric, group_size, dtype):
    weight, _ = draw()
    weight[3] = 0
    weight[4] = weight[4].abs() + 1
    made = rtn(weight, Grid(4, symmetric, dtype), group_size).int4
    scheme = "symmetric" if symmetric else "asymmetric"
    want = int4_quantize(weight, group_size=group_size, scheme=scheme, scales_dtype=dtype)
    assert torch.equal(made.codes, want.codes) and torch.equal(made.scales, want.scales)
    assert made.group_size == want.group_size and made.scheme == want.scheme
    assert symmetric or torch.equal(made.zeros, want.zeros)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_it_stands_for_is_what_is_stored(symmetric):
    weight, _ = draw()
    made = rtn(weight, Grid(4, symmetric), 64)
    assert torch.equal(made.weight, made.int4.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_error_falls_with_bits(symmetric):
    weight, _ = draw(64, 256)
    errors = [(rtn(weight, Grid(b, symmetric), 64).weight - weight).square().mean() for b in range(1, 9)]
    assert all(a > b for a, b in pairwise(errors))


def test_zero_is_exact_and_rows_of_zeros_stay():
    weight, _ = draw()
    weight[0], weight[:, 7] = 0, 0
    for bits in range(1, 9):
        made = rtn(weight, Grid(bits), 32).weight
        assert not made[0].any() and not made[:, 7].any()


def test_mistakes():
    weight, _ = draw(4, 96)
    for make, said in [
        (lambda: rtn(weight, Grid(4), 128), "does not divide the 96 columns"),
        (lambda: rtn(weight, Grid(4), 128), "Take 32, 16, -1"),
        (lambda: rtn(weight, Grid(4), 0), "group_size"),
        (lambda: Grid(9), "expected 1 to 8, got 9"),
        (lambda: rtn(weight.long(), Grid(4), 32), "expected a float matrix"),
        (lambda: rtn(torch.where(weight > 2, torch.nan, weight), Grid(4), 32), "NaN or infinity"),
        (lambda: nf4(weight, 64), "does not divide"),
        (lambda: rtn(weight * 1e6, Grid(4, scales_dtype=torch.float16), 32), "does not fit torch.float16"),
    ]:
        with pytest.raises(ValueError, match=said.replace("[", r"\[")):
            make()


# ---- NF4 -------------------------------------------------------------------------------------------------------------


def test_nf4_bits():
    weight, _ = draw(256, 1024)
    assert nf4(weight, 64).bits == 4.5
    nested = nf4(weight, 64, double_quant=True)
    assert nested.bits == pytest.approx(4.127, abs=1e-4)
    assert 8 * nested.int4.nbytes() / weight.numel() == pytest.approx(nested.bits, abs=0.04)  # a table and an offset
    assert torch.equal(nested.weight, nested.int4.dequantize())
    assert (nested.weight - nf4(weight, 64).weight).norm() / weight.norm() < 0.04


def test_nf4_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    weight, _ = draw(16, 256)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    made = nf4(weight, 64)
    assert torch.equal(made.int4.scales.flatten(), state.absmax)
    high, low = packed.flatten() >> 4, packed.flatten() & 15
    assert torch.equal(torch.stack([high, low], 1).view(16, 256), made.int4.unpacked())


# ---- IR-QLoRA --------------------------------------------------------------------------------------------------------


def test_sigma():
    assert pytest.approx(0.54109, abs=1e-4) == SIGMA


def test_entropy_by_hand():
    codes = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [5, 5, 9, 9]], dtype=torch.uint8)
    assert entropy(codes).tolist() == pytest.approx([0, 2, 1])


def test_entropy_is_at_least_that_of_the_median():
    blocks = draw(64, 256)[0].reshape(-1, 64) + 0.3
    plain = entropy(shifted_codes(blocks, blocks.median(1).values)[0])
    found = entropy(shifted_codes(blocks, best_shifts(blocks))[0])
    assert (found >= plain).all() and found.mean() > plain.mean() + 0.02


def test_shifted_blocks_are_followed():
    """A shift that every weight of a block has costs nothing."""
    weight = draw(8, 128)[0]
    shifted = ir_qlora(weight + 5.0, 64, store_shifts=False)
    assert (shifted.weight - 5.0 - weight).norm() / weight.norm() < 0.12
    assert (nf4(weight + 5.0, 64).weight - 5.0 - weight).norm() / weight.norm() > 0.3
    stored = ir_qlora(weight, 64)
    assert (stored.weight - ir_qlora(weight, 64, store_shifts=False).weight).norm() / weight.norm() < 0.06
    assert stored.bits == 4 + (32 + 8 + 32 / 256) / 64
    assert not ir_qlora(torch.zeros(2, 64), 64).weight.any()


# ---- DB-LLM ----------------------------------------------------------------------------------------------------------


def test_two_planes_give_four_values():
    made = db_llm(draw(8, 256)[0], 64)
    for group in made.weight.reshape(-1, 64):
        found = group.unique().tolist()
        assert len(found) <= 4 and 0.0 in found
        if len(found) == 4:  # 0, a, b and a + b
            assert min(abs(2 * v - sum(found)) for v in found) < 1e-5
    assert made.bits == 2.5


def test_planes_never_get_worse_and_beat_the_grid():
    groups = draw(16, 256)[0].reshape(-1, 64)
    step = groups.abs().amax(1) / 2
    scales = [refined(groups, 2 * step, -step, rounds) for rounds in (0, 1, 2, 5, 20)]
    errors = [(values(groups, *pair) - groups).square().sum(1) for pair in scales]
    assert all((a >= b - 1e-4).all() for a, b in pairwise(errors))
    found = (db_llm(groups, -1).weight - groups).square().sum(1)
    assert (found <= errors[-1] + 1e-4).all()
    assert found.sum() < (rtn(groups, Grid(2), -1).weight - groups).square().sum()


def test_exact_planes_are_found():
    b = torch.randint(0, 2, (2, 4, 128), generator=torch.Generator().manual_seed(1)).float()
    weight = 0.8 * b[0] - 0.4 * b[1]
    assert torch.allclose(db_llm(weight, 128).weight, weight, atol=1e-6)
