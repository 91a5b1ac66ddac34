# SPDX-License-Identifier: Apache-2.0
import itertools
import os
import subprocess
import sys

import pytest
import torch

from compare import FLOATS, error, overall
from fastpost import _core
from fastpost.ops import _subspace
from fastpost.ops.kv_factorize import kv_factorize, kv_project
from fastpost.reference import kv_factorize as reference
from fastpost.reference._int8_rows import quantize_rows, widen_rows

CASES = reference.cases()
NAN = torch.nan
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def keys_of(values, s, seed=0):
    """Keys [1, s, D] in float64 with these singular values."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, len(values), generator=g, dtype=torch.float64)).Q
                   for n in (s, len(values)))  # fmt: skip
    return (left * values @ right.T)[None]


SPECTRA = {
    "like 1 / j": lambda j, r: 1 / j,
    "slowly": lambda j, r: j**-0.5,
    "flat": lambda j, r: j**0,
    "fast": lambda j, r: torch.exp(-j / 5),
    "wildly": lambda j, r: j**-4,
    "beyond float32": lambda j, r: torch.exp(-j),
    "one large": lambda j, r: torch.where(j <= 1, 1.0, 1e-3),
    "a step": lambda j, r: torch.where(j <= r, 1.0, 1e-2),
    "few": lambda j, r: torch.where(j <= 5, 1.0, 0.0),
}


def spectrum(name, d, rank):
    return SPECTRA[name](torch.arange(1, d + 1, dtype=torch.float64), rank).double()


def product(factors):
    return widen_rows(factors.u, factors.scale, torch.float64) @ factors.basis.double()


def relative(approximation, keys):
    return ((approximation - keys.double()).norm(dim=(1, 2)) / keys.double().norm(dim=(1, 2)).clamp(min=1e-30)).cpu()


def counted(keys, length):
    return reference._valid(keys, length)


# ---- against the exact decomposition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, bits, device):
    keys, length = case.inputs(dtype, device)
    ours = kv_factorize(keys, case.rank, length=length, bits=bits)
    plain = reference.kv_factorize(keys, case.rank, length=length, bits=bits)
    truth = reference.kv_factorize(keys.double(), case.rank, length=length, bits=None)
    wanted = counted(keys, length)
    assert ours.u.dtype == (dtype if bits is None else torch.int8) and (ours.scale is None) == (bits is None)
    for ours_is, plain_is, exact in zip(*(relative(product(f), wanted) for f in (ours, plain, truth))):
        assert ours_is < 1.001 * max(exact, plain_is) + ROUNDING[dtype]
    assert (ours.error.cpu() - truth.error.cpu()).abs().max() < 1e-3
    assert torch.all(
        (ours.error - truth.error).abs().cpu() < 1e-3 * truth.error.cpu() + 1e-3 * (truth.error < 0.05).cpu()
    )
    assert ours.basis.dtype == ours.directions.dtype == ours.error.dtype == torch.float32
    unit = ours.basis.double() @ ours.directions.double()
    torch.testing.assert_close(unit, torch.eye(case.rank, dtype=torch.float64, device=device).expand_as(unit),
                               rtol=0, atol=2e-4)  # fmt: skip


@pytest.mark.parametrize("d, rank, s", [(96, 20, 300), (192, 30, 500), (520, 60, 700)])
@pytest.mark.parametrize("name", SPECTRA)
def test_error_is_that_of_the_exact_decomposition(name, d, rank, s, device):
    """Up to 256 dimensions by the whole eigenproblem, above by a subspace."""
    keys = keys_of(spectrum(name, d, rank), s).float().to(device)
    values = torch.linalg.svdvals(keys[0].double())
    exact = float(values[rank:].norm() / values.norm())
    factors = kv_factorize(keys, rank, bits=None)
    ours = float(relative(product(factors), keys))
    assert ours < 1.001 * exact if exact > 2e-3 else ours < 2e-3
    assert abs(float(factors.error) - ours) < (1e-3 * ours if ours > 0.03 else 1e-3)
    singular, expected = factors.basis[0].double().norm(dim=1), values[:rank].clamp(min=1e-3 * float(values[0]))
    if device == "cpu":
        assert (singular - expected).abs().max() < 1e-3 * values[0]
    assert factors.u.abs().max() <= 1.1  # nothing was divided by noise
    directions = factors.directions * factors.basis.norm(dim=2)[:, None]
    assert (directions.mT @ directions - torch.eye(rank, device=device)).abs().max() < 1e-5


@pytest.mark.parametrize("d, rank, s", [(96, 20, 300), (192, 30, 500), (520, 60, 700)])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_way_without_waiting(name, d, rank, s, device):
    """What a GPU takes, with as many products whatever the spectrum: an orthonormal basis of as good a space."""
    keys = keys_of(spectrum(name, d, rank), s).float().to(device)
    values = torch.linalg.svdvals(keys[0].double())
    exact = float(values[rank:].norm() / values.norm())
    gram = gram_of(torch.cat([keys, torch.zeros_like(keys)])).double()
    energy = float(gram[0].trace())
    captured, directions, left = _subspace.without_waiting(gram / energy, rank)
    unit = directions.mT @ directions
    torch.testing.assert_close(
        unit, torch.eye(rank, dtype=unit.dtype, device=device).expand_as(unit), rtol=0, atol=1e-12
    )
    ours = float(relative(keys.double() @ directions[:1] @ directions[:1].mT, keys))
    assert ours < 1.001 * exact if exact > 2e-3 else ours < 2e-3
    assert abs(float(left[0].clamp(min=0).sqrt()) - ours) < (1e-3 * ours if ours > 0.03 else 1e-3)
    assert captured[1].abs().max() < 1e-12 and abs(float(captured[0].sum() + left[0]) - 1) < 1e-9


def test_no_result_is_waited_for(device):
    """Nothing on the way that a GPU takes asks for a value: on tensors without values it runs through."""
    gram = torch.empty(2, 300, 300, dtype=torch.float64, device="meta")
    _subspace._start.cache_clear()
    values, directions, left = _subspace.without_waiting(gram, 40)
    assert values.shape == (2, 40) and directions.shape == (2, 300, 40) and left.shape == (2,)
    _subspace._start.cache_clear()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("d, s", [(24, 60), (192, 250), (300, 320), (48, 20)])
def test_full_rank_keeps_everything(name, d, s, device):
    """With rank = D the product is the keys, to the accuracy of float32; 48, 20: fewer tokens."""
    keys = (torch.randn(1, s, d) if s < d else keys_of(spectrum(name, d, d), s)).float().to(device)
    assert relative(product(kv_factorize(keys, d, bits=None)), keys) < 1e-6
    later = torch.randn(1, 7, d, device=device)
    factors = kv_factorize(keys, d, bits=None)
    u, _ = kv_project(later, factors.directions, bits=None)
    assert relative(u.double() @ factors.basis.double(), later) < 1e-5


def test_fewer_tokens_than_the_rank_are_kept(device):
    for d, rank in ((64, 40), (520, 100)):
        keys = torch.randn(1, 9, d, device=device)
        factors = kv_factorize(keys, rank, bits=None)
        assert relative(product(factors), keys) < 1e-5 and factors.error < 1e-3
        assert factors.u.abs().max() <= 1.01


def test_error_falls_with_the_rank(device):
    keys = keys_of(spectrum("slowly", 320, 0), 400).float().to(device)
    found = [float(relative(product(kv_factorize(keys, rank)), keys)) for rank in (4, 8, 16, 32, 64, 128, 256, 320)]
    assert all(b < a for a, b in itertools.pairwise(found)) and found[0] > 0.6 and 1e-3 < found[-1] < 1e-2


@pytest.mark.parametrize("d, rank", [(64, 12), (520, 60)])
def test_later_keys_are_projected_on_the_column_space(d, rank, device):
    """By `directions` as by a projection that knows nothing but the space that the basis spans."""
    g = torch.Generator().manual_seed(4)
    keys, later = (x.to(device) for x in (torch.randn(2, 200, d, generator=g), torch.randn(2, 33, d, generator=g)))
    factors = kv_factorize(keys * torch.arange(1, d + 1, device=device).float() ** -0.5, rank, bits=None)
    u, scale = kv_project(later, factors.directions, bits=None)
    space = torch.linalg.qr(factors.basis.double().mT).Q
    wanted = later.double() @ space @ space.mT
    assert scale is None and error((u.double() @ factors.basis.double()).flatten(0, 1), wanted.flatten(0, 1)) < 1e-5
    u, scale = kv_project(later, factors.directions)
    assert 1e-4 < overall(widen_rows(u, scale, torch.float64) @ factors.basis.double(), wanted) < 2e-2


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_projection_is_as_exact_as_plain(dtype, device):
    """Products in bfloat16 round the directions, as torch's own product of bfloat16 tensors does."""
    keys, _ = reference.Case("", 2, 100, 70, 33).inputs(dtype, device)
    directions = torch.randn(2, 70, 33, device=device)
    truth = keys.double() @ directions.double()
    ours = kv_project(keys, directions, bits=None)[0]
    plain = (keys @ directions.to(dtype)).double()
    assert ours.dtype == dtype
    assert error(ours.flatten(0, 1), truth.flatten(0, 1)) < 1.1 * error(plain.flatten(0, 1), truth.flatten(0, 1)) + 1e-6


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("s, d", [(1, 1), (5, 17), (64, 64), (1025, 65), (2300, 130)])
def test_gram_matrix_to_float32(s, d, dtype, device):
    """Edges of panels, of blocks of tokens and of pairs; products are exact, sums in float32."""
    keys = torch.randn(2, s, d, device=device).to(dtype)
    wanted = keys.double().mT @ keys.double()
    gram = gram_of(keys)
    assert torch.equal(gram, gram.mT)
    scale = wanted.diagonal(dim1=1, dim2=2).sqrt()
    assert ((gram - wanted).abs() / (scale[:, :, None] * scale[:, None])).max() < 3e-6


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e10])
def test_scale_changes_nothing_but_the_basis(scale, device):
    keys = keys_of(spectrum("like 1 / j", 96, 20), 300).float().to(device)
    one, other = kv_factorize(keys, 20, bits=None), kv_factorize(keys * scale, 20, bits=None)
    torch.testing.assert_close(
        product(one) * scale, product(other), rtol=0, atol=1e-4 * scale * float(keys.abs().max())
    )
    assert abs(float(one.error - other.error)) < 1e-5


