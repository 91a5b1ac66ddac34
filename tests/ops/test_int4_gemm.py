# SPDX-License-Identifier: Apache-2.0
"""int4_gemm: where a code lies, every format and edge, and results that depend on nothing but their own row."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fastpost
from compare import FLOATS, error
from fastpost import _core, int4
from fastpost.int4 import Int4Weight, pack, unpack
from fastpost.ops.int4_gemm import _backward_op as backward_op
from fastpost.ops.int4_gemm import _dequantize_op as dequantize_op
from fastpost.ops.int4_gemm import _forward_op as forward_op
from fastpost.reference import int4_gemm as reference

CASES = reference.cases()


def formats(columns):
    """(group size, scheme, dtype of scales): one group a block, a part of it, several blocks, none of these."""
    return [
        (128, "symmetric", torch.bfloat16),
        (128, "asymmetric", torch.float16),
        (64, "asymmetric", torch.float32),
        (64, "nf4", torch.float32),
        (32, "symmetric", torch.float32),
        (32, "asymmetric", torch.bfloat16),
        (96, "nf4", torch.float16),
        (256, "asymmetric", torch.bfloat16),
        (-1, "symmetric", torch.bfloat16),
    ]


def weight_of(n, k, group_size=128, scheme="symmetric", dtype=torch.bfloat16, device="cpu"):
    w = torch.randn(n, k) / k**0.5
    return fastpost.int4_quantize(w, group_size=group_size, scheme=scheme, scales_dtype=dtype).to(device)


def core_arguments(w: Int4Weight):
    return w.codes, w.float_scales(), w.zeros, w.table, w.group_size


def backward(grad, w: Int4Weight):
    return backward_op(grad, *core_arguments(w), w.columns)


def good(ours, plain, truth, room=1.05):
    """As near the truth as dequantised weights with float32 sums and one rounding; sums in another order allowed."""
    return error(ours, truth) <= room * error(plain, truth) + 1e-6


def room(x, w: Int4Weight, backward=False):
    """What `good` leaves: more only on a GPU, where NF4's 16 values are rounded before they are scaled, and where
    torch's GEMM, which may add in bfloat16, takes what has no kernel."""
    kernel = not backward and _core.int4_gemm_fits(x, w.codes, w.float_scales(), w.table, False)
    return 1.05 if not x.is_cuda or (kernel and w.table is None) else 1.3


def good_product(ours, plain, truth, x, w, room=1.05):
    """`good`; where a row has one result, which may be next to nothing, against the length of what was multiplied."""
    if truth.shape[1] > 1:
        return good(ours, plain, truth, room)
    eps = torch.finfo(ours.dtype).eps
    limit = x.double().norm(dim=1, keepdim=True) * w.norm() * max(1e-6, eps / 2)
    return bool(((ours - truth).abs() <= limit + eps * truth.abs()).all())


# ---- the layout ------------------------------------------------------------------------------------------------------


def every_code_at_every_place():
    return ((torch.arange(128) + torch.arange(16)[:, None]) % 16).to(torch.uint8)


def test_places_of_codes():
    """The 32-bit word and nibble of each column, as cpp/int4.h puts them down in bits."""
    packed = pack(every_code_at_every_place())
    words = packed.view(torch.int32).long() & 0xFFFFFFFF
    for column in range(128):
        h, t, j, i = column & 1, column >> 1 & 3, column >> 3 & 3, column >> 5 & 3
        got = words[:, 4 * t + i] >> 4 * (4 * h + j) & 15
        assert torch.equal(got, every_code_at_every_place()[:, column].long()), column


