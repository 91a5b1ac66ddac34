# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of kv_factorize, kv_landmarks, kv_reconstruct on the CPU: against float64, between guards, and with
indices that no kernel may trust."""

import itertools
import shutil

import on_host
import pytest
import torch

from compare import FLOATS, error
from fastpost.reference import kv_factorize as factorize
from fastpost.reference import kv_landmarks as landmarks
from fastpost.reference import kv_reconstruct as reconstruct
from fastpost.reference._int8_rows import quantize_rows

pytestmark = pytest.mark.skipif(shutil.which(on_host.COMPILER) is None, reason=f"needs {on_host.COMPILER}")
NAN, INF = torch.nan, torch.inf
HALVES = [torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4}
GUARD = 64


class Guarded:
    """New tensors full of NaN (or of 85, if integers), each between guards that have to stay."""

    def __init__(self):
        self.rooms = []

    def __call__(self, *shape, dtype=torch.float32):
        count = torch.Size(shape).numel()
        room = torch.full((count + 2 * GUARD,), NAN if dtype.is_floating_point else 85, dtype=dtype)
        self.rooms.append((room, room[GUARD : GUARD + count].clone()))
        return room[GUARD : GUARD + count].view(shape)

    def check(self):
        for room, _ in self.rooms:
            edges = torch.cat([room[:GUARD], room[-GUARD:]])
            assert torch.all(edges.isnan() if room.dtype.is_floating_point else edges == 85)


@pytest.fixture
def new():
    rooms = Guarded()
    yield rooms
    rooms.check()


@pytest.fixture(params=[8, 9], ids=["sm_80", "sm_90"])
def capability(request, core):
    core.set_capability(request.param)
    yield request.param
    core.set_capability(8)


def lengths(length, b, s):
    return [s] * b if length is None else [min(max(n, 0), s) for n in length.tolist()]


# ---- kv_factorize ----


def workspace(core, new, keys, rank):
    size = torch.zeros(1, dtype=torch.int64)
    core.kv_factorize_bytes(keys, rank, size)
    return new(int(size), dtype=torch.uint8).fill_(255)  # NaN in any float


def gram(core, new, keys, length):
    b, _, d = keys.shape
    out = new(b, d, d)
    core.kv_factorize_gram(keys, length, workspace(core, new, keys, 1), out)
    return out


def poisoned(keys, length):
    """What lies beyond a sequence's end is NaN, and must not be looked at."""
    keys = keys.clone()
    for b, n in enumerate(lengths(length, *keys.shape[:2])):
        keys[b, n:] = NAN
    return keys


def check_gram(out, keys, length):
    for b, n in enumerate(lengths(length, *keys.shape[:2])):
        rows = keys[b, :n].double()
        assert error(out[b], rows.T @ rows) < 2e-6
        assert torch.equal(out[b], out[b].T)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", factorize.cases(), ids=lambda c: c.name)
def test_gram(case, dtype, core, new, capability):
    if capability == 9 and (dtype == torch.float32 or case.d % 8):
        pytest.skip("runs what runs on sm_80")
    keys, length = case.inputs(dtype)
    keys = poisoned(keys, length)
    check_gram(gram(core, new, keys, length), keys, length)


