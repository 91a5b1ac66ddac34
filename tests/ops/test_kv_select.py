# SPDX-License-Identifier: Apache-2.0
"""kv_select: the chunks that float64 chooses, slots that survive, and nothing that depends on threads or neighbours."""

import os
import subprocess
import sys

import pytest
import torch

import fastpost
from compare import FLOATS
from fastpost import _core
from fastpost.ops.kv_select import _select_op as select_op
from fastpost.reference import kv_select as reference
from fastpost.reference._int8_rows import widen_rows

CASES = reference.cases()
NAN, INF = float("nan"), float("inf")


def tolerance(query, landmark, scale, scaling=None):
    """Relative, of a probability: 1e-5, or what float32 can tell apart where the logits are large."""
    d = query.shape[-1]
    longest = query.double().norm(dim=-1).max() * widen_rows(landmark, scale, torch.float64).norm(dim=-1).max()
    return 1e-5 + 2e-7 * float(longest) * (d**-0.5 if scaling is None else scaling)


def check_choice(selection, truth, n, tol):
    """`truth` [B, G, C]: float64 scores. The chosen are the largest; the only ones where no others are as near."""
    chunks = selection.chunks.cpu()
    for i in range(truth.shape[0]):
        for j in range(truth.shape[1]):
            score = truth[i, j].cpu()
            most = min(n, int((score >= 0).sum()))
            chosen = chunks[i, j, :most].long()
            assert torch.all(chunks[i, j, most:] == -1)
            assert torch.all(chosen >= 0) and torch.all(chosen.diff() > 0)
            if not most:
                continue
            ordered = score.sort(descending=True).values
            least = ordered[most - 1]
            assert torch.all(score[chosen] >= least * (1 - tol)), (i, j)
            after = ordered[most] if most < len(ordered) else -1.0
            if after < least * (1 - tol):
                assert set(chosen.tolist()) == set((score >= least).nonzero().flatten().tolist())


def check_slots(selection, before, after):
    """What the three outputs and `resident` say of each other."""
    for i, j in torch.cartesian_prod(torch.arange(before.shape[0]), torch.arange(before.shape[1])).tolist():
        chunks, slots, fresh = (t[i, j].tolist() for t in selection)
        old, new = before[i, j].tolist(), after[i, j].tolist()
        k = sum(c >= 0 for c in chunks)
        assert slots[k:] == [-1] * (len(slots) - k) and not any(fresh[k:]) and set(fresh) <= {0, 1}
        assert len(set(slots[:k])) == k
        expected = [-1] * len(new)
        free = sorted(set(range(len(new))) - {s for s, c in enumerate(old) if c in chunks[:k]})
        for c, s, is_fresh in zip(chunks[:k], slots, fresh):
            assert is_fresh == (c not in old)
            assert s == (free.pop(0) if is_fresh else old.index(c))
            expected[s] = c
        assert new == expected


def select(inputs, options, core=fastpost.kv_select):
    query, landmark, count, resident = inputs
    before = resident.clone()
    selection = core(query, landmark, count, resident, **options)
    check_slots(selection, before, resident)
    return selection


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_chooses_what_float64_does(case, dtype, device):
    inputs, options = case.inputs(dtype, device)
    query, landmark, count, _ = inputs
    truth = reference.scores(query.double(), landmark if landmark.dtype == torch.int8 else landmark.double(), count,
                             **options)  # fmt: skip
    selection = select(inputs, options)
    assert [t.dtype for t in selection] == [torch.int32, torch.int32, torch.uint8]
    check_choice(selection, truth, case.n, tolerance(query, landmark, options["scale"]))


@pytest.mark.parametrize("d", [1, 3, 16, 63, 64, 65, 128, 129, 200, 1100])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 7, 8, 16])
def test_any_group_and_dimension(heads, d, device):
    inputs, options = reference.Case("", 2, heads * 2, 2, 77, d, 11, counts=(77, 50), kept=4).inputs(device=device)
    truth = reference.scores(inputs[0].double(), inputs[1], inputs[2], **options)
    check_choice(select(inputs, options), truth, 11, tolerance(inputs[0], inputs[1], options["scale"]))


