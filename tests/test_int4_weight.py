# SPDX-License-Identifier: Apache-2.0
"""The container of four-bit weights: its layout, its checks and double quantisation beside bitsandbytes."""

from dataclasses import replace

import pytest
import torch

from fastpost.int4 import NF4, Int4Weight, NestedScales, dynamic_map, int4_quantize, nest_scales, pack, unpack


def test_the_layout_is_the_one_in_the_header():
    """Column k = i j t h of a block: nibble 4h + j of the little-endian word 4t + i, spelt out bit by bit."""
    codes = torch.randint(0, 16, (3, 300), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (3, 3 * 64) and torch.equal(unpack(packed, 300), codes)
    for column in (0, 1, 2, 8, 31, 32, 127, 128, 255, 299):
        h, t, j, i = column & 1, column >> 1 & 3, column >> 3 & 3, column >> 5 & 3
        at = 8 * (4 * (4 * t + i)) + 4 * (4 * h + j) + 512 * (column // 128)  # bits from the row's beginning
        assert torch.equal(packed[:, at // 8] >> at % 8 & 15, codes[:, column]), column


@pytest.mark.parametrize("blocks", [1, 255, 256, 3000])
def test_double_quantisation_is_that_of_bitsandbytes(blocks):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())
    scales = torch.rand(blocks, 3) * 0.05
    codes, nested = nest_scales(scales)
    flat = scales.flatten()
    assert torch.equal(nested.offset, flat.mean())
    quick, state = functional.quantize_blockwise(flat - flat.mean(), blocksize=256)
    assert torch.equal(nested.outer, state.absmax) and torch.equal(nested.table, state.code)
    # float64 goes past its CPU kernel, whose codes come from a grid and may be one off, to the exact one.
    exact = torch.ops.bitsandbytes.quantize_blockwise.default
    theirs, _ = exact((flat - flat.mean()).double(), state.code, 256)
    assert torch.equal(codes.flatten(), theirs)
    assert (quick.int() - theirs.int()).abs().max() <= 1
    back = functional.dequantize_blockwise(theirs, absmax=nested.outer, code=nested.table, blocksize=256)
    assert torch.equal(nested.expand(codes), (back.float() + nested.offset).view(scales.shape))


def test_scales_that_are_all_alike_nest_exactly():
    scales = torch.full((4, 5), 0.25)
    codes, nested = nest_scales(scales)
    assert torch.equal(nested.expand(codes), scales)
    with pytest.raises(ValueError, match=r"\[nest_scales\] scales: expected float32 \[N, G\], got torch.bfloat16"):
        nest_scales(scales.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_nf4_has_the_codes_and_scales_of_bitsandbytes(dtype, group_size):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = (torch.randn(33, 384) * 0.04).to(dtype)
    weight[3, 64:128] = 0
    ours = int4_quantize(weight, scheme="nf4", group_size=group_size)
    theirs, state = functional.quantize_4bit(weight, blocksize=group_size, quant_type="nf4")
    theirs = theirs.flatten()
    assert torch.equal(ours.unpacked().flatten(), torch.stack([theirs >> 4, theirs & 15], 1).flatten())
    absmax = state.absmax.view(33, -1)
    zeros = absmax == 0  # a group of zeros has scale 1 here
    assert torch.equal(ours.scales.where(~zeros, 0), absmax)
    assert torch.equal(ours.dequantize(dtype), functional.dequantize_4bit(theirs.view(-1, 1), state).view(33, 384))


def good(**changes) -> Int4Weight:
    scheme = changes.pop("scheme", "asymmetric")
    made = int4_quantize(torch.randn(4, 160), group_size=32, scheme=scheme)
    return replace(made, **changes)


def test_good_ones_pass():
    for scheme in ("symmetric", "asymmetric", "nf4"):
        weight = good(scheme=scheme)
        assert weight.check() is weight
    good(order=torch.randperm(160)).check()
    int4_quantize(torch.randn(4, 160), group_size=32, scheme="nf4", double_quant=True).check()
    nothing = int4_quantize(torch.zeros(4, 160), group_size=32)
    replace(nothing, scales=torch.zeros_like(nothing.scales)).check()  # a group of zeros may have any scale
    int4_quantize(torch.zeros(0, 64), group_size=32).check()


def spoilt(row, value, scheme="asymmetric"):
    scales = good().scales.clone()
    scales[row, 1] = value
    return good(scales=scales, scheme=scheme)


BAD = {
    "scheme": (lambda: good(scheme="symmetric", zeros=None).__class__(**vars(good()) | {"scheme": "fp4"}),
               r"scheme: expected one of symmetric, asymmetric, nf4, got 'fp4'"),
    "group": (lambda: good(group_size=48), r"group_size: expected a multiple of 32, got 48"),
    "columns": (lambda: good(columns=0), r"columns: expected a number of columns, got 0"),
    "codes": (lambda: good(columns=300), r"codes: expected uint8 \[N, 192\], got uint8 \[4, 128\]"),
    "dtype": (lambda: good(codes=torch.zeros(4, 128)), r"codes: expected uint8 \[N, 128\], got float32"),
    "scales": (lambda: good(scales=torch.ones(4, 4)), r"scales: expected float32, .* \[4, 5\], got float32 \[4, 4\]"),
    "double": (lambda: good(scales=torch.ones(4, 5).double()), r"scales: expected .* got float64 \[4, 5\]"),
    "no zeros": (lambda: good(zeros=None), r"zeros: expected uint8 \[4, 5\], got None"),
    "zeros": (lambda: good(scheme="nf4", zeros=torch.ones(4, 5)), r"zeros: expected None for nf4, got float32"),
    "zeros 16": (lambda: good(zeros=torch.full((4, 5), 16, dtype=torch.uint8)),
                 r"zeros: expected 0 to 15, got more in row 0"),
    "nan": (lambda: spoilt(2, float("nan")), r"scales: expected finite numbers, got NaN or infinity in row 2"),
    "inf": (lambda: spoilt(3, float("inf")), r"scales: expected finite numbers, got NaN or infinity in row 3"),
    "zero": (lambda: spoilt(1, 0.0), r"scales: expected no 0 where codes differ from the zero point, got 0 in row 1"),
    "order": (lambda: good(order=torch.zeros(160, dtype=torch.int64)), r"order: expected each column once"),
    "order size": (lambda: good(order=torch.arange(100)), r"order: expected int64 \[160\], got int64 \[100\]"),
    "nested": (lambda: good(scheme="nf4", nested=NestedScales(torch.ones(256), torch.ones(1), torch.ones(()))),
               r"scales: expected uint8 \[4, 5\] \(nested\), got float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_ones_are_refused_by_name(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=r"\[x\.safetensors\] " + message):
        make().check("x.safetensors")


def test_nf4_is_a_sorted_table_with_both_ends_and_zero():
    assert list(NF4) == sorted(NF4) and NF4[0] == -1 and NF4[7] == 0 and NF4[15] == 1
