# SPDX-License-Identifier: Apache-2.0
"""Where torch and the core meet: what crosses, what is refused, and what runs below."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpost import _core

CHILD = """
import torch, fastpost
from fastpost import _core
x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).{dtype}()
out = fastpost.token_logprob(x, torch.tensor([0, 77, 4999]), softcap=30.0, return_entropy=True)
print(dict(_core.build_info())["cpu_isa"], *[f"{{v:.9g}}" for t in out for v in t.tolist()])
"""


def in_child(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    return done.returncode, done.stdout.split(), done.stderr


@pytest.mark.parametrize("dtype", ["float", "bfloat16", "half"])
def test_every_instruction_set_agrees(dtype):
    results = {}
    for isa in ("baseline", "avx2", "avx512", "avx512bf16"):
        code, out, err = in_child(CHILD.format(dtype=dtype), FASTPOST_ISA=isa)
        if code and "this CPU has only up to" in err:
            continue
        assert code == 0, err
        assert out[0] == isa
        results[isa] = torch.tensor([float(v) for v in out[1:]])
    assert "baseline" in results
    for isa, values in results.items():
        torch.testing.assert_close(values, results["baseline"], rtol=2e-6, atol=2e-6, msg=isa)


def test_unknown_instruction_set_is_named():
    code, _, err = in_child("from fastpost import _core; _core.build_info()", FASTPOST_ISA="sse9")
    assert code and "FASTPOST_ISA=sse9: expected baseline, avx2, avx512 or avx512bf16" in err


def test_the_core_links_no_torch():
    libraries = subprocess.run(["ldd", _core.__file__], capture_output=True, text=True).stdout
    assert "libc.so" in libraries and "torch" not in libraries and "c10" not in libraries


def test_reference_switch_gives_the_same_numbers():
    base, switched = (in_child(CHILD.format(dtype="float"), FASTPOST_REFERENCE=flag) for flag in ("0", "1"))
    assert base[0] == switched[0] == 0
    a, b = (torch.tensor([float(v) for v in r[1][1:]]) for r in (base, switched))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_core_refuses_tensors_without_memory():
    out = torch.empty(2)
    with FakeTensorMode():
        fake = torch.empty(2, 3)
    with pytest.raises(ValueError, match=r"logits: .*without storage \(FakeTensor, DTensor"):
        _core.token_logprob(fake, torch.zeros(2, dtype=torch.int64), 1.0, 0.0, -100, out, out, None)


@pytest.mark.parametrize("thing,shown", [(None, "None"), ([1.0], "list"), (3, "int")])
def test_core_names_what_is_no_tensor(thing, shown):
    out = torch.empty(2)
    with pytest.raises(ValueError, match=rf"\[token_logprob\] logits: expected .*, got {shown}"):
        _core.token_logprob(thing, torch.zeros(2, dtype=torch.int64), 1.0, 0.0, -100, out, out, None)


def test_parameters_and_offset_views_cross_as_they_are():
    base = torch.arange(12.0).reshape(3, 4)
    out, lse, target = torch.empty(2), torch.empty(2), torch.tensor([1, 2])
    for logits in (torch.nn.Parameter(base[1:]), base[1:]):
        _core.token_logprob(logits, target, 1.0, 0.0, -100, out, lse, None)
        torch.testing.assert_close(out, torch.log_softmax(base[1:], -1)[[0, 1], target])


def test_import_is_lazy_and_light():
    code, out, err = in_child(
        "import sys, time; t = time.perf_counter(); import fastpost; t = time.perf_counter() - t;"
        "print(t, 'torch' in sys.modules, 'fastpost._core' in sys.modules)"
    )
    assert code == 0, err
    assert float(out[0]) < 0.05 and out[1:] == ["False", "False"]
