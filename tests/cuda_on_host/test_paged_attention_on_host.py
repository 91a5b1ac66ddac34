# SPDX-License-Identifier: Apache-2.0
"""paged_attention's CUDA kernels on the CPU: those of mma.sync with the instruction replaced by exchanges that follow
the same fragments, and the plain ones. Outputs and workspace are poisoned and lie between guards."""

import ctypes
import itertools
import shutil

import on_host
import pytest
import torch

from compare import FLOATS, error
from fastpost.reference import paged_attention as reference

pytestmark = pytest.mark.skipif(shutil.which(on_host.COMPILER) is None, reason=f"needs {on_host.COMPILER}")
NAN, INF = torch.nan, torch.inf
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
TENSORS = ("value_table", "cu_seqlens", "key_row", "value_row", "new_keys", "new_values")
Case = reference.Case

# Few rows: 128 positions to a split, more in wide tables; 16 query heads to a tile. Many: 64 rows to a tile.
MORE = [
    Case("splits", 4, 2, 64, 16, (700, 129, 128, 1, 0)),
    Case("splits-window", 4, 2, 64, 16, (700, 300), window=150, begun=True),
    Case("splits-and-holes", 6, 2, 128, 8, (300, 260), per_head=True, rows_of_pool=2, append=True),
    Case("wide-table", 2, 1, 32, 700, (10_000, 200)),
    Case("large-group", 35, 1, 64, 16, (90, 200)),
    Case("wide-head", 3, 1, 256, 16, (70, 140)),
    Case("wide-head-part", 2, 1, 200, 8, (40,)),
    Case("few-rows", 6, 2, 64, 16, (150, 40, 20), rows=(2, 0, 5), append=True),
    Case("one-long", 3, 1, 64, 16, (150, 40), rows=(5, 1), append=True, window=100),
    Case("wide-head-prompt", 2, 2, 256, 16, (90,), rows=(80,), append=True),
    Case("prompt-options", 4, 2, 72, 16, (140, 66), rows=(40, 66), softcap=8.0, window=50, begun=True, append=True),
    Case("prompt-and-holes", 8, 2, 64, 8, (100, 50), rows=(37, 33), per_head=True, rows_of_pool=2),
    Case("many-short-prompts", 8, 1, 32, 16, (7, 19, 5, 8), rows=(7, 19, 5, 8)),
    Case("odd-prompt", 3, 1, 33, 5, (60, 11), rows=(50, 11), append=True, window=30),
]


def guarded(shape, dtype, fill):
    """(tensor, its memory with 64 more elements on either side)."""
    n = int(torch.tensor(shape).prod()) if len(shape) else 1
    memory = torch.full((n + 128,), fill, dtype=dtype)
    return memory[64 : 64 + n].view(shape), memory


def untouched(memory):
    ends = torch.cat([memory[:64], memory[-64:]])
    return bool(torch.isnan(ends).all()) if ends.is_floating_point() else bool((ends == 255).all())


def run(core, query, keys, values, table, length, *, begun=None, scaling=None, softcap=None, window=None,
        out_dtype=None, **tensors):  # fmt: skip
    size = torch.zeros(1, dtype=torch.int64)
    core.paged_attention_bytes(query, keys, table, size)
    workspace, around_workspace = guarded((int(size),), torch.uint8, 255)  # NaN as float32
    out, around_out = guarded(query.shape, out_dtype or query.dtype, NAN)
    lse, around_lse = guarded(query.shape[:2], torch.float32, NAN)
    begun_out, begun_lse = begun or (None, None)
    given = {name: tensors.get(name) for name in TENSORS}
    scaling = query.shape[2] ** -0.5 if scaling is None else scaling
    core.paged_attention(query, keys, values, table, given["value_table"], length, given["cu_seqlens"],
                         given["key_row"], given["value_row"], given["new_keys"], given["new_values"], begun_out,
                         begun_lse, ctypes.c_double(scaling), ctypes.c_double(softcap or 0.0), window or 0, workspace,
                         out, lse)  # fmt: skip
    assert untouched(around_workspace) and untouched(around_out) and untouched(around_lse)
    return out, lse