@pytest.mark.parametrize("b,s,d,length", [
    (1, 1100, 32, None),  # shared out among three blocks
    (1, 40, 520, None),  # several tiles, and a tile's rows among its columns or not
    (3, 130, 264, [130, 64, 77]),
    (2, 700, 40, [-3, 10**6]),
    (2, 0, 24, None),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gram_of_any_shape(b, s, d, length, dtype, core, new, capability):
    if capability == 9 and dtype == torch.float32:
        pytest.skip("runs what runs on sm_80")
    length = length and torch.tensor(length, dtype=torch.int32)
    keys = poisoned(torch.randn(b, s, d).to(dtype), length)
    out = gram(core, new, keys, length)
    check_gram(out, keys, length)
    for row in range(b):  # a sequence's bits do not depend on its neighbours, nor on the run
        alone = gram(core, new, keys[row : row + 1], None if length is None else length[row : row + 1])
        assert torch.equal(alone[0], out[row])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gram_of_a_view(dtype, core, new, capability):
    """Rows apart and sequences in other orders; then rows that begin between pieces of 16 bytes."""
    room = torch.randn(90, 2, 72).to(dtype)
    for keys in (room.transpose(0, 1)[:, :, :64], room.transpose(0, 1)[:, :, 3:67], room[:1].expand(90, 2, 72)[:2]):
        check_gram(gram(core, new, keys, None), keys, None)


@pytest.mark.parametrize("m,n", [(64, 64), (128, 128), (128, 256)])
def test_tiles_cover_the_upper_triangle(m, n, core):
    for d in (1, m, m + 1, n, n + 1, 3 * n, 1024, 5 * n + m - 1):
        wanted = {(r, c) for r, c in itertools.product(range(-(-d // m)), range(-(-d // n))) if (c + 1) * n > r * m}
        out = torch.empty(len(wanted), 2, dtype=torch.int64)
        core.gram_tiles(d, m, n, out)
        assert set(map(tuple, out.tolist())) == wanted


def project(core, new, keys, length, directions, out):
    """out: a dtype of u; int8 has scales."""
    b, s, _ = keys.shape
    u = new(b, s, directions.shape[2], dtype=out)
    scale = new(b, s) if out == torch.int8 else None
    core.kv_factorize_project(keys, length, directions, workspace(core, new, keys, directions.shape[2]), u, scale)
    return u, scale


# Of the sum of |key|·|direction|: directions of small singular values are large, and most of what they add up cancels.
# Pairs of bfloat16 leave 2^-17 of each direction, those of float16 and float32 no more than float32 sums do.
PRODUCT = {torch.float32: 1e-6, torch.bfloat16: 2.0**-17 + 1e-6, torch.float16: 1e-6}
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def check_projection(u, scale, keys, length, directions):
    for b, n in enumerate(lengths(length, *keys.shape[:2])):
        assert torch.all(u[b, n:] == 0) and (scale is None or torch.all(scale[b, n:] == 0))
        rows, columns = keys[b, :n].double(), directions[b].double()
        truth, doubt = rows @ columns, PRODUCT[keys.dtype] * (rows.abs() @ columns.abs())
        if scale is None:
            off = (u[b, :n].double() - truth).abs()
            assert torch.all(off <= doubt + HALF_UNIT[u.dtype] * (truth.abs() + doubt) + 2.0**-25)
        else:
            most, doubts = truth.abs().amax(1), doubt.amax(1)
            assert torch.all((127 * scale[b, :n].double() - most).abs() <= doubts + 1e-6 * most)
            step = scale[b, :n, None].double()
            off = (u[b, :n].double() * step - truth).abs()
            assert torch.all(off <= 0.5 * step * (1 + 1e-4) + doubt)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", factorize.cases(), ids=lambda c: c.name)
def test_project(case, dtype, core, new):
    keys, length = case.inputs(dtype)
    directions = factorize.kv_factorize(keys.double(), case.rank, length=length).directions.float()
    keys = poisoned(keys, length)
    for out in (torch.int8, dtype, torch.float32):
        check_projection(*project(core, new, keys, length, directions, out), keys, length, directions)


@pytest.mark.parametrize("b,s,d,rank", [
    (1, 20, 72, 65),  # one tile of 160
    (2, 131, 40, 40),  # two blocks of tokens
    (1, 9, 40, 264),  # columns in two passes
    (1, 70, 136, 130),
    (1, 3, 8, 8),
])  # fmt: skip
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_project_of_any_shape(b, s, d, rank, dtype, core, new):
    keys = torch.randn(b, s, d).to(dtype)
    size = 10.0 ** torch.randint(-9, 9, (b, 1, rank)).float()  # float16 has no such range
    directions = torch.randn(b, d, rank) * size
    directions[:, :, 0] = 0
    for out in (torch.int8, torch.float32):
        u, scale = project(core, new, keys, None, directions, out)
        check_projection(u, scale, keys, None, directions)
        again, _ = project(core, new, keys[-1:], None, directions[-1:], out)
        assert torch.equal(again[0], u[-1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_project_keeps_nan_in_its_row(dtype, core, new):
    keys = torch.randn(1, 20, 16).to(dtype)
    keys[0, 3, 5] = NAN
    keys[0, 7] = 0
    directions = torch.randn(1, 16, 8)
    u, scale = project(core, new, keys, None, directions, torch.int8)
    assert scale[0].isnan().nonzero().flatten().tolist() == [3] and scale[0, 7] == 0 and torch.all(u[0, 7] == 0)


# ---- kv_landmarks ----


def make_landmarks(core, new, keys, chunk, length, out):
    b, g, s, d = keys.shape
    count = s // chunk
    landmark, similarity = new(b, g, count, d, dtype=out), new(b, g, count)
    scale = new(b, g, count) if out == torch.int8 else None
    core.kv_landmarks(keys, length, chunk, landmark, scale, similarity)
    return landmark, scale, similarity


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", landmarks.cases(), ids=lambda c: c.name)
def test_landmarks(case, dtype, core, new):
    keys, length = case.inputs(dtype)
    truth = landmarks.kv_landmarks(keys.double(), chunk=case.chunk, length=length, bits=None)
    if length is not None:
        keys = poisoned(keys.transpose(1, 2), length).transpose(1, 2)
    for out in (torch.int8, dtype, torch.float32):
        landmark, scale, similarity = make_landmarks(core, new, keys, case.chunk, length, out)
        torch.testing.assert_close(similarity.double(), truth.similarity, rtol=0, atol=2e-6)
        if scale is None:
            assert error(landmark.flatten(0, 2), truth.landmark.flatten(0, 2)) < ROUNDING[out]
            continue
        most = truth.landmark.abs().amax(-1)
        torch.testing.assert_close(scale.double(), most / 127, rtol=1e-5, atol=0)
        off = (landmark.double() * scale[..., None].double() - truth.landmark).abs()
        assert torch.all(off <= (0.5 + 1e-3) * most[..., None] / 127)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", [1, 2, 34, 65, 96, 100, 128, 132, 192, 256, 260, 1100])
def test_landmarks_of_any_width(d, dtype, core, new):
    room = torch.randn(2, 19, 3, d + 5).to(dtype).transpose(1, 2)
    for keys in (room[..., :d], room[..., 3 : d + 3], room[..., :d].contiguous()):
        truth = landmarks.kv_landmarks(keys.double(), bits=None)
        landmark, _, similarity = make_landmarks(core, new, keys, 8, None, torch.float32)
        assert error(landmark.flatten(0, 2), truth.landmark.flatten(0, 2)) < 1e-6
        torch.testing.assert_close(similarity.double(), truth.similarity, rtol=0, atol=2e-6)


def test_int8_is_rounded_once(core, new):
    """Numbers beside the middle of two steps, which a product with 1 / scale would take to the other one."""
    most = torch.tensor(1.9536850452423096)
    half = (torch.arange(127) + 0.5) * (most / 127)
    row = torch.cat([half, half.nextafter(2 * half), half.nextafter(0 * half), most[None]])
    wanted, scale = quantize_rows(row)
    assert (wanted != (row * (1 / scale)).round()).sum() > 50
    landmark, own, _ = make_landmarks(core, new, row[None, None, None], 1, None, torch.int8)
    assert torch.equal(landmark[0, 0, 0], wanted) and torch.equal(own[0, 0, 0], scale)
    u, own = project(core, new, row[None, None], None, torch.eye(len(row))[None], torch.int8)
    assert torch.equal(u[0, 0], wanted) and torch.equal(own[0, 0], scale)


@pytest.mark.parametrize("chunk", [8, 4])
def test_landmarks_of_zeros_and_nan(chunk, core, new):
    keys = torch.randn(1, 1, 32, 64)
    keys[0, 0, 3], keys[0, 0, 8:16], keys[0, 0, 18, 7] = 0, 0, NAN
    landmark, scale, similarity = (x[0, 0] for x in make_landmarks(core, new, keys, chunk, None, torch.int8))
    first, zeros, bad = 0, 8 // chunk, 18 // chunk
    assert similarity[first] == 0 and similarity[zeros] == 0 and scale[zeros] == 0 and torch.all(landmark[zeros] == 0)
    assert similarity.isnan().nonzero().flatten().tolist() == scale.isnan().nonzero().flatten().tolist() == [bad]


# ---- kv_reconstruct ----

ORDER = ("u", "scale", "basis", "cos", "sin", "source", "chunks", "slots", "fresh", "values", "value_scale")


def run_reconstruct(core, tensors, on_cpu=True):
    """Keys and value pool, which the call changes, are tensors["keys"] and tensors["value_pool"]."""
    given = dict(tensors)
    for name in ("values", "value_scale"):
        if on_cpu and given.get(name) is not None:
            given[name] = on_host.OnCpu(given[name])
    core.kv_reconstruct(*(given.get(name) for name in ORDER), None, given["keys"], given.get("value_pool"))


def make_reconstruct(case, dtype, new, table=None):
    (u, basis, chunks, keys), options = case.inputs(dtype)
    table = table or (torch.float32 if dtype == torch.float16 else dtype)
    options |= {name: options[name].to(table) for name in ("cos", "sin") if name in options}
    tensors = {"u": u, "basis": basis, "chunks": chunks, "keys": new(*keys.shape, dtype=dtype)} | options
    if "value_pool" in options:
        tensors["value_pool"] = new(*keys.shape, dtype=dtype)
    return tensors


def by_reference(tensors, convert):
    """(keys, value_pool or None) after the reference, in the dtype that `convert` makes."""
    keep = ("scale", "value_scale")
    t = {k: convert(x.clone()) if x.is_floating_point() and k not in keep else x.clone() for k, x in tensors.items()}
    names = ("u", "basis", "chunks", "keys")
    reconstruct.kv_reconstruct(*(t[k] for k in names), **{k: x for k, x in t.items() if k not in names})
    return t["keys"], t.get("value_pool")


def same(ours, truth, plain):
    """Places that nobody writes are NaN still; errors are those of a float32 product, rounded."""
    assert torch.equal(ours.isnan(), truth.isnan())
    a, t, p = (x.nan_to_num().flatten(0, -2) for x in (ours, truth, plain))
    assert error(a, t) <= 1.1 * error(p, t) + 2e-6


def check_reconstruct(core, tensors):
    truths = by_reference(tensors, torch.Tensor.double)
    plains = by_reference(tensors, lambda x: x)
    run_reconstruct(core, tensors)
    for name, truth, plain in zip(("keys", "value_pool"), truths, plains):
        if truth is not None:
            same(tensors[name], truth, plain)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", reconstruct.cases(), ids=lambda c: c.name)
def test_reconstruct(case, dtype, core, new):
    check_reconstruct(core, make_reconstruct(case, dtype, new))


ANY = reconstruct.Case
SHAPES = {
    "wide-head": ANY("", 1, 1, 80, 256, 40, 5, values="float"),
    "wider": ANY("", 1, 1, 24, 264, 20, 3),
    "in-steps": ANY("", 1, 1, 160, 128, 500, 20),  # of the rank: the basis does not fit
    "in-steps-of-pieces": ANY("", 1, 1, 160, 128, 496, 20),
    "float-factors": ANY("", 1, 2, 64, 64, 24, 3, bits=None),
    "in-steps-of-floats": ANY("", 1, 1, 160, 128, 504, 20, bits=None),
    "rank-1": ANY("", 1, 1, 32, 64, 1, 3),
    "one-in-a-block": ANY("", 1, 1, 300, 16, 24, 2, chunk=150, values="int8"),
    "single-tokens": ANY("", 1, 2, 70, 32, 16, 40, chunk=1, values="int8", part_fresh=True),
    "odd-values": ANY("", 1, 1, 33, 18, 9, 6, chunk=3, values="int8"),
    "long-chunk": ANY("", 1, 1, 48, 64, 16, 2, chunk=20, values="float"),
    "halves-of-the-tables": ANY("", 2, 1, 48, 64, 16, 3, width=12, prompts=1),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_reconstruct_of_any_shape(name, dtype, core, new):
    check_reconstruct(core, make_reconstruct(SHAPES[name], dtype, new))


@pytest.mark.parametrize("dtype,basis,table", [
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
], ids=str)  # fmt: skip
def test_dtypes_of_factors_and_tables(dtype, basis, table, core, new):
    tensors = make_reconstruct(ANY("", 2, 2, 96, 64, 40, 7), dtype, new, table)
    tensors["basis"] = tensors["basis"].to(basis)
    check_reconstruct(core, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reconstruct_with_views(dtype, core, new):
    """A basis as kv_factorize leaves it, [P, r, G·d]; pools with others between their slots; tables of each prompt."""
    tensors = make_reconstruct(ANY("", 2, 3, 64, 32, 11, 5, values="int8"), dtype, new)
    tensors["basis"] = tensors["basis"].transpose(1, 2).contiguous().transpose(1, 2)
    shape = tensors["keys"].shape
    pool = new(shape[0], shape[1], 2, shape[2], *shape[3:], dtype=dtype)
    tensors["keys"], tensors["value_pool"] = pool[:, :, 0], pool[:, :, 1]
    for name in ("cos", "sin"):
        tensors[name] = torch.stack([tensors[name][0], tensors[name][0] * 0.5])
    scale = torch.full((2, 64, 3), NAN)
    scale[:, :, 1] = tensors["scale"]
    tensors["scale"] = scale[:, :, 1]
    u = torch.full((2, 64, 20), 99, dtype=torch.int8)
    u[:, :, 3:14] = tensors["u"]
    tensors["u"] = u[:, :, 3:14]
    check_reconstruct(core, tensors)


@pytest.mark.parametrize("keys,values", [(1, 0), (5, 5), (3, 20), (40, 7), (1, 100)])
def test_blocks_of_keys_and_values_are_mixed(keys, values, core):
    out = torch.empty(keys + values, 2, dtype=torch.int64)
    core.mixed_blocks(keys, values, out)
    for kind, count in ((1, keys), (0, values)):
        assert out[out[:, 0] == kind, 1].tolist() == list(range(count))
    share = out[:, 0].cumsum(0) - torch.arange(1, keys + values + 1) * keys / (keys + values)
    assert share.abs().max() <= 1  # at any time, as many of each have begun as there are of them


def test_values_on_the_gpu_are_the_same(core, new):
    case = ANY("", 1, 2, 64, 64, 16, 5, values="int8")
    pools = []
    for on_cpu in (True, False):
        tensors = make_reconstruct(case, torch.bfloat16, new)
        run_reconstruct(core, tensors, on_cpu)
        pools.append(tensors["value_pool"].nan_to_num())
    assert torch.equal(*pools)


@pytest.mark.parametrize("name", ["values", "value_scale"])
def test_pageable_values_are_refused(name, core, new):
    tensors = make_reconstruct(ANY("", 1, 1, 16, 64, 16, 1, values="int8"), torch.bfloat16, new)
    tensors[name] = on_host.OnCpu(tensors[name])
    core.set_pageable(True)
    try:
        with pytest.raises(RuntimeError, match=rf"\[kv_reconstruct\] {name}: expected memory that the GPU can read"):
            run_reconstruct(core, tensors, on_cpu=False)
    finally:
        core.set_pageable(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wild_indices_stay_inside(dtype, core, new):
    """Chunks, slots and sources out of range are nobody's."""
    wild = [-1, -(2**31), 2**31 - 1, 8, 12, 7, 100, 0]  # 8 chunks are there
    case = ANY("", 3, 2, 64, 64, 16, len(wild), values="float", prompts=1)
    tensors = make_reconstruct(case, dtype, new)
    tensors["chunks"] = torch.tensor(wild, dtype=torch.int32).expand(3, 2, -1).contiguous()
    slots = torch.arange(len(wild), dtype=torch.int32)
    slots[-1] = len(wild) + 2  # as many as there are, and one
    tensors["slots"] = slots.expand(3, 2, -1).contiguous()
    tensors["source"] = torch.tensor([1, -5, 0], dtype=torch.int32)
    run_reconstruct(core, tensors)
    written = ~tensors["keys"].isnan()
    assert written[2, :, 5].all() and written.sum() == written[2, :, 5].numel()
    assert torch.equal(written, ~tensors["value_pool"].isnan())
    tensors = make_reconstruct(case, dtype, new)
    tensors["cos"], tensors["sin"] = (tensors[name][:, :30] for name in ("cos", "sin"))  # shorter than u
    tensors["chunks"] = torch.arange(8, dtype=torch.int32).expand(3, 2, -1).contiguous()
    tensors["slots"] = None
    run_reconstruct(core, tensors)
    assert tensors["keys"][:, :, :3].isfinite().all() and tensors["keys"][:, :, 3:].isnan().all()


def test_reconstruct_bits_do_not_depend_on_the_others(core, new):
    """What is not fresh, and which rows there are, changes no bit: a cached step has those of a cold one."""
    case = ANY("", 2, 2, 200, 64, 40, 20)
    cold = make_reconstruct(case, torch.bfloat16, new)
    run_reconstruct(core, cold)
    for fresh in itertools.islice(itertools.cycle([0, 1, 1]), 3):
        warm = make_reconstruct(case, torch.bfloat16, new)
        warm["fresh"] = (torch.rand(2, 2, 20) < 0.3 + 0.5 * fresh).to(torch.uint8)
        run_reconstruct(core, warm)
        done = ~warm["keys"].isnan()
        assert done.any() and torch.equal(warm["keys"][done], cold["keys"][done])
