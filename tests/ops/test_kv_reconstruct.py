# SPDX-License-Identifier: Apache-2.0
"""kv_reconstruct: the keys that float64 makes, in the slots that were named and nowhere else."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fastpost
from compare import FLOATS, error
from fastpost import _core
from fastpost.ops.kv_reconstruct import _NAMES
from fastpost.ops.kv_reconstruct import _reconstruct_op as reconstruct_op
from fastpost.reference import kv_reconstruct as reference

CASES = reference.cases()
NAN = float("nan")


def make(inputs, options, f=fastpost.kv_reconstruct):
    """(keys, value pool or None) that f wrote into copies of the pools of the inputs."""
    u, basis, chunks, keys = inputs
    pools = {"value_pool": options["value_pool"].clone()} if "value_pool" in options else {}
    keys = keys.clone()
    assert f(u, basis, chunks, keys, **(options | pools)) is None
    return keys, pools.get("value_pool")


def in_double(inputs, options):
    (u, basis, chunks, keys), names = inputs, ("cos", "sin", "value_scale", "values", "value_pool")
    wide = {k: t.double() if k in names and t.is_floating_point() else t for k, t in options.items()}
    return (u.double() if u.is_floating_point() else u, basis.double(), chunks, keys.double()), wide


def written(pool, inputs, options):
    """[B, G, M] bool: where the inputs say that something is written."""
    chunks, there = inputs[2], torch.zeros(pool.shape[:3], dtype=torch.bool, device=pool.device)
    wanted = (chunks >= 0) & (options["fresh"] != 0 if "fresh" in options else True)
    slots = options.get("slots", torch.arange(chunks.shape[2], device=pool.device).expand_as(chunks))
    for i, j, k in wanted.nonzero().tolist():
        there[i, j, slots[i, j, k]] = True
    return there


def check(inputs, options, dtype):
    """Ours against float64, as good as float32 with one rounding; slots that are not written stay NaN."""
    ours, truth = make(inputs, options), make(*in_double(inputs, options), reference.kv_reconstruct)
    plain = make(inputs, options, reference.kv_reconstruct)
    for a, b, c in zip(ours, truth, plain):
        if a is None:
            continue
        there = written(a, inputs, options)
        assert there.any() and a.dtype == dtype
        assert torch.isnan(a[~there]).all() and not torch.isnan(a[there]).any()
        rows = [x[there].flatten(0, -2) for x in (a, b, c)]
        assert error(rows[0], rows[1]) <= 1.1 * error(rows[2], rows[1]) + 1e-6
    return ours


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    inputs, options = case.inputs(dtype, device)
    for scale in (1.0, 1e-3, 1e3):
        u, basis, chunks, keys = inputs
        if dtype == torch.float16 and scale != 1:
            continue  # beyond what float16 holds
        check((u, basis * scale, chunks, keys), options, dtype)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("u_dtype", [torch.int8, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_mixture_of_dtypes(dtype, u_dtype, factors, device):
    """u, basis, tables and keys each have their own."""
    case = reference.Case("", 2, 3, 64, 64, 21, 6, bits=8 if u_dtype == torch.int8 else None)
    (u, basis, chunks, keys), options = case.inputs(torch.float32, device)
    u = u if u_dtype == torch.int8 else u.to(u_dtype)
    for table in (torch.float32, torch.bfloat16):
        tables = {name: options[name].to(table) for name in ("cos", "sin")}
        check((u, basis.to(factors), chunks, keys.to(dtype)), options | tables, dtype)


@pytest.mark.parametrize("rank", [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 160, 300])
@pytest.mark.parametrize("d", [8, 16, 33, 64, 96, 128, 200, 256])
def test_any_rank_and_dimension(rank, d, device):
    for dtype in (torch.float32, torch.bfloat16):
        for bits in (8, None):
            inputs, options = reference.Case("", 1, 2, 72, d, rank, 7, bits=bits).inputs(dtype, device)
            check(inputs, options, dtype)


@pytest.mark.parametrize("chunk", [1, 2, 8, 13])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 25])
def test_any_number_of_rows(n, chunk, device):
    for dtype in (torch.float32, torch.bfloat16):
        inputs, options = reference.Case("", 1, 1, 26 * chunk, 64, 24, n, chunk=chunk).inputs(dtype, device)
        check(inputs, options, dtype)


def test_tables_of_each_prompt(device):
    """cos and sin [P, S', w], with more positions than u has, and one whose rows lie apart."""
    (u, basis, chunks, keys), options = CASES[4].inputs(device=device)
    options["cos"], options["sin"] = torch.randn(1, 200, 32, device=device), torch.randn(1, 200, 40, device=device)
    check((u, basis, chunks, keys), options | {"sin": options["sin"][..., 8:]}, keys.dtype)
    case = reference.Case("", 3, 2, 64, 32, 20, 5, prompts=2)
    inputs, options = case.inputs(device=device)
    tables = {name: torch.randn(2, 64, 16, device=device) for name in ("cos", "sin")}
    check(inputs, options | tables, torch.float32)


def test_full_rank_gives_the_keys_back(device):
    """Float factors of a whole decomposition: the product is the matrix, to float32's rounding."""
    keys = torch.randn(40, 2 * 32, dtype=torch.float64)
    u, s, v = torch.linalg.svd(keys, full_matrices=False)
    u, basis = (
        u[:, :40].float()[None].contiguous(),
        (s[:, None] * v).float().contiguous().view(1, 40, 2, 32).transpose(1, 2),
    )
    chunks = torch.arange(5, dtype=torch.int32).expand(1, 2, 5).contiguous()
    out = torch.full((1, 2, 5, 8, 32), NAN, device=device)
    fastpost.kv_reconstruct(u.to(device), basis.to(device), chunks.to(device), out)  # basis: any strides
    torch.testing.assert_close(
        out.flatten(2, 3)[0].cpu(), keys.view(40, 2, 32).transpose(0, 1).float(), rtol=1e-5, atol=1e-5
    )


# ---- what is written, and where --------------------------------------------------------------------------------------


def test_only_fresh_chunks_are_made(device):
    """A cached step leaves what is resident as it was, bit for bit, and adds what a cold one would."""
    case = reference.Case("", 2, 2, 160, 64, 20, 12, values="float")
    inputs, options = case.inputs(torch.bfloat16, device)
    cold, cold_values = make(inputs, options)
    fresh = torch.rand(inputs[2].shape, generator=torch.Generator().manual_seed(3)) < 0.4
    mine, my_values = make(inputs, options | {"fresh": fresh.to(torch.uint8).to(device)})
    there = written(mine, inputs, options | {"fresh": fresh.to(device)})
    assert 0 < there.sum() < (fresh | True).sum()
    for a, b in ((mine, cold), (my_values, cold_values)):
        assert torch.equal(a[there], b[there]) and torch.isnan(a[~there]).all()
    nothing, _ = make(inputs, options | {"fresh": torch.zeros_like(inputs[2], dtype=torch.uint8)})
    assert torch.isnan(nothing).all()
    nothing, _ = make((*inputs[:2], torch.full_like(inputs[2], -1), inputs[3]), options)
    assert torch.isnan(nothing).all()


def test_pools_may_be_parts_of_others(device):
    """Slots of keys, values and pools apart in memory: only the last two dimensions have to be whole."""
    inputs, options = replace(CASES[3], n=5).inputs(device=device)
    keys, pool = make(inputs, options)
    g, m = keys.shape[1:3]

    def apart(t):
        room = torch.full((1, m + 3, 2, g + 1, *t.shape[3:]), NAN, device=device)
        room = room.nan_to_num(99).to(t.dtype) if t.dtype == torch.int8 else room.to(t.dtype)
        view = room.permute(0, 3, 1, 2, *range(4, t.ndim + 1))[:, 1:, : t.shape[2], 1]
        return room, view.copy_(t)

    key_room, key_view = apart(inputs[3])
    pool_room, pool_view = apart(options["value_pool"])
    _, values = apart(options["values"])
    _, scales = apart(options["value_scale"])
    fastpost.kv_reconstruct(
        *inputs[:3], key_view, **(options | {"values": values, "value_pool": pool_view, "value_scale": scales})
    )
    for room, view, expected in ((key_room, key_view, keys), (pool_room, pool_view, pool)):
        assert torch.equal(view.nan_to_num(7), expected.nan_to_num(7))
        assert room.isfinite().sum() == expected.isfinite().sum()


def test_values_are_copied_exactly(device):
    inputs, options = CASES[1].inputs(torch.bfloat16, device)
    _, pool = make(inputs, options)
    for j in range(8):
        got, wanted = pool[0, j, options["slots"][0, j].long()], options["values"][0, j, inputs[2][0, j].long()]
        assert torch.equal(got, wanted)


def test_any_garbage_in_the_workspace(device):
    for dtype in (torch.float32, torch.bfloat16):
        for case in (CASES[8], CASES[2], reference.Case("", 1, 1, 8, 48, 5, 1, bits=None)):
            inputs, options = case.inputs(dtype, device)
            expected, _ = make(inputs, options)
            size = _core.kv_reconstruct_bytes(*inputs[:2], 1)
            workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
            given = [options.get(name) for name in _NAMES[4:]]
            scale, cos, sin, source, slots, fresh, values, value_scale, pool = given
            u, basis, chunks, keys = inputs
            _core.kv_reconstruct(u, scale, basis, cos, sin, source, chunks, slots, fresh, values, value_scale,
                                 workspace, keys, pool)  # fmt: skip
            assert torch.equal(keys.nan_to_num(7), expected.nan_to_num(7))


# ---- what it does not depend on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_bits_on_any_number_of_threads(dtype):
    inputs, options = reference.Case("", 2, 3, 200, 64, 30, 21, part_fresh=True, values="int8").inputs(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            results.append([t.nan_to_num(7) for t in make(inputs, options)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_chunks_do_not_know_of_each_other(dtype, device):
    """Each chunk alone has the bits that it has among the others, wherever it stands."""
    inputs, options = reference.Case("", 2, 2, 120, 64, 30, 9).inputs(dtype, device)
    together, _ = make(inputs, options)
    u, basis, chunks, keys = inputs
    for k in range(9):
        alone = torch.full_like(chunks, -1)
        alone[:, :, 3] = chunks[:, :, k]
        slots = options["slots"][:, :, k : k + 1].repeat(1, 1, 9)
        got, _ = make((u, basis, alone, keys), options | {"slots": slots})
        for i in range(2):
            for j in range(2):
                slot = int(options["slots"][i, j, k])
                assert torch.equal(got[i, j, slot], together[i, j, slot])


def test_nothing_to_do(device):
    (u, basis, chunks, keys), options = reference.Case("", 2, 2, 40, 32, 8, 3, prompts=1).inputs(device=device)
    options |= {name: options[name][:0] for name in ("source", "slots")}
    fastpost.kv_reconstruct(u, basis, chunks[:0], keys[:0], **options)
    inputs, options = reference.Case("", 2, 2, 40, 32, 8, 0).inputs(device=device)
    assert torch.isnan(make(inputs, options)[0]).all()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    """The same tests in a process of its own, where the CPU has this set."""
    env = os.environ | {"FASTPOST_ISA": isa, "OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, "-c", "from fastpost import _core; _core.build_info()"], env=env).returncode:
        pytest.skip(f"this CPU has no {isa}")
    names = ("matches", "mixture", "any_rank", "number_of_rows", "garbage", "each_other")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", " or ".join(names)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[5]], ids=lambda c: c.name)
def test_opcheck(case, device):
    inputs, options = case.inputs(device=device)
    inputs[3].zero_()  # NaN is not equal to itself
    if "value_pool" in options:
        options["value_pool"].zero_()
    torch.library.opcheck(reconstruct_op, (*inputs, *(options.get(name) for name in _NAMES[4:])))


# ---- bad input -------------------------------------------------------------------------------------------------------

I32 = {"dtype": torch.int32}
GOOD = {
    "u": torch.zeros(2, 26, 6, dtype=torch.int8), "scale": torch.ones(2, 26), "basis": torch.zeros(2, 3, 6, 16),
    "chunks": torch.zeros(2, 3, 4, **I32), "keys": torch.zeros(2, 3, 5, 8, 16), "cos": torch.zeros(1, 30, 8),
    "sin": torch.zeros(1, 30, 8),
}  # fmt: skip
VALUES = {"values": torch.zeros(2, 3, 3, 8, 16), "value_pool": torch.zeros(2, 3, 5, 8, 16)}
THIRD = torch.tensor([[[0, 3, 0, 0]]], **I32).expand(2, 3, 4).contiguous()
BAD = {
    "u ndim": ({"u": torch.zeros(26, 6)},
               r"u: expected int8 or float32 or .* \[any, any, any\], got float32 \[26, 6\]"),
    "u dtype": ({"u": torch.zeros(2, 26, 6).double()}, r"u: expected int8 or float32 .*, got float64"),
    "u layout": ({"u": torch.zeros(2, 6, 26).mT}, r"u: expected a last dimension of stride 1"),
    "u rank": ({"u": torch.zeros(2, 26, 0), "scale": None}, r"u: expected a rank of at least 1"),
    "no scale": ({"scale": None}, r"scale: expected float32 \[2, 26\], got None"),
    "scale": ({"scale": torch.ones(2, 25)}, r"scale: expected float32 \[2, 26\], got float32 \[2, 25\]"),
    "needless scale": ({"u": torch.zeros(2, 26, 6)}, r"scale: expected None, as u is not int8, got float32"),
    "basis dtype": ({"basis": torch.zeros(2, 3, 6, 16).half()},
                    r"basis: expected float32 or bfloat16 \[2, any, 6, any\]"),
    "basis rank": ({"basis": torch.zeros(2, 3, 5, 16)},
                   r"basis: expected .* \[2, any, 6, any\], got float32 \[2, 3, 5"),
    "basis layout": ({"basis": torch.zeros(2, 3, 16, 6).mT}, r"basis: expected a last dimension of stride 1"),
    "chunks dtype": ({"chunks": torch.zeros(2, 3, 4).long()}, r"chunks: expected int32 \[2, 3, any\], got int64"),
    "chunks rows": ({"chunks": torch.zeros(1, 3, 4, **I32)}, r"chunks: expected int32 \[2, 3, any\], got int32 \[1, 3"),
    "chunks high": ({"chunks": THIRD}, r"chunks: expected chunks in \[0, 3\) .*, got 3 at \[0, 0, 1\]"),
    "short table": ({"cos": torch.zeros(1, 7, 8), "sin": torch.zeros(1, 7, 8)}, r"chunks: expected chunks in \[0, 0\)"),
    "source": ({"source": torch.tensor([0, 2], **I32)},
               r"source: expected numbers of prompts in \[0, 2\), got 2 at row 1"),
    "slots": ({"slots": torch.zeros(2, 3, 5, **I32)}, r"slots: expected int32 \[2, 3, 4\]"),
    "slots high": ({"slots": THIRD + 2}, r"slots: expected slots of keys in \[0, 5\), got 5 at \[0, 0, 1\]"),
    "slots low": ({"slots": THIRD - 1}, r"slots: expected slots of keys in \[0, 5\), got -1 at \[0, 0, 0\]"),
    "fresh": ({"fresh": torch.zeros(2, 3, 4, dtype=torch.bool)}, r"fresh: expected uint8 \[2, 3, 4\], got bool"),
    "few slots": ({"keys": torch.zeros(2, 3, 3, 8, 16)},
                  r"slots: expected slots of keys in \[0, 3\), got 3 at \[0, 0, 3\]"),
    "keys d": ({"keys": torch.zeros(2, 3, 5, 8, 15)}, r"keys: expected .* \[2, 3, any, any, 16\], got"),
    "keys dtype": ({"keys": torch.zeros(2, 3, 5, 8, 16).double()}, r"keys: expected .*, got float64"),
    "keys layout": ({"keys": torch.zeros(2, 3, 8, 5, 16).transpose(2, 3)},
                    r"keys: expected chunks that are contiguous"),
    "no sin": ({"sin": None}, r"sin: expected float32 \[1, 30, 8\], got None"),
    "no cos": ({"cos": None}, r"cos: expected float32 or bfloat16 \[any, any, any\], got None"),
    "sin dtype": ({"sin": torch.zeros(1, 30, 8).bfloat16()}, r"sin: expected float32 \[1, 30, 8\], got bfloat16"),
    "tables": ({"cos": torch.zeros(3, 30, 8), "sin": torch.zeros(3, 30, 8)},
               r"cos: expected one table, or one for each"),
    "wide": ({"cos": torch.zeros(1, 30, 9), "sin": torch.zeros(1, 30, 9)}, r"cos: expected at most 8 angles"),
    "values dtype": (VALUES | {"values": VALUES["values"].half()},
                     r"values: expected float32 or int8 \[2, 3, any, 8, 16\]"),
    "value scale": (VALUES | {"values": VALUES["values"].char()},
                    r"value_scale: expected float32 \[2, 3, 3, 8\], got None"),
    "needless value scale": (VALUES | {"value_scale": torch.ones(2, 3, 3, 8)},
                             r"value_scale: expected None, as values are not int8, got float32"),
    "no pool": (VALUES | {"value_pool": None}, r"value_pool: expected float32 \[2, 3, 5, 8, 16\], got None"),
    "few values": (VALUES | {"values": VALUES["values"][:, :, :2], "chunks": THIRD - (THIRD > 0).int()},
                   r"chunks: expected chunks in \[0, 2\) .*, got 2 at"),
    "values layout": (VALUES | {"values": torch.zeros(2, 3, 3, 16, 8).mT},
                      r"values: expected chunks that are contiguous"),
    "list": ({"u": [[[0.0]]]}, r"u: expected a plain torch.Tensor, got list"),
    "device": ({"chunks": torch.zeros(2, 3, 4, device="meta", **I32)},
               r"chunks: expected a tensor on cpu, got one on m"),
    "grad": ({"basis": torch.zeros(2, 3, 6, 16, requires_grad=True)}, r"basis: expected a tensor without gradient"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    fastpost.kv_reconstruct(**(GOOD | VALUES))
    with pytest.raises(ValueError, match=r"\[kv_reconstruct\] " + message):
        fastpost.kv_reconstruct(**(GOOD | change))


def test_workspace_that_is_too_small():
    (u, basis, chunks, keys), options = CASES[0].inputs()
    with pytest.raises(ValueError, match=r"\[kv_reconstruct\] workspace: expected at least \d+ bytes, got uint8 \[8\]"):
        _core.kv_reconstruct(u, options["scale"], basis, None, None, None, chunks, None, None, None, None,
                             torch.zeros(8).byte(), keys, None)  # fmt: skip
    assert torch.isnan(keys).all()
