# SPDX-License-Identifier: Apache-2.0
"""kv_select's CUDA kernels on the CPU: exact sets, books of slots, ties. Outputs and workspace are poisoned and lie
between guards."""

import ctypes
import shutil

import on_host
import pytest
import torch

from compare import FLOATS
from fastpost.reference import kv_select as reference

pytestmark = pytest.mark.skipif(shutil.which(on_host.COMPILER) is None, reason=f"needs {on_host.COMPILER}")
NAN, INF = torch.nan, torch.inf
Case = reference.Case

# A block scores 512 chunks, four heads of a group at a time, and sorts with 1024 threads.
MORE = [
    Case("tiles", 1, 4, 2, 1300, 64, 40, kept=30),
    Case("large-group", 1, 7, 1, 600, 128, 16, counts=(513,)),
    Case("wide-head", 2, 2, 1, 90, 256, 8, bits=None),
    Case("wide-head-int8", 1, 2, 2, 90, 200, 8),
    Case("every-chunk", 1, 2, 1, 70, 32, 70, kept=4),
    Case("many-wanted", 1, 2, 1, 3000, 16, 1500),
]


def guarded(shape, dtype, fill):
    """(tensor, its memory with 64 more elements on either side)."""
    n = int(torch.tensor(shape).prod())
    memory = torch.full((n + 128,), fill, dtype=dtype)
    return memory[64 : 64 + n].view(shape), memory


def run(core, query, landmark, count, resident, *, scale=None, source=None, kept=None, scaling=None):
    """(chunks, slots, fresh); resident is changed."""
    size = torch.zeros(1, dtype=torch.int64)
    core.kv_select_bytes(query, landmark, size)
    workspace, around = guarded((int(size),), torch.uint8, 255)  # NaN as float32
    outputs, memories = zip(*(guarded(resident.shape, dtype, 99) for dtype in (torch.int32, torch.int32, torch.uint8)))
    own, own_memory = guarded(resident.shape, torch.int32, 99)
    own.copy_(resident)
    scaling = query.shape[2] ** -0.5 if scaling is None else scaling
    core.kv_select(query, landmark, scale, source, count, kept, ctypes.c_double(scaling), workspace, own, *outputs)
    assert torch.all(torch.cat([around[:64], around[-64:]]) == 255)
    for memory in (*memories, own_memory):
        assert torch.all(torch.cat([memory[:64], memory[-64:]]) == 99)
    resident.copy_(own)
    return outputs