@pytest.mark.parametrize("columns", [1, 32, 127, 128, 129, 300])
def test_unpack_undoes_pack(columns):
    codes = torch.randint(0, 16, (5, columns), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes), columns), codes)
    assert pack(codes).shape == (5, 64 * -(-columns // 128))


def test_the_core_reads_what_python_packs(device):
    codes = every_code_at_every_place().repeat(1, 2)
    w = Int4Weight(pack(codes), torch.ones(16, 2), None, 256, 128, "symmetric").to(device)
    expected = codes.float() - 8
    for dtype in FLOATS:
        assert torch.equal(w.dequantize(dtype).float().cpu(), expected)
    for rows in (1, 3, 40):  # x picks columns one by one
        x = torch.zeros(256, 256)[: 256 // rows * rows].to(device)
        x.fill_diagonal_(1)
        got = torch.cat([fastpost.int4_gemm(part.bfloat16(), w) for part in x.split(rows)])
        assert torch.equal(got.float().cpu().T, expected[:, : len(x)])
    assert torch.equal(backward(torch.eye(16, device=device).bfloat16(), w).float().cpu(), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dequantize_has_the_reference_bits(dtype, device):
    for case in CASES:
        _, w, _ = case.inputs(dtype, device)
        assert torch.equal(w.dequantize(dtype), reference.dequantize(w).to(dtype)), case.name
    for k in (40, 4200):
        for group_size, scheme, scales in formats(k):
            w = weight_of(9, k, group_size, scheme, scales, device)
            out = torch.full((9, k), torch.nan, dtype=dtype, device=device)
            _core.int4_gemm_dequantize(*core_arguments(w), out)
            assert torch.equal(out, reference.dequantize(w).to(dtype)), (k, group_size, scheme)


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    x, w, bias = case.inputs(dtype, device)
    exact, rounded = reference.dequantize(w).double(), w.dequantize(dtype).float()
    for scale in (1.0, 1e-3, 1e3):
        leaf = (x * scale).requires_grad_()
        if not (leaf.abs() < torch.finfo(dtype).max / 32).all():
            continue
        leaf_bias = None if bias is None else (bias * scale).requires_grad_()
        ours = fastpost.int4_gemm(leaf, w, leaf_bias)
        assert ours.dtype == dtype and ours.shape == (case.m, case.n)
        with torch.no_grad():
            offset = 0.0 if bias is None else leaf_bias
            truth = leaf.double() @ exact.T + (offset if bias is None else offset.double())
            plain = (leaf.float() @ rounded.T + (offset if bias is None else offset.float())).to(dtype)
        assert good_product(ours, plain, truth, leaf, exact, room(leaf, w))
        grad = (torch.randn(ours.shape) * scale).to(dtype).to(device)
        ours.backward(grad)
        assert good(leaf.grad, (grad.float() @ rounded).to(dtype), grad.double() @ exact, room(grad, w, True))
        if bias is not None:
            assert good(leaf_bias.grad, grad.float().sum(0).to(dtype), grad.double().sum(0))


# Rows of x go alone (as digits), in groups of 8, or in panels of 64; rows of W by 3, 4 and 48; blocks of columns by 32.
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n, k", [(1, 32), (47, 200), (50, 4224), (97, 136)])
def test_edges(n, k, dtype, device):
    for group_size, scheme, scales in formats(k):
        w = weight_of(n, k, group_size, scheme, scales, device)
        exact, rounded = reference.dequantize(w).double(), w.dequantize(dtype).float()
        for m in (1, 2, 3, 5, 8, 9, 33, 65):
            x = torch.randn(m, k).to(dtype).to(device)
            ours, plain, truth = fastpost.int4_gemm(x, w), (x.float() @ rounded.T).to(dtype), x.double() @ exact.T
            assert good_product(ours, plain, truth, x, exact, room(x, w)), (group_size, scheme, m)
            if m in (1, 33):
                grad = torch.randn(m, n).to(dtype).to(device)
                plain, truth = (grad.float() @ rounded).to(dtype), grad.double() @ exact
                assert good(backward(grad, w), plain, truth, room(grad, w, True)), (group_size, scheme, m)


def test_gradients_add_up_over_many_rows_of_the_weight(device):
    w = weight_of(2500, 200, 64, "asymmetric", device=device)
    for dtype in FLOATS:
        grad = torch.randn(600, 2500).to(dtype).to(device)
        plain, truth = (grad.float() @ w.dequantize(dtype).float()).to(dtype), grad.double() @ w.dequantize().double()
        assert good(backward(grad, w), plain, truth, room(grad, w, True))


@pytest.mark.parametrize("m", [1, 2, 8, 40, 100])
@pytest.mark.parametrize("bits", [0, 8])
def test_nothing_comes_from_memory_that_nobody_wrote(m, bits, device):
    if bits and device == "cuda":
        pytest.skip("int8 activations are for CPUs")
    for dtype in FLOATS:
        w = weight_of(50, 200, 64, "asymmetric", device=device)
        x = torch.randn(m, 200).to(dtype).to(device)
        if not x.is_cuda or _core.int4_gemm_fits(x, w.codes, w.scales, w.table, False):
            size = _core.int4_gemm_bytes(x, w.codes, 200, False, bits, 1)
            workspace = torch.full((size,), 255, dtype=torch.uint8, device=device)  # NaN in any float dtype
            out = torch.full((m, 50), torch.nan, dtype=dtype, device=device)
            _core.int4_gemm(x, *core_arguments(w), None, bits, workspace, out)
            assert torch.equal(out, fastpost.int4_gemm(x, w, activation_bits=bits or None))
            # What a last block lacks may be anything.
            codes = w.codes.clone()
            codes.view(50, 2, 16, 4)[:, 1, 3::4] = 0xFF  # words 4t + 3: columns from 224 on
            _core.int4_gemm(x, codes, *core_arguments(w)[1:], None, bits, workspace.fill_(255), out)
            assert torch.equal(out, fastpost.int4_gemm(x, w, activation_bits=bits or None))
        if device == "cpu" and not bits:
            grad = torch.randn(m, 50).to(dtype)
            size = _core.int4_gemm_bytes(grad, w.codes, 200, True, 0, 1)
            out = torch.full((m, 200), torch.nan, dtype=dtype)
            _core.int4_gemm_backward(grad, *core_arguments(w), torch.full((size,), 255, dtype=torch.uint8), out)
            assert torch.equal(out, backward(grad, w))


def test_views_of_rows_and_columns(device):
    """Slices of rows, and of columns from a whole block and group on, are views; so are rows that are apart."""
    w = weight_of(96, 512, 64, "asymmetric", device=device)
    x = torch.randn(5, 2, 512, dtype=torch.bfloat16, device=device)[:, 1]
    expected = fastpost.int4_gemm(x.contiguous(), w)
    assert torch.equal(fastpost.int4_gemm(x, w), expected)
    rows = replace(w, codes=w.codes[10:51], scales=w.scales[10:51], zeros=w.zeros[10:51])
    assert torch.equal(fastpost.int4_gemm(x, rows), expected[:, 10:51])
    columns = replace(w, codes=w.codes[:, 64:192], scales=w.scales[:, 2:6], zeros=w.zeros[:, 2:6], columns=256)
    assert torch.equal(columns.dequantize(), w.dequantize()[:, 128:384])
    assert torch.equal(fastpost.int4_gemm(x[:, 128:384], columns),
                       fastpost.int4_gemm(x[:, 128:384].contiguous(), columns))  # fmt: skip
    grad = torch.randn(5, 3, 96, dtype=torch.bfloat16, device=device)[:, 2]
    assert torch.equal(backward(grad, w), backward(grad.contiguous(), w))
    assert fastpost.int4_gemm(x.view(5, 1, 512), w).shape == (5, 1, 96)
    assert fastpost.int4_gemm(x[0], w).shape == (96,)


def test_empty_shapes(device):
    w = weight_of(16, 128, device=device)
    assert fastpost.int4_gemm(torch.empty(0, 128, device=device), w).shape == (0, 16)
    assert backward(torch.empty(0, 16, device=device), w).shape == (0, 128)
    none = replace(w, codes=w.codes[:0], scales=w.scales[:0])
    assert fastpost.int4_gemm(torch.randn(3, 128, device=device), none).shape == (3, 0)
    assert torch.equal(backward(torch.empty(3, 0, device=device), none), torch.zeros(3, 128, device=device))


@pytest.mark.parametrize("m", [1, 2, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("bits", [None, 8])
def test_what_is_not_finite_stays_in_its_row(m, value, bits, device):
    if bits and device == "cuda":
        pytest.skip("int8 activations are for CPUs")
    w = weight_of(64, 384, 64, device=device)
    x = torch.randn(m, 384, dtype=torch.bfloat16, device=device)
    expected = fastpost.int4_gemm(x, w, activation_bits=bits)
    x[m - 1, 77] = value
    out = fastpost.int4_gemm(x, w, activation_bits=bits)
    assert torch.equal(out[: m - 1], expected[: m - 1])
    assert not torch.isfinite(out[m - 1]).all()
    if bits is None:
        wanted = x[m - 1 :].float() @ w.dequantize(torch.bfloat16).float().T
        assert torch.equal(torch.isnan(out[m - 1]), torch.isnan(wanted[0]))


def test_tiny_and_huge_rows(device):
    """One row of bfloat16 goes through integers: its scale follows the row over all exponents."""
    w = weight_of(32, 256, device=device)
    for scale in (1e-35, 1e-20, 1e20, 1e35):
        x = (torch.randn(1, 256) * scale).bfloat16().to(device)
        truth = x.double() @ w.dequantize().double().T
        assert error(fastpost.int4_gemm(x, w), truth) < 4e-3, scale
    assert torch.equal(fastpost.int4_gemm(torch.zeros(1, 256, device=device).bfloat16(), w),
                       torch.zeros(1, 32, device=device).bfloat16())  # fmt: skip


# ---- W4A8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [32, 200, 4224])
def test_int8_activations(k, dtype):
    for group_size, scheme, scales in formats(k):
        w = weight_of(45, k, group_size, scheme, scales)
        bias = torch.randn(45).to(dtype)
        for m in (1, 2, 7, 8, 9, 40):
            x = torch.randn(m, k).to(dtype)
            ours = fastpost.int4_gemm(x, w, bias, activation_bits=8)
            truth = reference.int4_gemm(x.double(), w, bias.double())
            # In float32, as the kernel decides what rounds which way.
            rounded = reference._int8_rows(x.float()).double() @ reference.dequantize(w).double().T + bias.double()
            once = error(rounded.to(dtype), rounded)
            assert error(ours, truth) <= 1.05 * error(rounded, truth) + 1.5 * once + 1e-6
            exact = fastpost.int4_gemm(x, w, bias)  # what it may be, where eight bits gain nothing
            if m > 1 and not torch.equal(ours, exact):
                assert error(ours, rounded) <= 1.5 * once + 1e-6


def test_int8_activations_have_no_gradient():
    w = weight_of(8, 64)
    out = fastpost.int4_gemm(torch.randn(2, 64, requires_grad=True), w, activation_bits=8)
    with pytest.raises(ValueError, match="activation_bits=8 has no gradient"):
        out.sum().backward()


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 8])
def test_same_bits_whatever_the_threads(bits):
    before = torch.get_num_threads()
    w = weight_of(333, 416, 32, "asymmetric")
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 7, 20, 130):
            x, grad = torch.randn(m, 416).to(dtype), torch.randn(m, 333).to(dtype)
            results = []
            try:
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    results.append((fastpost.int4_gemm(x, w, activation_bits=bits), backward(grad, w)))
            finally:
                torch.set_num_threads(before)
            assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r))


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, bits):
    """Within a few rows, and within many; between them sums differ in order only."""
    w = weight_of(100, 1160, 64, "asymmetric")
    x = torch.randn(150, 1160).to(dtype)
    for sizes in ((2, 3, 4), (5, 7, 8), (9, 11, 24), (25, 70, 150)):
        for size in sizes:
            first = fastpost.int4_gemm(x[: sizes[0]], w, activation_bits=bits)
            assert torch.equal(fastpost.int4_gemm(x[:size], w, activation_bits=bits)[: sizes[0]], first)
            last = fastpost.int4_gemm(x[-size:], w, activation_bits=bits)[-sizes[0] :]
            assert torch.equal(last, fastpost.int4_gemm(x[-sizes[0] :], w, activation_bits=bits))
    grad = torch.randn(700, 100).to(dtype)
    assert torch.equal(backward(grad, w)[600:], backward(grad[600:], w))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    """The same tests in a process of its own, where the CPU has this set."""
    env = os.environ | {"FASTPOST_ISA": isa, "OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, "-c", "from fastpost import _core; _core.build_info()"], env=env).returncode:
        pytest.skip(f"this CPU has no {isa}")
    names = ("dequantize_has", "the_core_reads", "matches_reference", "edges", "nothing_comes", "int8_activations")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", " or ".join(names)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_opcheck(device):
    x = torch.randn(5, 96, device=device, requires_grad=True)
    bias = torch.randn(24, device=device, requires_grad=True)
    for w in (weight_of(24, 96, 32, "asymmetric", device=device), weight_of(24, 96, 32, "nf4", device=device)):
        torch.library.opcheck(forward_op, (x, *core_arguments(w), bias, 0))
        torch.library.opcheck(backward_op, (torch.randn(5, 24, device=device), *core_arguments(w), 96))
        torch.library.opcheck(dequantize_op, (*core_arguments(w), 96, torch.bfloat16))


@pytest.mark.parametrize("scheme", int4.SCHEMES)
def test_compiles_without_graph_break(scheme, device):
    w = weight_of(24, 96, 32, scheme, device=device)
    x = torch.randn(5, 96, device=device, requires_grad=True)
    bias = torch.randn(24, device=device, requires_grad=True)

    def loss(x, bias):
        return (fastpost.int4_gemm(2 * x, w, bias) ** 2).sum()

    expected = torch.autograd.grad(loss(x, bias), (x, bias))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, bias), (x, bias))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


