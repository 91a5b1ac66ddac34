# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import pytest
import torch

from compare import FLOATS, error
from fastpost import _core
from fastpost.ops.kv_landmarks import kv_landmarks
from fastpost.reference import kv_landmarks as reference
from fastpost.reference._int8_rows import quantize_rows, widen_rows

CASES = reference.cases()
NAN = torch.nan
ROUNDING = {torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, bits, device):
    keys, length = case.inputs(dtype, device)
    ours = kv_landmarks(keys, chunk=case.chunk, length=length, bits=bits)
    plain = reference.kv_landmarks(keys, chunk=case.chunk, length=length, bits=bits)
    truth = reference.kv_landmarks(keys.double(), chunk=case.chunk, length=length, bits=None)
    rows = [widen_rows(x.landmark, x.scale, torch.float64).flatten(0, 2) for x in (ours, plain)]
    wanted = truth.landmark.flatten(0, 2)
    assert ours.landmark.dtype == (dtype if bits is None else torch.int8) and (ours.scale is None) == (bits is None)
    assert error(rows[0], wanted) < max(ROUNDING[dtype], 1.05 * error(rows[1], wanted))
    assert ours.similarity.dtype == torch.float32 and ours.similarity.shape == truth.similarity.shape
    torch.testing.assert_close(ours.similarity, truth.similarity.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_is_the_rounded_mean(dtype, device):
    keys, length = reference.Case("", 2, 3, 61, 80, lengths=(61, 40)).inputs(dtype, device)
    mean = kv_landmarks(keys.float(), length=length, bits=None).landmark
    ours = kv_landmarks(keys, length=length)
    wanted, scale = quantize_rows(mean)
    assert torch.equal(ours.landmark, wanted) and torch.equal(ours.scale, scale)
    assert ours.landmark[0].abs().amax(-1).eq(127).all() and ours.landmark.min() < 0
    assert 1e-3 < error(widen_rows(wanted, scale, torch.float64).flatten(0, 2), mean.flatten(0, 2)) < 1e-2


def test_similarity_finds_the_odd_one(device):
    """1 for equal keys, -1 with an opposite one, 0 with a zero, √½ for two at right angles."""
    keys = torch.randn(1, 1, 32, 20, device=device)[:, :, :1].repeat(1, 1, 32, 1)
    keys[0, 0, 11] *= -1
    keys[0, 0, 16] = 0
    keys[0, 0, 24:] = torch.eye(2, 20, device=device).repeat(4, 1)
    similarity = kv_landmarks(keys).similarity[0, 0].cpu()
    torch.testing.assert_close(similarity, torch.tensor([1, -1, 0, 0.5**0.5]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
def test_layouts_and_poisoned_outputs(bits, device):
    """The same from [B, G, S, d], from a view of [B, S, G, d] and from a part of wider keys; everything is written."""
    wide = torch.randn(2, 50, 3, 90, device=device).bfloat16()
    length = torch.tensor([50, 17], dtype=torch.int32, device=device)
    views = [wide[..., 5:38].transpose(1, 2), wide[..., 5:38].transpose(1, 2).contiguous()]
    results = []
    for keys in views:
        landmark = torch.full((2, 3, 6, 33), NAN, device=device, dtype=torch.bfloat16)
        landmark = landmark if bits is None else torch.full((2, 3, 6, 33), 99, device=device, dtype=torch.int8)
        scale, similarity = (torch.full((2, 3, 6), NAN, device=device) for _ in range(2))
        _core.kv_landmarks(keys, length, 8, landmark, scale if bits else None, similarity)
        assert landmark.isfinite().all() and similarity.isfinite().all()
        results.append([landmark, similarity] + [scale] * bool(bits))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    landmark, similarity = results[0][:2]
    assert (
        landmark[1, :, 2:].eq(0).all() and similarity[1, :, 2:].eq(1).all() and landmark[1, :, :2].ne(0).any(-1).all()
    )


def test_tokens_beyond_the_length_do_not_matter(device):
    keys, _ = reference.Case("", 2, 2, 48, 32).inputs(device=device)
    length = torch.tensor([48, 23], dtype=torch.int32, device=device)
    keys[1, :, 23:] = NAN
    ours, alone = kv_landmarks(keys, length=length), kv_landmarks(keys[1:, :, :16])
    for a, b in zip(ours, alone):
        assert a.isfinite().all() and torch.equal(a[1:, :, :2], b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_chunk_does_not_depend_on_others_or_on_threads(dtype):
    keys, _ = reference.Case("", 3, 4, 4096, 64).inputs(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kv_landmarks(keys))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    part = kv_landmarks(keys[1:2, 2:, 800:880])
    assert all(torch.equal(a[1:2, 2:, 100:110], b) for a, b in zip(results[0], part))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    env = os.environ | {"FASTPOST_ISA": isa, "OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, "-c", "from fastpost import _core; _core.build_info()"], env=env,
                      capture_output=True).returncode:  # fmt: skip
        pytest.skip(f"this CPU has no {isa}")
    names = ("test_matches_reference", "test_int8_is_the_rounded_mean", "test_layouts_and_poisoned_outputs")
    tests = [f"{__file__}::{name}" for name in names]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_opcheck(device):
    keys, length = reference.Case("", 2, 3, 25, 12, lengths=(25, 9)).inputs(device=device)
    for int8 in (True, False):
        torch.library.opcheck(torch.ops.fastpost.kv_landmarks.default, (keys, length, 8, int8))


KEYS = torch.randn(2, 3, 16, 8)
BAD = {
    "dtype": ({"keys": KEYS.double()}, r"keys: expected float32 or bfloat16 or float16 \[any, .*\], got float64"),
    "shape": ({"keys": KEYS[0]}, r"keys, chunk: expected \[B, G, S, d\] and at least 1, got \[3, 16, 8\] and 8"),
    "chunk": ({"chunk": 0}, r"keys, chunk: expected .* and at least 1, got \[2, 3, 16, 8\] and 0"),
    "layout": ({"keys": KEYS.mT}, r"keys: expected a last dimension of stride 1"),
    "list": ({"keys": [1.0]}, r"keys: expected a plain torch.Tensor, got list"),
    "grad": ({"keys": KEYS.clone().requires_grad_()}, r"keys: expected a tensor without gradient"),
    "bits": ({"bits": 4}, r"bits: expected 8 or None, got 4"),
    "length dtype": ({"length": torch.tensor([1, 2])}, r"length: expected int32 \[2\], got int64 \[2\]"),
    "length": ({"length": torch.tensor([-1, 7], dtype=torch.int32)}, r"length: expected numbers in \[0, 16\].* got -1"),
    "device": ({"length": torch.ones(2, dtype=torch.int32, device="meta")}, r"length: expected a tensor on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=r"\[kv_landmarks\] " + message):
        kv_landmarks(**({"keys": KEYS} | change))


def test_wrong_outputs_are_refused():
    similarity = torch.empty(2, 3, 2)
    with pytest.raises(ValueError, match=r"landmark: expected int8 \[2, 3, 2, 8\], got float32"):
        _core.kv_landmarks(KEYS, None, 8, torch.empty(2, 3, 2, 8), similarity, similarity)
    with pytest.raises(ValueError, match=r"similarity: expected float32 \[2, 3, 2\], got float32 \[2, 3, 1\]"):
        _core.kv_landmarks(KEYS, None, 8, torch.empty(2, 3, 2, 8), None, similarity[..., :1])
    with pytest.raises(ValueError, match=r"chunk: expected at least 1, got 0"):
        _core.kv_landmarks(KEYS, None, 0, torch.empty(2, 3, 2, 8), None, similarity)