def wide(x):
    if isinstance(x, tuple):
        return tuple(map(wide, x))
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check(core, tensors, options, out_dtype=None):
    dtype, pools = tensors[0].dtype, [p.clone() for p in tensors[1:3]]
    plain, plain_lse = reference.paged_attention(
        tensors[0], *(p.clone() for p in pools), *tensors[3:], **options, return_lse=True, out_dtype=out_dtype
    )
    pools_after = [p.double() for p in pools]
    truth, true_lse = reference.paged_attention(
        tensors[0].double(), *pools_after, *tensors[3:], **{k: wide(v) for k, v in options.items()}, return_lse=True
    )
    out, lse = run(core, tensors[0], *pools, *tensors[3:], **options, out_dtype=out_dtype)
    assert torch.equal(lse == -INF, true_lse == -INF)
    seen = true_lse > -INF
    assert torch.all(out[~seen] == 0)
    assert error(out.flatten(1), truth.flatten(1)) < max(
        ROUNDING[dtype], 1.5 * error(plain.flatten(1), truth.flatten(1))
    )
    assert error(lse[seen], true_lse[seen]) < 2e-6 + 1.5 * error(plain_lse[seen], true_lse[seen])
    for ours, theirs in zip(pools, pools_after, strict=True):
        assert torch.equal(ours.double().nan_to_num(7e7), theirs.nan_to_num(7e7))
    return out, lse


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", reference.cases() + MORE, ids=lambda c: c.name)
def test_cases(case, dtype, core):
    tensors, options = case.inputs(dtype)
    check(core, tensors, options)


@pytest.mark.parametrize("name", ["smollm2", "splits", "prompt", "odd"])
def test_float32_out(name, core):
    case = next(c for c in reference.cases() + MORE if c.name == name)
    tensors, options = case.inputs(torch.bfloat16)
    out, _ = check(core, tensors, options, out_dtype=torch.float32)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, (30, 20)], ids=["token", "prompt"])
def test_any_strides(rows, dtype, core):
    """Query and pools as views: heads between the tokens of a page, rows with something after them, values in another
    order than keys and with a table of their own."""
    tensors, options = Case("", 4, 2, 64, 16, (100, 37), rows=rows, append=True).inputs(dtype)
    query, keys, values, table, length = tensors
    query = torch.cat([query, torch.full_like(query, NAN)], dim=2)[..., :64]
    keys = keys.transpose(1, 3).contiguous().transpose(1, 3)
    order = torch.randperm(values.shape[2])
    values, value_table = values[:, :, order], order.argsort()[table.long()].int()
    options["new_keys"] = torch.cat([options["new_keys"]] * 2, dim=1)[:, 2:]
    assert not (query.is_contiguous() or keys.is_contiguous() or options["new_keys"].is_contiguous())
    expected = run(core, *(x.clone() for x in tensors), **options)
    ours = run(core, query, keys, values, table, length, **options, value_table=value_table)
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, (30, 20)], ids=["token", "prompt"])
def test_what_one_table_lacks_is_not_seen(rows, dtype, core):
    """Pages without a key, pages without a value."""
    tensors, options = Case("", 4, 2, 64, 16, (260, 87), rows=rows).inputs(dtype)
    values = tensors[3].clone()
    tensors[3][:, :, [0, 3]], values[:, :, [1, 3]] = -1, -1
    check(core, tensors, options | {"value_table": values})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, (30,)], ids=["token", "prompt"])
def test_nan_is_not_hidden(rows, dtype, core):
    """A key that is no number: every row that sees it says so."""
    for length in (50, 400):
        tensors, options = Case("", 2, 1, 64, 16, (length,), rows=rows).inputs(dtype)
        tensors[1][0, 0, tensors[3][0, 0, 0].long(), 3] = NAN
        out, lse = run(core, *tensors, **options)
        assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, (40, 30, 70)], ids=["token", "prompt"])
