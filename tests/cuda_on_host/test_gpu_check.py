# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_check where there is no GPU: what it says, and the parts that need none."""

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import on_host
import pytest
import torch

SCRIPT = on_host.ROOT / "tools" / "gpu_check"


@pytest.fixture(scope="module")
def check():
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(SCRIPT))
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


@pytest.fixture
def run(check, tmp_path):
    return check.Run(SimpleNamespace(minutes=1.0, out=tmp_path, rehearse=False, device="cuda", skip=[]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing():
    before = sorted((on_host.ROOT / "bench" / "results").glob("*"))
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "nothing was run" in done.stderr and "sees no GPU here. Run this on a machine with one." in done.stderr
    assert sorted((on_host.ROOT / "bench" / "results").glob("*")) == before


def test_missing_tools_are_named(check, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    monkeypatch.setattr(check, "PACKAGES", ("pytest", "no-such-package"))
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    problems = "\n".join(check.missing(SimpleNamespace(rehearse=True, wheels=None, wheel=None)))
    assert "no nvcc: install the CUDA toolkit" in problems and "no g++ on PATH" in problems
    assert "pip install no-such-package" in problems and "pytest" not in problems


def test_counts_of_tests(check):
    """From a run in one process and from one in several; names of cases may hold anything."""
    plain = """
tests/ops/test_token_logprob.py::test_a[x::y] PASSED                     [  1%]
tests/ops/test_token_logprob.py::test_b FAILED [ 50%]
tests/ops/test_token_logprob.py::test_c SKIPPED (needs AVX) [ 75%]
tests/test_boundary.py::test_d ERROR                                     [100%]
FAILED tests/ops/test_token_logprob.py::test_b - AssertionError
"""
    several = """
tests/test_boundary.py::test_d
[gw0] [  1%] PASSED tests/ops/test_token_logprob.py::test_a[x::y]
[gw11] [ 50%] FAILED tests/ops/test_token_logprob.py::test_b
[gw1] [ 75%] SKIPPED tests/ops/test_token_logprob.py::test_c
[gw0] [100%] ERROR tests/test_boundary.py::test_d
"""
    for log in (plain, several):
        assert check.count_tests(log) == {
            "token_logprob": {"passed": 1, "failed": 1, "skipped": 1},
            "boundary": {"passed": 0, "failed": 1, "skipped": 0},
        }


def test_reports_of_ops_become_one(check):
    result = {"tests": {}}
    check.merge(result, {"machine": "gpu", "gpu": "GPU", "cases": [1], "date": "first"})
    check.merge(result, {"machine": "gpu", "gpu": "GPU", "cases": [2, 3], "date": "later"})
    assert result["cases"] == [1, 2, 3] and result["date"] == "first"


def test_a_step_that_hangs_is_stopped_with_its_children(run, check, tmp_path):
    mark = tmp_path / "mark"
    hang = f"(sleep 4; touch {mark}) & sleep 60"
    begin = time.monotonic()
    assert not run.step("hang", lambda: run.command("hang", ["sh", "-c", hang], 1))
    assert "was stopped after 1 s" in run.steps["hang"]["note"]
    time.sleep(max(0.0, begin + 5 - time.monotonic()))
    assert not mark.exists()
    assert run.step("next", lambda: f"status {run.command('next', ['sh', '-c', 'echo hello; exit 3'], 20)}")
    assert run.steps["next"]["note"] == "status 3"
    assert "hello" in (tmp_path / "gpu_check-next.log").read_text()


def test_clocks(check, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\ncase "$*" in *driver_version*) echo "580.1, 1980, 2619, 700.00, Disabled";;'
        ' *) echo "1755, 2619, 41, [N/A]";; esac\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with check.Clocks(off=False) as clocks:
        time.sleep(1.2)
    summary = clocks.summary()
    assert summary["clocks.sm"] == {"least": 1755, "median": 1755, "most": 1755} and "power.draw" not in summary
    assert summary["driver_version"] == "580.1" and summary["clocks.max.sm"] == "1980"


def test_result_file(check, tmp_path):
    result = {"cases": [1], "machine": "nvidia-x", "commit": None}
    path = check.write(result, SimpleNamespace(out=tmp_path / "new", rehearse=False))
    assert path.name == "nvidia-x.json" and json.loads(path.read_text()) == result
    assert path.read_text().index("cases") > path.read_text().index("machine")


def test_hopper_times_are_recorded(check, run, monkeypatch, tmp_path):
    """With stand-ins for the GPU: the script runs to its end and what it wrote is in the result."""
    fakes = tmp_path / "fakes.py"
    fakes.write_text(
        "import sys, types, torch\n"
        "make = torch.empty, torch.zeros, torch.full, torch.randn, torch.randint\n"
        "for f in make:\n"
        "    setattr(torch, f.__name__, lambda *a, device=None, f=f, **k: f(*a, **k))\n"
        "class Event:\n"
        "    def __init__(self, **_): pass\n"
        "    def record(self): pass\n"
        "    synchronize = record\n"
        "    def elapsed_time(self, end): return 2.0\n"
        "torch.cuda.Event = Event\n"
        "names = 'forward', 'exponentials_backward', 'rows'\n"
        "core = types.SimpleNamespace(**{f'linear_logprob_{name}': lambda *a: None for name in names})\n"
        "core.linear_logprob_forward_columns = lambda hidden, weight: 256\n"
        "sys.modules['fastpost'] = types.SimpleNamespace(_core=core)\n"
    )
    monkeypatch.setattr(check, "WORK", tmp_path)
    monkeypatch.setattr(check, "HOPPER", f"exec(open({str(fakes)!r}).read())\n{check.HOPPER}")
    run.args.quick = True
    result = {}
    assert run.step("hopper", lambda: check.hopper(run, result)), run.steps
    (times,) = result["hopper"].values()
    assert times["forward"] == {"ms": 2.0, "least": 2.0, "tflops": pytest.approx(2e-9 * 512 * 256 * 32000 / 2)}
    assert "N=512 D=256 V=32000: torch.mm 2 ms" in run.steps["hopper"]["note"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_planted_faults_compile(check, tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(check.PLANTED)
    subprocess.run(["nvcc", "-arch=sm_80", source, "-o", tmp_path / "planted"], check=True)


def test_sanitizer_reports_a_tool_that_finds_nothing(check, run, monkeypatch, tmp_path):
    """Silence counts only after the planted fault was found."""
    answers = iter([0, 0, check.FOUND, check.FOUND])  # nvcc; memcheck misses the fault; racecheck finds it, and more
    monkeypatch.setattr(check.shutil, "which", lambda name: name)
    monkeypatch.setattr(check, "WORK", tmp_path)
    monkeypatch.setattr(run, "command", lambda *a, **k: next(answers))
    result = {}
    assert not run.step("sanitizer", lambda: check.sanitizer(run, result))
    assert result["sanitizer"] == {
        "memcheck": "unusable here: it did not find a planted fault",
        "racecheck": "FOUND ERRORS",
    }