BAD = {
    "x dtype": (lambda x, w, b: (x.double(), w, b), r"\[int4_gemm\] x: expected float32 or bfloat16 or float16"),
    "x columns": (lambda x, w, b: (x[:, :90], w, b), r"\[int4_gemm\] x: expected \[\.\.\., 96\], got \[4, 90\]"),
    "x scalar": (lambda x, w, b: (x[0, 0], w, b), r"\[int4_gemm\] x: expected \[\.\.\., 96\], got \[\]"),
    "weight": (lambda x, w, b: (x, w.dequantize(), b), r"weight: expected an Int4Weight, got Tensor"),
    "bias dtype": (lambda x, w, b: (x, w, b.bfloat16()), r"bias: expected float32 \[24\], got bfloat16 \[24\]"),
    "bias length": (lambda x, w, b: (x, w, b[:7]), r"bias: expected float32 \[24\], got float32 \[7\]"),
    "codes dtype": (lambda x, w, b: (x, replace(w, codes=w.codes.int()), b), r"codes: expected uint8 \[any, 64\]"),
    "codes width": (lambda x, w, b: (x, replace(w, codes=w.codes[:, :32]), b), r"codes: expected uint8 \[any, 64\]"),
    "scales shape": (lambda x, w, b: (x, replace(w, scales=w.scales[:, :2]), b), r"scales: expected .* \[24, 3\]"),
    "zeros shape": (lambda x, w, b: (x, replace(w, zeros=w.zeros[:5]), b), r"zeros: expected uint8 \[24, 3\]"),
    "zeros dtype": (lambda x, w, b: (x, replace(w, zeros=w.zeros.float()), b), r"zeros: expected uint8 \[24, 3\]"),
    "zeros beside a table": (lambda x, w, b: (x, replace(w, scheme="nf4"), b), r"zeros: expected None beside a table"),
    "group size": (lambda x, w, b: (x, replace(w, group_size=48), b), r"group_size: expected a positive multiple of"),
    "no group size": (lambda x, w, b: (x, replace(w, group_size=0), b), r"group_size: expected a positive multiple of"),
    "meta": (lambda x, w, b: (x.to("meta"), w, b), r"codes: expected a tensor on meta, got one on cpu"),
    "sparse": (lambda x, w, b: (x.to_sparse(), w, b), r"x: expected a plain torch.Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    x, w, b = change(torch.randn(4, 96), weight_of(24, 96, 32, "asymmetric"), torch.randn(24))
    with pytest.raises(ValueError, match=message):
        fastpost.int4_gemm(x, w, b)


def test_bad_options_are_named():
    w, x = weight_of(24, 96, 32), torch.randn(4, 96)
    with pytest.raises(ValueError, match=r"activation_bits: expected None or 8, got 4"):
        fastpost.int4_gemm(x, w, activation_bits=4)
    workspace, out = torch.empty(64, dtype=torch.uint8), torch.empty(4, 24)
    with pytest.raises(ValueError, match=r"\[int4_gemm\] workspace: expected at least \d+ bytes, got 64"):
        _core.int4_gemm(x, *core_arguments(w), None, 0, workspace, out)
    with pytest.raises(ValueError, match=r"\[int4_gemm\] workspace: expected at least \d+ bytes, got 64"):
        _core.int4_gemm_backward(out, *core_arguments(w), workspace, x)
    with pytest.raises(ValueError, match=r"activation_bits: expected 0 or 8, got 3"):
        _core.int4_gemm(x, *core_arguments(w), None, 3, workspace, out)
    with pytest.raises(ValueError, match=r"grad: expected float32 \[4, 24\], got float32 \[4, 23\]"):
        _core.int4_gemm_backward(out[:, :23].contiguous(), *core_arguments(w), workspace, x)
    with pytest.raises(ValueError, match=r"x: expected a last dimension of stride 1"):
        _core.int4_gemm(torch.randn(96, 4).T, *core_arguments(w), None, 0, workspace, out)


def test_what_a_gpu_does_not_do(device):
    if device != "cuda":
        pytest.skip("needs a GPU")
    w, x = weight_of(24, 96, 32, device=device), torch.randn(4, 96, device=device)
    with pytest.raises(ValueError, match=r"activation_bits: expected None on a GPU"):
        fastpost.int4_gemm(x, w, activation_bits=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [1, 40, 100, 300])
def test_gradient_on_a_gpu_without_slabs(m, dtype, device):
    """The kernel for compute capability 9.0 that is not in use yet."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    for n, k, group_size in ((64, 128, 128), (520, 1000, 64), (128, 4096, 32), (9000, 264, -1)):
        w = weight_of(n, k, group_size, "asymmetric", dtype, device)
        grad = torch.randn(m, n).to(dtype).to(device)
        if not _core.int4_gemm_fits(grad, w.codes, w.scales, w.table, True):
            pytest.skip("needs compute capability 9.0")
        out, none = torch.full((m, k), torch.nan, dtype=dtype, device=device), torch.empty(0, dtype=torch.uint8)
        _core.int4_gemm_backward(grad, *core_arguments(w), none.to(device), out)
        exact, rounded = reference.dequantize(w), w.dequantize(dtype)
        assert good(out, (grad.float() @ rounded.float()).to(dtype), grad.double() @ exact.double()), (n, k)


def test_whoever_watches_sees_the_call(device):
    """Without gradients a call goes straight to the kernel, unless a mode wants to know of it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    w, x = weight_of(24, 96, 32, device=device), torch.randn(4, 96, device=device)
    plain = fastpost.int4_gemm(x, w)
    with Watch():
        watched = fastpost.int4_gemm(x, w)
    assert torch.equal(plain, watched) and "fastpost.int4_gemm.default" in seen
    assert torch.equal(fastpost.int4_gemm(x.requires_grad_(), w).detach(), plain)
    with torch.no_grad():
        assert torch.equal(fastpost.int4_gemm(x, w), plain)
    assert fastpost.int4_gemm(x, w).requires_grad