def as_double(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check(core, tensors, options):
    expected_resident = tensors[3].clone()
    expected = reference.kv_select(*as_double([*tensors[:3], expected_resident]), **options)
    ours = run(core, *tensors, **options)
    for name, a, b in zip(("chunks", "slots", "fresh"), ours, expected, strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(tensors[3], expected_resident)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", reference.cases() + MORE, ids=lambda c: c.name)
def test_steps(case, dtype, core):
    """Three steps, each with a query close to the last one's: some chunks stay, some go."""
    tensors, options = case.inputs(dtype)
    other = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(9)) * case.scale
    for share in (0.0, 0.5, 1.0):
        query = ((1 - share) * tensors[0].float() + share * other).to(dtype)
        check(core, [query, *tensors[1:]], options)


def test_lower_chunks_win_ties(core):
    """Landmarks that occur again and again; a threshold within equal ones, and all equal."""
    g = torch.Generator().manual_seed(1)
    distinct = torch.randint(-127, 128, (7, 64), generator=g).to(torch.int8)
    landmark = distinct[torch.randint(0, 7, (1500,), generator=g)].view(1, 1, 1500, 64)
    scale = torch.full((1, 1, 1500), 0.01)
    query, count = torch.randn(1, 3, 64, generator=g), torch.tensor([1500], dtype=torch.int32)
    best = torch.einsum("hd,cd->hc", query[0].double(), landmark[0, 0].double() * 0.01) / 8
    best = best.softmax(1).amax(0).float()  # equal ones are equal again
    for n in (1, 30, 500, 1499):
        resident = torch.full((1, 1, n), -1, dtype=torch.int32)
        chunks, slots, fresh = run(core, query, landmark, count, resident, scale=scale)
        expected = best.sort(descending=True, stable=True).indices[:n].sort().values
        assert chunks.flatten().tolist() == expected.tolist()
        assert torch.equal(resident, chunks) and slots.flatten().tolist() == [*range(n)] and fresh.all()
        chunks, *_ = run(core, torch.zeros(1, 3, 64), landmark, count, resident, scale=scale)
        assert chunks.flatten().tolist() == [*range(n)]


@pytest.mark.parametrize("c,n", [(40_000, 100), (5_000, 4_800), (30_000, 6_000)], ids=str)
def test_what_has_no_room_in_shared_memory(c, n, core):
    """Keys, lists or both in ordinary memory."""
    g = torch.Generator().manual_seed(2)
    landmark, scale = (
        torch.randint(-127, 128, (1, 1, c, 16), generator=g).to(torch.int8),
        torch.rand(1, 1, c, generator=g),
    )
    resident = torch.randperm(c, generator=g)[:n].view(1, 1, n).int()
    resident[0, 0, ::3] = -1
    count = torch.tensor([c - 5], dtype=torch.int32)
    check(core, [torch.randn(1, 2, 16, generator=g), landmark, count, resident], {"scale": scale})


def test_improbable_chunks_keep_their_order(core):
    """Probabilities that float32, and those that float64 cannot hold."""
    landmark = torch.linspace(30, -30, 64).view(1, 1, 64, 1).repeat(1, 1, 1, 8)
    query, count = torch.full((1, 1, 8), 10.0), torch.tensor([64], dtype=torch.int32)
    chunks, *_ = run(core, query, landmark, count, torch.full((1, 1, 50), -1, dtype=torch.int32))
    assert chunks.flatten().tolist() == [*range(50)]


def test_rows_do_not_depend_on_others(core):
    tensors, options = Case("", 3, 6, 2, 600, 64, 20, counts=(600, 30, 555), kept=5).inputs(torch.bfloat16)
    together = run(core, *(t.clone() for t in tensors), **options)
    for b in range(3):
        alone = run(core, *(t[b : b + 1].clone() for t in tensors),
                    **{k: v if v is None else v[b : b + 1] for k, v in options.items()})  # fmt: skip
        assert all(torch.equal(a, t[b : b + 1]) for a, t in zip(alone, together, strict=True))


def test_any_strides(core):
    """Views with something between their rows; rows of landmarks that no vector fits."""
    tensors, options = Case("", 2, 4, 2, 200, 64, 16, kept=9).inputs(torch.float32)
    query, landmark, count, resident = tensors
    expected = run(core, query, landmark, count, resident.clone(), **options)
    apart = torch.cat([query, torch.full_like(query, NAN)], dim=2)[..., :64]
    shifted = torch.nn.functional.pad(landmark.transpose(1, 2), (3, 2)).contiguous()[..., 3:-2].transpose(1, 2)
    scale = options["scale"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not (apart.is_contiguous() or shifted.is_contiguous() or scale.is_contiguous())
    kept = torch.cat([options["kept"]] * 2, dim=2)[..., :9]
    ours = run(core, apart, shifted, count, resident.clone(), scale=scale, kept=kept)
    assert all(map(torch.equal, ours, expected))


def test_wild_values_stay_inside(core):
    """Counts, prompts, kept chunks and resident ones that point anywhere; NaN and infinite queries. What comes out are
    still chunks that may be chosen, none twice, in slots of their own."""
    g = torch.Generator().manual_seed(3)
    extremes = torch.tensor([-(2**31), -7, -1, 10**6, 2**31 - 1], dtype=torch.int32)

    def wild(x):
        picked = extremes[torch.randint(0, len(extremes), x.shape, generator=g)]
        return torch.where(torch.rand(x.shape, generator=g) < 0.5, picked, x)

    for value in (0.3, NAN, INF, -INF):
        tensors, options = Case("", 4, 4, 2, 150, 64, 12, prompts=3, kept=9).inputs(torch.float32)
        query, landmark, count, resident = tensors
        query[:, 1, 5] = value
        resident = wild(torch.randint(0, 150, resident.shape, generator=g).int())
        options |= {"source": wild(options["source"]), "kept": wild(options["kept"])}
        count = wild(count)
        chunks, slots, fresh = run(core, query, landmark, count, resident, **options)
        for b in range(4):
            for h in range(2):
                size = int((chunks[b, h] >= 0).sum())
                chosen, where = chunks[b, h, :size], slots[b, h, :size]
                assert torch.all(chunks[b, h, size:] == -1) and torch.all(slots[b, h, size:] == -1)
                assert torch.all(chosen.diff() > 0) and torch.all(chosen < count[b].clamp(0, 150))
                assert not set(chosen.tolist()) & set(options["kept"][b, h].tolist())
                assert torch.equal(resident[b, h, where.long()], chosen)
                assert int((resident[b, h] >= 0).sum()) == size and len(set(where.tolist())) == size
                within = int(count[b].clamp(0, 150))
                kept = {c for c in options["kept"][b, h].tolist() if 0 <= c < within}
                assert torch.all(fresh[b, h, size:] == 0) and size == min(12, within - len(kept))


def test_more_than_2_31_elements(core):
    """Prompts 2^30 elements apart in memory that is reserved but never touched in between."""
    tensors, options = Case("", 4, 2, 1, 50, 64, 8).inputs(torch.float32)
    query, landmark, count, resident = tensors
    stride = 1 << 30
    far = torch.empty(3 * stride + 50 * 64, dtype=torch.int8).as_strided(landmark.shape, (stride, 64, 64, 1))
    far.copy_(landmark)
    expected = run(core, query, landmark, count, resident.clone(), **options)
    ours = run(core, query, far, count, resident.clone(), **options)
    assert all(map(torch.equal, ours, expected))


def test_refuses_long_rows(core):
    tensors, options = Case("", 1, 1, 1, 4, 257, 1).inputs(torch.float32)
    with pytest.raises(RuntimeError, match="rows of at most 256 on a GPU, got 257"):
        run(core, *tensors, **options)
