# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastpost
from compare import FLOATS, error, overall
from drawn import cu, draw
from fastpost import _core
from fastpost.reference import paged_attention as reference

Case, CASES = reference.Case, reference.cases()
NAN = torch.nan
# Many rows in bfloat16 multiply shares of 8 bits, as torch's own attention does; everything else is rounded at the end.
EXACT = 3e-6
ROUNDED = {torch.float32: EXACT, torch.bfloat16: 4e-3, torch.float16: 1e-3}
SHARES = 1e-2  # of the worst row; of all together a quarter


def is_few(case):
    return all(n == 1 or n * case.h // case.g <= 16 for n in case.rows or (1,))


def limit(case, dtype, device="cpu"):
    """Of float32 results, relative to a row's norm."""
    return EXACT if dtype == torch.float32 or (is_few(case) and device == "cpu") else SHARES


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def truth_of(tensors, options):
    options = {n: tuple(map(double, o)) if n == "begun" else double(o) for n, o in options.items()}
    return reference.paged_attention(*map(double, tensors), **options, return_lse=True)


def rows_error(ours, truth):
    return error(ours.flatten(0, 1), truth.flatten(0, 1))


def agree(out, truth, case, dtype):
    most = limit(case, dtype, out.device.type)
    return rows_error(out, truth) < most and (most == EXACT or overall(out, truth) < SHARES / 4)


def run(tensors, options, **more):
    return fastpost.paged_attention(*tensors, **options, **{"return_lse": True, "out_dtype": torch.float32} | more)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    tensors, options = case.inputs(dtype, device)
    out, lse = run(tensors, options)
    fresh, _ = case.inputs(dtype, device)
    true_out, true_lse = truth_of(fresh, options)
    assert out.dtype == lse.dtype == torch.float32
    assert agree(out, true_out, case, dtype)
    assert torch.equal(lse.isinf(), true_lse.isinf())
    seen = ~true_lse.isinf()
    assert ((lse.double() - true_lse)[seen].abs() < 2e-4 + 1e-6 * true_lse[seen].abs()).all()
    assert torch.all(out[~seen] == 0)
    rounded = run(*(case.inputs(dtype, device)), out_dtype=None, return_lse=False)
    assert rounded.dtype == dtype and torch.equal(rounded, out.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.append], ids=lambda c: c.name)
def test_new_keys_are_written_and_nothing_else(case, dtype, device):
    tensors, options = case.inputs(dtype, device)
    run(tensors, options)
    expected, _ = case.inputs(dtype, device)
    reference.paged_attention(*expected, **options)
    before, _ = case.inputs(dtype, device)
    for ours, theirs, old in zip(tensors[1:3], expected[1:3], before[1:3]):
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7)) and not torch.equal(ours, old)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 24, 25, 43, 150])
def test_edges_of_tiles(rows, dtype, device):
    """Numbers of rows, dimensions, pages and lengths around what the kernels take at once."""
    g = torch.Generator().manual_seed(rows)

    def any_of(*values):
        return values[int(torch.randint(len(values), (), generator=g))]

    for _ in range(4):
        groups, heads = any_of(1, 2, 3, 5, 9, 17), any_of(1, 2)
        case = Case("", groups * heads, heads, any_of(1, 7, 16, 31, 33, 64, 65, 96, 128, 200), any_of(1, 3, 16, 128),
                    tuple(rows + any_of(0, 1, 15, 16, 127, 128, 129, 511, 512, 513) for _ in range(2)),
                    rows=(rows, max(rows - 1, 1)), window=any_of(None, None, 1, 40, 130), append=any_of(True, False),
                    per_head=any_of(True, False), rows_of_pool=any_of(1, 2))  # fmt: skip
        tensors, options = case.inputs(dtype, device)
        out, lse = run(tensors, options)
        fresh, _ = case.inputs(dtype, device)
        true_out, true_lse = truth_of(fresh, options)
        assert agree(out, true_out, case, dtype), case
        assert torch.allclose(lse.double(), true_lse, rtol=1e-6, atol=2e-4), case