# ---- int8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_int8_is_the_rounded_row(dtype, device):
    """The float kernel's row (float32 keys show it unrounded), quantised as the reference does, to the bit."""
    keys, length = reference.Case("", 2, 90, 70, 33, lengths=(90, 41)).inputs(dtype, device)
    directions = torch.randn(2, 70, 33, device=device)
    rows, _ = kv_project(keys.float(), directions, length=length, bits=None)
    u, scale = kv_project(keys, directions, length=length)
    wanted, wanted_scale = quantize_rows(rows)
    assert torch.equal(scale, wanted_scale) and torch.equal(u, wanted)
    assert u.abs().amax(2)[:, :41].eq(127).all() and u.min() < 0


def test_int8_saves_bytes_and_costs_accuracy(device):
    """Both, or it does nothing: one byte a number instead of two, an error that is there and below one per cent."""
    keys = keys_of(spectrum("like 1 / j", 192, 30), 500).to(device, torch.bfloat16)
    full, short = kv_factorize(keys, 30, bits=None), kv_factorize(keys, 30)
    size = short.u.nbytes + short.scale.nbytes
    assert size == 500 * (30 + 4) and full.u.nbytes == 500 * 60
    assert 2e-3 < overall(product(short), product(full)) < 1e-2


# ---- lengths, batches, threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 8])
def test_tokens_beyond_the_length_do_not_matter(bits, device):
    keys, _ = reference.Case("", 3, 150, 40, 9).inputs(device=device)
    length = torch.tensor([150, 77, 0], dtype=torch.int32, device=device)
    keys[1, 77:], keys[2] = NAN, NAN
    ours = kv_factorize(keys, 9, length=length, bits=bits)
    alone = kv_factorize(keys[1:2, :77], 9, bits=bits)
    for a, b in zip(ours, alone):
        if a is not None:
            assert a.isfinite().all() and torch.equal(a[1, :77] if a.ndim > 1 and a.shape[1] == 150 else a[1], b[0])
    assert ours.u[1, 77:].eq(0).all() and ours.u[2].eq(0).all() and ours.error[2] == 0
    if bits:
        assert ours.scale[1, 77:].eq(0).all() and ours.scale[2].eq(0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_sequence_does_not_depend_on_the_batch(dtype, device):
    keys, _ = reference.Case("", 3, 300, 290, 40).inputs(dtype, device)
    together = kv_factorize(keys, 40)
    for i in range(3):
        alone = kv_factorize(keys[i : i + 1], 40)
        if device == "cpu":  # on a GPU torch's products in the middle may take another way for another batch
            assert all(torch.equal(a[i], b[0]) for a, b in zip(together, alone))
        assert overall(product(alone)[0], product(together)[i]) < 1e-2
    rows, scale = kv_project(keys[:, 117:119], together.directions)
    assert torch.equal(rows, together.u[:, 117:119]) and torch.equal(scale, together.scale[:, 117:119])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_bits_on_any_number_of_threads(dtype):
    keys, _ = reference.Case("", 2, 1300, 290, 40).inputs(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(kv_factorize(keys, 40))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def gram_of(keys, length=None):
    gram = torch.full((keys.shape[0], keys.shape[2], keys.shape[2]), NAN, device=keys.device)
    _core.kv_factorize_gram(keys, length, workspace(keys, 1), gram)
    return gram


def workspace(keys, rank, threads=3):
    bytes = _core.kv_factorize_bytes(keys, rank, threads)
    return torch.full((bytes,), 255, dtype=torch.uint8, device=keys.device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_outputs_are_all_written(dtype, device):
    """Into poisoned memory, with rows further apart than they are long, from keys that are a part of others."""
    wide, _ = reference.Case("", 2, 101, 70, 9).inputs(dtype, device)
    keys = wide[:, ::2, 3:64]
    length = torch.tensor([51, 13], dtype=torch.int32, device=device)
    assert torch.equal(gram_of(keys, length), gram_of(keys.contiguous(), length))
    directions = torch.randn(2, 61, 9, device=device)
    for u in (torch.full((2, 99, 30), NAN, device=device, dtype=dtype)[:, 40:91, 5:14],
              torch.full((2, 51, 9), NAN, device=device)):  # fmt: skip
        _core.kv_factorize_project(keys, length, directions, workspace(keys, 9), u, None)
        assert u.isfinite().all()
        assert torch.equal(u.to(dtype), kv_project(keys.contiguous(), directions, length=length, bits=None)[0])
    u, scale = torch.full((2, 51, 12), 99, dtype=torch.int8, device=device), torch.full((2, 60), NAN, device=device)
    _core.kv_factorize_project(keys, length, directions, workspace(keys, 9), u[..., 2:11], scale[:, 4:55])
    wanted = kv_project(keys.contiguous(), directions, length=length)
    assert torch.equal(u[..., 2:11], wanted[0]) and torch.equal(scale[:, 4:55], wanted[1])
    assert u[..., :2].eq(99).all() and u[..., 11:].eq(99).all() and scale[:, :4].isnan().all()


def test_nothing_to_do(device):
    for b, s in ((0, 5), (2, 0)):
        u, scale, basis, directions, left = kv_factorize(torch.zeros(b, s, 6, device=device), 3)
        assert u.shape == (b, s, 3) and scale.shape == (b, s) and left.eq(0).all()
        assert basis.shape == (b, 3, 6) and directions.isfinite().all()
    zeros = kv_factorize(torch.zeros(1, 4, 6, device=device), 3)
    assert zeros.u.eq(0).all() and zeros.scale.eq(0).all() and zeros.error.eq(0).all()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    """The same edges in a process of its own, where the CPU has this set."""
    env = os.environ | {"FASTPOST_ISA": isa, "OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, "-c", "from fastpost import _core; _core.build_info()"], env=env,
                      capture_output=True).returncode:  # fmt: skip
        pytest.skip(f"this CPU has no {isa}")
    names = ("test_gram_matrix_to_float32", "test_outputs_are_all_written", "test_int8_is_the_rounded_row",
             "test_matches_reference", "test_projection_is_as_exact_as_plain")  # fmt: skip
    tests = [f"{__file__}::{name}" for name in names]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


# ---- as an operator --------------------------------------------------------------------------------------------------


def test_opcheck(device):
    keys, length = reference.Case("", 2, 20, 12, 5, lengths=(20, 9)).inputs(device=device)
    for int8 in (True, False):
        torch.library.opcheck(torch.ops.fastpost.kv_factorize.default, (keys, length, 5, int8))
        directions = torch.randn(2, 12, 5, device=device)
        torch.library.opcheck(torch.ops.fastpost.kv_project.default, (keys, None, directions, int8))


KEYS, DIRECTIONS = torch.randn(2, 6, 8), torch.randn(2, 8, 3)
BAD = {
    "dtype": ({"keys": KEYS.double()}, r"keys: expected float32 or bfloat16 or float16 \[any, any, any\], got float64"),
    "shape": ({"keys": KEYS[0]}, r"keys: expected \[B, S, D\], got shape \[6, 8\]"),
    "layout": ({"keys": KEYS.mT}, r"keys: expected a last dimension of stride 1, got strides \(48, 1, 8\)"),
    "list": ({"keys": [1.0]}, r"keys: expected a plain torch.Tensor, got list"),
    "grad": ({"keys": KEYS.clone().requires_grad_()}, r"keys: expected a tensor without gradient"),
    "rank": ({"rank": 9}, r"rank: expected 1 to 8 \(key heads · head dimension\), got 9"),
    "no rank": ({"rank": 0}, r"rank: expected 1 to 8 .*, got 0"),
    "bits": ({"bits": 4}, r"bits: expected 8 or None, got 4"),
    "length dtype": ({"length": torch.tensor([1, 2])}, r"length: expected int32 \[2\], got int64 \[2\]"),
    "length shape": ({"length": torch.ones(3, dtype=torch.int32)}, r"length: expected int32 \[2\], got int32 \[3\]"),
    "length": ({"length": torch.tensor([1, 7], dtype=torch.int32)}, r"length: expected numbers in \[0, 6\] .*, got 7"),
    "device": ({"length": torch.ones(2, dtype=torch.int32, device="meta")}, r"length: expected a tensor on cpu"),
    "not a number": ({"keys": KEYS.index_fill(0, torch.tensor(1), NAN)},
                     r"keys: expected numbers whose squares sum to a finite one, got a sum of nan in sequence 1"),
    "too large": ({"keys": KEYS.abs().clamp(max=2) * 1e20}, r"keys: .*, got a sum of inf in sequence 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=r"\[kv_factorize\] " + message):
        kv_factorize(**({"keys": KEYS, "rank": 3} | change))


BAD_PROJECT = {
    "directions": (
        {"directions": DIRECTIONS[:, :7]},
        r"directions: expected float32 \[2, 8, any\], got float32 \[2, 7",
    ),
    "dtype": ({"directions": DIRECTIONS.half()}, r"directions: expected float32 \[2, 8, any\], got float16"),
    "layout": ({"directions": torch.randn(2, 3, 8).mT}, r"directions: expected a last dimension of stride 1"),
}


@pytest.mark.parametrize("name", BAD_PROJECT)
def test_bad_projection_is_named(name):
    change, message = BAD_PROJECT[name]
    with pytest.raises(ValueError, match=r"\[kv_factorize\] " + message):
        kv_project(**({"keys": KEYS, "directions": DIRECTIONS} | change))
    with pytest.raises(ValueError, match=r"\[kv_project\] directions: expected a tensor without gradient"):
        kv_project(KEYS, DIRECTIONS.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"\[kv_project\] keys, directions: expected \[B, S, D\] and \[B, D, r\]"):
        kv_project(KEYS, DIRECTIONS[0])


def test_a_workspace_too_small_is_refused():
    with pytest.raises(ValueError, match=r"\[kv_factorize\] workspace: expected at least \d+ bytes, got 64"):
        _core.kv_factorize_gram(KEYS, None, torch.empty(64, dtype=torch.uint8), torch.empty(2, 8, 8))


def test_wrong_outputs_are_refused():
    with pytest.raises(ValueError, match=r"gram: expected float32 \[2, 8, 8\], got float32 \[2, 8, 7\]"):
        _core.kv_factorize_gram(KEYS, None, workspace(KEYS, 3), torch.empty(2, 8, 7))
    with pytest.raises(ValueError, match=r"u: expected int8 \[2, 6, 3\], got float32"):
        _core.kv_factorize_project(KEYS, None, DIRECTIONS, workspace(KEYS, 3), torch.empty(2, 6, 3), torch.empty(2, 6))
    with pytest.raises(ValueError, match=r"u: expected float32 or float32 \[2, 6, 3\], got int8"):
        _core.kv_factorize_project(KEYS, None, DIRECTIONS, workspace(KEYS, 3),
                                   torch.empty(2, 6, 3, dtype=torch.int8), None)  # fmt: skip