@pytest.mark.parametrize("c", [1, 15, 16, 17, 255, 256, 257, 1000])
@pytest.mark.parametrize("n", [1, 16, 40])
def test_any_number_of_chunks(c, n, device):
    inputs, options = reference.Case("", 1, 4, 2, c, 64, n).inputs(device=device)
    for count in sorted({0, 1, c // 2, c - 1, c}):
        inputs[2].fill_(count)
        truth = reference.scores(inputs[0].double(), *inputs[1:3], **options)
        check_choice(select(inputs, options), truth, n, tolerance(inputs[0], inputs[1], options["scale"]))


@pytest.mark.parametrize("bits", [8, None])
def test_scaling(bits, device):
    """The largest of the group's probabilities decides, so the scaling changes what is chosen."""
    inputs, options = reference.Case("", 1, 8, 1, 300, 64, 30, bits=bits).inputs(device=device)
    found = []
    for scaling in (0.02, 1.0, None):
        truth = reference.scores(inputs[0].double(), inputs[1] if bits else inputs[1].double(), inputs[2],
                                 scaling=scaling, **options)  # fmt: skip
        selection = select(inputs, options | {"scaling": scaling})
        check_choice(selection, truth, 30, tolerance(inputs[0], inputs[1], options["scale"], scaling))
        found.append(selection.chunks)
    assert not torch.equal(found[0], found[1])


def test_largest_probability_of_the_group(device):
    """A head whose logits are all large says less than one that is sure: probabilities, not logits, are compared."""
    landmark = torch.eye(4, device=device).view(1, 1, 4, 4) * 10
    query = torch.tensor([[[9.0, 9.0, 9.0, 0.0], [0.0, 0.0, 0.0, 3.0]]], device=device)
    count, resident = (torch.full(s, v, dtype=torch.int32, device=device) for s, v in (((1,), 4), ((1, 1, 1), -1)))
    assert fastpost.kv_select(query, landmark, count, resident, scaling=1.0).chunks.item() == 3


def test_int8_landmarks_meet_queries_of_24_bits(device):
    """Two chunks that differ by one step of a landmark where the query is 2^-20 of its largest number."""
    landmark = torch.zeros(1, 1, 9, 64, dtype=torch.int8, device=device)
    landmark[..., 0] = 100
    landmark[0, 0, :, 5] = torch.tensor([3, 5, 1, 4, 9, 6, 2, 8, 7], device=device)
    query = torch.zeros(1, 1, 64, device=device)
    query[..., 0], query[..., 5] = 1.0, 2.0**-20
    scale = torch.ones(1, 1, 9, device=device)
    count = torch.full((1,), 9, dtype=torch.int32, device=device)
    for n in (1, 4):
        resident = torch.full((1, 1, n), -1, dtype=torch.int32, device=device)
        # the landmark's first number would hide it in float32: 100 + 9·2^-20
        chosen = fastpost.kv_select(query - torch.nn.functional.one_hot(torch.tensor(0), 64).to(device), landmark,
                                    count, resident, scale=scale, scaling=2.0**20).chunks  # fmt: skip
        assert chosen.flatten().tolist() == [[4], [4, 5, 7, 8]][n == 4]


@pytest.mark.parametrize("n", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("bits", [8, None])
def test_ties_go_to_the_lower_chunk(n, bits, device):
    """Scores of three kinds, many of each."""
    kind = torch.randint(0, 3, (90,), generator=torch.Generator().manual_seed(n))
    row = torch.randn(32)
    landmark = ((1 + kind[:, None]) * row)[None, None].to(device)
    scale = None
    if bits:
        landmark, scale = torch.ones(1, 1, 90, 32, dtype=torch.int8, device=device), (1.0 + kind)[None, None].to(device)
    query = (torch.ones(1, 2, 32) if bits else row.expand(1, 2, 32).clone()).to(device)
    count = torch.full((1,), 90, dtype=torch.int32, device=device)
    resident = torch.full((1, 1, n), -1, dtype=torch.int32, device=device)
    chosen = fastpost.kv_select(query, landmark, count, resident, scale=scale).chunks
    expected = kind.sort(descending=True, stable=True).indices[:n].sort().values
    assert torch.equal(chosen.flatten().cpu().long(), expected)
    zeros = fastpost.kv_select(query * 0, landmark, count, resident, scale=scale).chunks
    assert zeros.flatten().tolist() == list(range(n))


# ---- slots -----------------------------------------------------------------------------------------------------------


def test_slots_survive_many_steps(device):
    """A query that drifts, a cache that grows, kept chunks that change: `select` checks every step's books."""
    case = reference.Case("", 3, 6, 2, 120, 32, 20, prompts=2, kept=6)
    (query, landmark, count, resident), options = case.inputs(device=device)
    stayed = changed = 0
    for step in range(12):
        query = 0.8 * query + 0.6 * torch.randn(query.shape).to(device)
        count.copy_(torch.tensor([10 + 10 * step, 120, 5 * step]).int())
        options["kept"][0] = step
        selection = select([query, landmark, count, resident], options)
        stayed += int(((selection.fresh == 0) & (selection.chunks >= 0)).sum())
        changed += int(selection.fresh.sum())
    assert stayed > 200 and changed > 100


def test_what_is_resident_is_not_believed(device):
    """Numbers that are no chunks, and a chunk that is there twice."""
    inputs, options = reference.Case("", 1, 2, 1, 10, 32, 10).inputs(device=device)
    inputs[3].copy_(torch.tensor([99, 3, 3, -7, 2**31 - 1, -(2**31), 10, 5, 0, -1]))
    selection = fastpost.kv_select(*inputs, **options)
    assert selection.chunks.flatten().tolist() == list(range(10))
    assert sorted(selection.slots.flatten().tolist()) == list(range(10))
    assert [int(selection.slots[0, 0, c]) for c in (3, 5, 0)] == [2, 7, 8]
    assert torch.equal(inputs[3].flatten()[selection.slots.flatten().long()], selection.chunks.flatten())
    assert int(selection.fresh.sum()) == 7


def test_kept_chunks_neither_count_nor_come(device):
    """One that would have all the probability, and numbers that are no chunks."""
    landmark = torch.randn(1, 1, 40, 32, device=device)
    query = torch.randn(1, 2, 32, device=device)
    landmark[0, 0, 7] = 40 * query[0, 0]
    count, resident = (torch.full(s, v, dtype=torch.int32, device=device) for s, v in (((1,), 40), ((1, 1, 6), -1)))
    kept = torch.tensor([[[7, -1, 40, 1000, -5, 7]]], dtype=torch.int32, device=device)
    selection = fastpost.kv_select(query, landmark, count, resident, kept=kept)
    truth = reference.scores(query.double(), landmark.double(), count, kept=kept)
    assert truth.max() < 0.9
    check_choice(selection, truth, 6, tolerance(query, landmark[:, :, :7], None))


# ---- what it does not depend on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("b,g", [(1, 1), (1, 3), (5, 2)])
def test_same_choice_on_any_number_of_threads(b, g, bits):
    inputs, options = reference.Case("", b, 4 * g, g, 1111, 64, 50, kept=3, bits=bits).inputs()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            resident = inputs[3].clone()
            results.append((*fastpost.kv_select(*inputs[:3], resident, **options), resident))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_rows_do_not_know_of_each_other(device):
    (query, landmark, count, resident), options = CASES[5].inputs(device=device)  # rows share prompts
    assert options["source"] is not None
    together = fastpost.kv_select(query, landmark, count, resident.clone(), **options)
    for i in range(len(query)):
        one = {name: None if t is None else t[i : i + 1] for name, t in options.items() if name != "scale"}
        alone = fastpost.kv_select(query[i : i + 1], landmark, count[i : i + 1], resident[i : i + 1].clone(),
                                   scale=options["scale"], **one)  # fmt: skip
        for a, b in zip(alone, together):
            assert torch.equal(a[0], b[i])


def test_what_lies_beyond_count_is_not_read(device):
    """A cache with room: landmarks and scales that nobody wrote, heads and rows apart in memory."""
    (query, landmark, count, resident), options = reference.Case("", 2, 6, 3, 70, 64, 9).inputs(device=device)
    expected = fastpost.kv_select(query, landmark, count, resident.clone(), **options)
    room = torch.full((2, 3, 200, 80), 77, dtype=torch.int8, device=device)
    scales = torch.full((2, 3, 200), NAN, device=device)
    room[:, :, :70, :64], scales[:, :, :70] = landmark, options["scale"]
    queries = torch.full((6, 2, 70), NAN, device=device).transpose(0, 1)
    queries[..., :64] = query
    got = fastpost.kv_select(queries[..., :64], room[..., :64], count, resident, scale=scales)
    assert all(map(torch.equal, got, expected))


def test_outputs_are_all_written(device):
    (query, landmark, count, resident), options = reference.Case("", 2, 4, 2, 30, 32, 40).inputs(device=device)
    expected = fastpost.kv_select(query, landmark, count, resident.clone(), **options)
    outputs = [torch.full_like(t, 77) for t in expected]
    workspace = torch.full((_core.kv_select_bytes(query, landmark, 1),), 0xFF, dtype=torch.uint8, device=device)
    _core.kv_select(query, landmark, options["scale"], None, count, None, 32**-0.5, workspace, resident, *outputs)
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_queries_that_are_no_numbers(value, bits, device):
    """A head of NaN has no say; where all are, the first chunks come, as they do with equal scores."""
    inputs, options = reference.Case("", 1, 3, 1, 50, 32, 6, bits=bits).inputs(device=device)
    inputs[0][0, 1, 4] = value
    if value == value and not bits:
        inputs[0][0, 1] = NAN
    truth = reference.scores(inputs[0][:, ::2].double(), *inputs[1:3], **options)
    check_choice(select(inputs, options), truth, 6, tolerance(inputs[0][:, ::2], inputs[1], options["scale"]))
    inputs[0].fill_(NAN)
    assert select(inputs, options).chunks.flatten().tolist() == list(range(6))


def test_nothing_to_do(device):
    for b, n in ((0, 4), (2, 0)):
        inputs, options = reference.Case("", b, 4, 2, 30, 32, n).inputs(device=device)
        assert all(t.shape == (b, 2, n) for t in fastpost.kv_select(*inputs, **options))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    """The same tests in a process of its own, where the CPU has this set."""
    env = os.environ | {"FASTPOST_ISA": isa, "OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, "-c", "from fastpost import _core; _core.build_info()"], env=env).returncode:
        pytest.skip(f"this CPU has no {isa}")
    names = ("float64_does", "any_group", "any_number_of_chunks", "ties", "24_bits", "no_numbers", "beyond_count")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", " or ".join(names)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("smollm2", "shared-prompt", "float-landmarks")],
                         ids=lambda c: c.name)  # fmt: skip
def test_opcheck(case, device):
    inputs, options = case.inputs(device=device)
    torch.library.opcheck(select_op, (*inputs, options["scale"], options["source"], options["kept"], 0.1))


def test_a_mode_that_watches_sees_the_op(device):
    """Skipping the dispatcher is for when nobody looks."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs, options = CASES[1].inputs(device=device)
    expected = fastpost.kv_select(*inputs[:3], inputs[3].clone(), **options)
    with Watch():
        got = fastpost.kv_select(*inputs, **options)
    assert "fastpost.kv_select.default" in seen and all(map(torch.equal, got, expected))


# ---- bad input -------------------------------------------------------------------------------------------------------

I32 = {"dtype": torch.int32}
GOOD = {
    "query": torch.zeros(2, 4, 16), "landmark": torch.zeros(2, 2, 5, 16, dtype=torch.int8),
    "count": torch.full((2,), 5, **I32), "resident": torch.full((2, 2, 3), -1, **I32), "scale": torch.ones(2, 2, 5),
}  # fmt: skip
BAD = {
    "query ndim": ({"query": torch.zeros(4, 16)}, r"query: expected float32 or bfloat16 .* \[any, any, any\], got"),
    "query dtype": ({"query": torch.zeros(2, 4, 16).double()}, r"query: expected .*, got float64 \[2, 4, 16\]"),
    "query layout": ({"query": torch.zeros(2, 16, 4).mT}, r"query: expected a last dimension of stride 1"),
    "heads": ({"query": torch.zeros(2, 3, 16)},
              r"query: expected a multiple of the 2 key heads of landmark, got 3 head"),
    "no heads": ({"query": torch.zeros(2, 0, 16)}, r"query: expected a multiple of the 2 key heads"),
    "landmark dtype": ({"landmark": torch.zeros(2, 2, 5, 16).double()},
                       r"landmark: expected int8 or float32 or bfloat1"),
    "landmark dim": ({"landmark": torch.zeros(2, 2, 5, 8)}, r"landmark: expected .* \[2, any, any, 16\], got"),
    "prompts": ({"landmark": torch.zeros(3, 2, 5, 16)}, r"landmark: expected .* \[2, any, any, 16\], got float32 \[3"),
    "landmark layout": ({"landmark": torch.zeros(2, 2, 16, 5).mT}, r"landmark: expected a last dimension of stride 1"),
    "no scale": ({"scale": None}, r"scale: expected float32 \[2, 2, 5\], got None"),
    "scale": ({"scale": torch.ones(2, 2, 4)}, r"scale: expected float32 \[2, 2, 5\], got float32 \[2, 2, 4\]"),
    "needless scale": ({"landmark": torch.zeros(2, 2, 5, 16)}, r"scale: expected None, as landmark is not int8, got"),
    "count": ({"count": torch.ones(2).long()}, r"count: expected int32 \[2\], got int64 \[2\]"),
    "count high": ({"count": torch.tensor([5, 6], **I32)},
                   r"count: expected numbers of chunks in \[0, 6\), got 6 at row 1"),
    "count low": ({"count": torch.tensor([-1, 5], **I32)}, r"count: expected numbers of chunks .*, got -1 at row 0"),
    "source": ({"source": torch.tensor([0, 2], **I32)},
               r"source: expected numbers of prompts in \[0, 2\), got 2 at row 1"),
    "source dtype": ({"source": torch.tensor([0, 1])}, r"source: expected int32 \[2\], got int64"),
    "kept": ({"kept": torch.zeros(2, 3, 1, **I32)}, r"kept: expected int32 \[2, 2, any\], got int32 \[2, 3, 1\]"),
    "resident": ({"resident": torch.zeros(2, 2, 3)}, r"resident: expected int32 \[2, 2, any\], got float32"),
    "resident layout": ({"resident": torch.zeros(2, 3, 2, **I32).mT}, r"resident: expected a contiguous tensor"),
    "list": ({"query": [[[0.0]]]}, r"query: expected a plain torch.Tensor, got list"),
    "device": ({"count": torch.zeros(2, device="meta", **I32)}, r"count: expected a tensor on cpu, got one on meta"),
    "grad": ({"query": torch.zeros(2, 4, 16, requires_grad=True)}, r"query: expected a tensor without gradient"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    fastpost.kv_select(**GOOD)
    with pytest.raises(ValueError, match=r"\[kv_select\] " + message):
        fastpost.kv_select(**(GOOD | change))


def test_workspace_that_is_too_small():
    (query, landmark, count, resident), options = CASES[1].inputs()
    outputs = [torch.zeros_like(t) for t in (resident, resident, resident.byte())]
    with pytest.raises(ValueError, match=r"\[kv_select\] workspace: expected at least \d+ bytes, got uint8 \[8\]"):
        _core.kv_select(query, landmark, options["scale"], None, count, None, 1.0, torch.zeros(8).byte(), resident,
                        *outputs)  # fmt: skip