def test_rows_do_not_depend_on_others(rows, dtype, core):
    """Each sequence alone, and the batch backwards, have the same bits."""
    tensors, options = Case("", 6, 2, 64, 16, (130, 300, 70), rows=rows).inputs(dtype)
    query, keys, values, table, length = tensors
    out, lse = run(core, *tensors, **options)
    bounds = [*itertools.accumulate(rows or (1, 1, 1), initial=0)]
    for order in ([0], [1], [2], [2, 1, 0]):
        picked = torch.cat([torch.arange(bounds[b], bounds[b + 1]) for b in order])
        n = torch.tensor([0] + [bounds[b + 1] - bounds[b] for b in order])
        some = {"cu_seqlens": n.cumsum(0).int()} if rows else {}
        ours = run(core, query[picked], keys, values, table[order], length[order], **some)
        assert torch.equal(ours[0], out[picked]) and torch.equal(ours[1], lse[picked])


def test_splits_join_what_has_begun(core):
    """Half of the positions, then the other half with begun: the whole."""
    tensors, _ = Case("", 8, 2, 64, 16, (256, 256)).inputs(torch.float32)
    query, keys, values, table, _ = tensors
    half = torch.tensor([128, 128], dtype=torch.int32)
    whole, lse = run(core, query, keys, values, table, 2 * half)
    first = run(core, query, keys, values, table[:, :, :8].contiguous(), half)
    ours = run(core, query, keys, values, table[:, :, 8:].contiguous(), half, begun=first)
    assert error(ours[0].flatten(1), whole.flatten(1)) < 2e-6 and error(ours[1], lse) < 1e-6
    nothing = torch.full_like(whole, NAN), torch.full_like(lse, -INF)
    ours = run(core, query, keys, values, table, 2 * half, begun=nothing)
    assert torch.equal(ours[0], whole) and torch.equal(ours[1], lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, (30, 40)], ids=["token", "prompt"])
def test_wild_values_stay_inside(rows, dtype, core):
    """Tables, lengths and bounds that point anywhere: nothing outside the tensors is read or written."""
    g = torch.Generator().manual_seed(5)
    tensors, options = Case("", 4, 2, 64, 16, (100, 60), rows=rows, append=True, rows_of_pool=2).inputs(dtype)
    query, keys, values, table, length = tensors
    pools = []
    for pool in (keys, values):  # between guards
        inner, memory = guarded(pool.shape, dtype, NAN)
        inner.copy_(pool.nan_to_num(0.5))
        pools.append((inner, memory))
    extremes = torch.tensor([-(2**31), -7, -1, 10**6, 2**31 - 1], dtype=torch.int32)

    def wild(x):
        picked = extremes[torch.randint(0, len(extremes), x.shape, generator=g)]
        return torch.where(torch.rand(x.shape, generator=g) < 0.5, picked, x)

    for _ in range(6):
        changed = options | {name: wild(x) for name, x in options.items() if name.endswith("row")}
        if rows:
            changed["cu_seqlens"] = wild(options["cu_seqlens"])
        run(core, query, *(inner for inner, _ in pools), wild(table), wild(length), **changed)
    assert all(untouched(memory) for _, memory in pools)


@pytest.mark.parametrize("rows", [None, (20,)], ids=["token", "prompt"])
def test_more_than_2_31_elements(rows, core):
    """Pages 2^29 elements apart in memory that is reserved but never touched in between."""
    d, page, stride = 64, 16, 1 << 29
    tensors, options = Case("", 2, 1, d, page, (50,), rows=rows).inputs(torch.bfloat16)
    query, keys, _, table, length = tensors
    pages = keys.shape[2]
    far = torch.empty((pages - 1) * stride + page * d, dtype=torch.bfloat16).as_strided(
        keys.shape, (0, 0, stride, d, 1)
    )
    far.copy_(keys)
    assert int(table[0, 0, :4].max()) * stride >= 2**31
    expected = run(core, query, keys, keys, table, length, **options)
    ours = run(core, query, far, far, table, length, **options)
    assert all(map(torch.equal, ours, expected))


def test_refuses_wide_heads(core):
    tensors, options = Case("", 1, 1, 257, 8, (5,)).inputs(torch.float32)
    with pytest.raises(RuntimeError, match="rows of at most 256 on a GPU, got 257"):
        run(core, *tensors, **options)