def attention(q, k, v):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_worse_than_torch(scale, dtype, device):
    for rows, length in ((1, 700), (200, 200)):
        q, k, v = (draw(n, h, 64, seed=n, device=device).mul(s).to(dtype)
                   for n, h, s in ((rows, 6, scale), (length, 2, scale), (length, 2, 1)))  # fmt: skip
        pools = [x.view(1, length // 4, 4, 2, 64).permute(0, 3, 1, 2, 4) for x in (k, v)]
        table = torch.arange(length // 4, device=device, dtype=torch.int32)[None, None]
        lengths = torch.tensor([length], device=device, dtype=torch.int32)
        ours = fastpost.paged_attention(q, *pools, table, lengths, cu_seqlens=cu(rows, device=device))
        heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]

        truth, plain = (attention(*map(c, heads_first)) for c in (torch.Tensor.double, torch.clone))
        assert rows_error(ours, truth) < 1.5 * rows_error(plain, truth) + ROUNDED[dtype]


def test_what_lies_beyond_is_not_read(device):
    """Positions from `length` on, pages that no table names, table entries after the last page."""
    for rows in ((1, 1), (30, 9)):
        case = Case("", 4, 2, 64, 16, (100, 37), rows=rows)
        tensors, options = case.inputs(device=device)
        expected = run(tensors, options)
        for b, n in enumerate(case.lengths):
            table = tensors[3][b, 0]
            for pool in tensors[1:3]:
                pool[:, :, table[n // 16].long(), n % 16 :] = NAN
            table[n // 16 + 1 :] = 1 << 30
        assert all(torch.equal(a, b) for a, b in zip(run(tensors, options), expected))


@pytest.mark.parametrize("rows", [1, 60])
def test_what_lies_before_the_window_is_not_read(rows, device):
    case = Case("", 4, 2, 64, 16, (400,), rows=(rows,), window=30)
    tensors, options = case.inputs(device=device)
    expected = run(tensors, options)
    gone = 400 - (rows - 1) - 30
    for pool in tensors[1:3]:
        table = tensors[3][0, 0].long()
        pool[:, :, table[: gone // 16]] = NAN
        pool[:, :, table[gone // 16], : gone % 16] = NAN
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, options), expected))


def test_outputs_and_workspace_hold_anything(device):
    for case in CASES:
        tensors, options = case.inputs(device=device)
        query, keys, values, table, length = tensors
        expected = run(tensors, options)
        out, lse = (torch.full_like(x, NAN) for x in expected)
        bytes = _core.paged_attention_bytes(query, keys, table, torch.get_num_threads())
        workspace = torch.full((bytes,), 255, dtype=torch.uint8, device=device)
        o = options.get
        _core.paged_attention(query, keys, values, table, None, length, o("cu_seqlens"), o("key_row"), o("value_row"),
                              o("new_keys"), o("new_values"), *(o("begun") or (None, None)),
                              case.scaling or case.d**-0.5, case.softcap or 0, case.window or 0, workspace, out,
                              lse)  # fmt: skip
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [(1, 1, 1), (40, 1, 90), (3, 2, 1)])
def test_a_sequence_does_not_depend_on_the_others(rows, dtype, device):
    case = Case("", 6, 2, 64, 16, (1300, 70, 640), rows=rows)
    (query, keys, values, table, length), options = case.inputs(dtype, device)
    out, lse = run((query, keys, values, table, length), options)
    for b, first in enumerate((0, rows[0], rows[0] + rows[1])):
        mine = slice(first, first + rows[b])
        alone = run((query[mine], keys, values, table[b : b + 1], length[b : b + 1]),
                    {"cu_seqlens": cu(rows[b], device=device)})  # fmt: skip
        assert torch.equal(alone[0], out[mine]) and torch.equal(alone[1], lse[mine])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_where_pages_lie_does_not_matter(dtype, device):
    for rows in (1, 70):
        case = Case("", 6, 2, 64, 16, (1100,), rows=(rows,), per_head=True)
        (query, keys, values, table, length), options = case.inputs(dtype, device)
        expected = run((query, keys, values, table, length), options)
        place = torch.randperm(keys.shape[2], device=device)
        moved = torch.empty_like(keys)
        moved[:, :, place] = keys
        there = torch.where(table < 0, -1, place[table.clamp(min=0).long()]).int()
        options["value_table"] = table
        assert all(torch.equal(a, b) for a, b in zip(run((query, moved, values, there, length), options), expected))


def test_any_strides(device):
    """Pools as the parts of one tensor, queries and new keys as columns of one product."""
    for rows in (1, 50):
        case = Case("", 6, 2, 40, 16, (200,), rows=(rows,), append=True)
        (query, keys, values, table, length), options = case.inputs(device=device)
        both = torch.stack([keys, values], 4).permute(0, 2, 3, 1, 4, 5).contiguous().permute(0, 3, 1, 2, 4, 5)
        columns = torch.cat([query, options["new_keys"], options["new_values"]], 1)
        expected = run((query, keys, values, table, length), options)
        options |= {"new_keys": columns[:, 6:8], "new_values": columns[:, 8:]}
        ours = run((columns[:, :6], both[..., 0, :], both[..., 1, :], table, length), options)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected))
        assert torch.equal(both[..., 0, :].nan_to_num(7), keys.nan_to_num(7))


def test_values_in_another_pool(device):
    """Of other pages and with a table of its own; a page that one of the tables lacks is not seen."""
    case = Case("", 4, 2, 64, 8, (90, 33), per_head=True)
    (query, keys, values, table, length), options = case.inputs(device=device)
    expected = run((query, keys, values, table, length), options)
    more = torch.cat([torch.full_like(values, NAN), values], 2)
    shifted = torch.where(table < 0, -1, table + values.shape[2]).int()
    options["value_table"] = shifted
    assert all(torch.equal(a, b) for a, b in zip(run((query, keys, more, table, length), options), expected))
    full = torch.where(table < 0, 0, table).int()
    assert all(torch.equal(a, b) for a, b in zip(run((query, keys, more, full, length), options), expected))


@pytest.mark.parametrize("rows", [1, 60])
def test_goes_on(rows, device):
    """Attention to two halves, one after the other, is attention to the whole."""
    case = Case("", 4, 2, 64, 16, (160 + rows,), rows=(rows,))
    (query, keys, values, table, length), options = case.inputs(device=device)
    whole = run((query, keys, values, table, length), options)
    early, late = table.clone(), table.clone()
    early[:, :, 7:], late[:, :, :7] = -1, -1
    begun = run((query, keys, values, early, length), options)
    both = run((query, keys, values, late, length), options | {"begun": begun})
    assert rows_error(both[0], whole[0]) < EXACT and torch.allclose(both[1], whole[1], atol=1e-5)
    nothing = torch.full_like(begun[0], NAN), torch.full_like(begun[1], -torch.inf)
    again = run((query, keys, values, table, length), options | {"begun": nothing})
    assert all(torch.equal(a, b) for a, b in zip(again, whole))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("window", [None, 150])
def test_same_bits_on_any_number_of_threads(window, dtype):
    case = Case("", 6, 2, 64, 16, (1900, 400, 70), rows=(1, 390, 3), append=True, window=window)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(*case.inputs(dtype)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_decoding_gives_what_the_prompt_gives(device):
    """A row alone and the same row of a prompt."""
    case = Case("", 6, 2, 64, 16, (90,), rows=(90,), append=True)
    tensors, options = case.inputs(device=device)
    out, _ = run(tensors, options)
    query, keys, values, table, _ = tensors
    for i in (0, 1, 17, 89):
        length = torch.tensor([i + 1], dtype=torch.int32, device=device)
        alone, _ = run((query[i : i + 1], keys, values, table, length), {})
        assert rows_error(alone, out[i : i + 1]) < EXACT


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    """The same tests in a process of its own, where the CPU has this set."""
    env = os.environ | {"FASTPOST_ISA": isa, "OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, "-c", "from fastpost import _core; _core.build_info()"], env=env).returncode:
        pytest.skip(f"this CPU has no {isa}")
    names = "matches_reference or edges or does_not_depend"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", names]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_opcheck(device):
    case = Case("", 4, 2, 16, 8, (20, 9), rows=(3, 1), append=True, begun=True)
    tensors, options = case.inputs(device=device)
    before = (None, options["cu_seqlens"], None, None)
    scalars = 0.25, 0.0, 0, True, False
    new = options["new_keys"], options["new_values"]
    torch.library.opcheck(torch.ops.fastpost.paged_attention.default, (*tensors, *before, *options["begun"], *scalars))
    torch.library.opcheck(
        torch.ops.fastpost.paged_attention_append.default, (*tensors, *before, *new, *options["begun"], *scalars)
    )


def test_refuses_gradients():
    tensors, options = Case("", 2, 1, 16, 8, (5,), append=True).inputs()
    for name in ("query", "new_keys"):
        mine = [tensors[0].clone().requires_grad_(name == "query"), *tensors[1:]]
        given = options | ({name: options[name].clone().requires_grad_()} if name in options else {})
        with pytest.raises(ValueError, match=rf"\[paged_attention\] {name}: expected a tensor without gradient"):
            run(mine, given)
        with torch.no_grad():
            run(mine, given)


T, K = torch.zeros(3, 4, 16), torch.zeros(1, 2, 5, 8, 16)
TABLE, LENGTH = torch.zeros(3, 1, 2).int(), torch.full((3,), 3).int()
GOOD = {"query": T, "keys": K, "values": K.clone(), "table": TABLE, "length": LENGTH}
NEW = {"new_keys": torch.zeros(3, 2, 16), "new_values": torch.zeros(3, 2, 16)}
BEGUN = (torch.zeros(3, 4, 16), torch.zeros(3, 4))
BAD = {
    "query dtype": ({"query": T.int()}, r"query: expected float32 or bfloat16 or float16 \[any, any, any\], got int32"),
    "query list": ({"query": [1.0]}, r"query: expected a plain torch.Tensor, got list"),
    "query layout": ({"query": torch.zeros(3, 16, 4).mT}, r"query: expected a last dimension of stride 1"),
    "keys dtype": ({"keys": K.bfloat16()}, r"keys: expected float32 \[any, any, any, any, 16\], got bfloat16"),
    "keys shape": ({"keys": K[0]}, r"keys: expected float32 .*, got float32 \[2, 5, 8"),
    "keys device": ({"keys": K.to("meta")}, r"keys: expected a tensor on cpu, got one on meta"),
    "heads": ({"query": torch.zeros(3, 5, 16)}, r"keys: expected .* query heads \(5\) a multiple of G"),
    "no key heads": ({"keys": K[:, :0], "values": K[:, :0]}, r"keys: expected .* a multiple of G, none of them 0, got"),
    "no query heads": ({"query": T[:, :0]}, r"keys: expected .* query heads \(0\) a multiple of G, none of them 0"),
    "no dimensions": ({"query": T[:, :, :0]}, r"keys: expected float32 .*, 0\], got float32"),
    "query scalar": ({"query": torch.tensor(1.0)}, r"query: expected .* \[any, any, any\], got float32 \[\]"),
    "values": ({"values": K[:, :, :, :4]}, r"values: expected float32 \[any, 2, any, 8, 16\], got float32 \[1, 2"),
    "table dtype": ({"table": torch.zeros(3, 1, 2)}, r"table: expected int32 \[any, any, any\], got float32"),
    "table heads": ({"table": torch.zeros(3, 3, 2).int()}, r"table: expected int32 \[3, 1 or 2, any\], got int32"),
    "table batch": ({"table": torch.zeros(2, 1, 2).int()}, r"table: expected int32 \[3, any, any\], got int32 \[2, 1"),
    "page": ({"table": TABLE + 5}, r"table: expected pages in \[0, 5\), or -1, got 5"),
    "page below": ({"table": TABLE - 2}, r"table: expected pages .*, got -2 for sequence 0"),
    "value page": ({"value_table": TABLE + 7}, r"value_table: expected pages in \[0, 5\), .* got 7"),
    "value table": ({"value_table": torch.zeros(3, 1, 3).int()}, r"value_table: expected as many pages as table \(2\)"),
    "length dtype": ({"length": torch.zeros(3).long()}, r"length: expected int32 \[any\], got int64 \[3\]"),
    "too long": ({"length": LENGTH + 14}, r"length: .* at most .* \(16\), got 17 for sequence 0"),
    "too short": ({"length": LENGTH - 3} | NEW, r"length: .* at least the rows of a sequence \(1\).* got 0"),
    "sequences": ({"length": torch.zeros(2).int(), "table": torch.zeros(2, 1, 2).int()},
                  r"cu_seqlens: expected int32 \[3\], as there are 3 rows of 2 sequences, got None"),
    "cu_seqlens": ({"cu_seqlens": cu(1, 2, 4)}, r"cu_seqlens: expected 3 \(the number of tokens\) as last element"),
    "cu_seqlens shape": ({"cu_seqlens": cu(3)}, r"cu_seqlens: expected int32 \[4\], got int32 \[2\]"),
    "key_row": ({"key_row": torch.ones(3).int()}, r"key_row: expected numbers in \[0, 1\), got 1 at index 0"),
    "value_row": ({"values": K.repeat(2, 1, 1, 1, 1)}, r"value_row: expected int32 \[3\], which of the 2 pools is"),
    "one of two": ({"new_keys": NEW["new_keys"]}, r"new_values: expected both .*, or none, got None"),
    "new_keys": (NEW | {"new_keys": torch.zeros(3, 4, 16)}, r"new_keys: expected float32 \[3, 2, 16\], got float32"),
    "no page": (NEW | {"table": TABLE - 1}, r"table: expected a page for every new position, got -1"),
    "begun": ({"begun": BEGUN[0]}, r"begun: expected a pair \(out, lse\), got Tensor"),
    "begun dtype": ({"begun": (BEGUN[0].half(), BEGUN[1])}, r"begun out: expected float32 \[3, 4, 16\], got float16"),
    "begun lse": ({"begun": (BEGUN[0], BEGUN[1][:2])}, r"begun lse: expected float32 \[3, 4\], got float32 \[2, 4\]"),
    "softcap": ({"softcap": -1.0}, r"softcap: expected a number above 0, or None, got -1"),
    "window": ({"window": -1}, r"window: expected a number above 0, or None, got -1"),
    "out_dtype": ({"out_dtype": torch.float16}, r"out_dtype: expected None, torch.float32 .*, got torch.float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    fastpost.paged_attention(**GOOD)
    with pytest.raises(ValueError, match=r"\[paged_attention\] " + message):
        fastpost.paged_attention(**(GOOD | change))


def test_a_workspace_too_small_is_refused():
    q, k, v, table, length = GOOD.values()
    none = [None] * 8
    with pytest.raises(ValueError, match=r"\[paged_attention\] workspace: expected at least \d+ bytes, got 8"):
        _core.paged_attention(q, k, v, table, None, length, *none[:7], 0.25, 0.0, 0, torch.empty(8, dtype=torch.uint8),
                              torch.empty(3, 4, 16), None)  # fmt: skip


def test_the_reference_can_take_over(monkeypatch):
    tensors, options = CASES[2].inputs()
    expected = reference.paged_attention(*tensors, **options)
    monkeypatch.setattr("fastpost.ops.paged_attention.USE_REFERENCE", True)
    assert torch.equal(fastpost.paged_attention(*tensors, **options), expected)
