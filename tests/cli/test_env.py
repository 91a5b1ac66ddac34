# SPDX-License-Identifier: Apache-2.0
"""`fastpost env` must answer most of all where little works: each breakage is made in a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastpost
from fastpost import _core
from fastpost.cli import env, main, probes

ROOT = Path(__file__).parent.parent.parent
TORCH = """# a torch that loads in no time
class Tensor: pass
class version: cuda = None
class cuda: device_count = staticmethod(lambda: 0); get_device_properties = None
__version__, get_num_threads = "9.9", lambda: 1
"""


@pytest.fixture
def copy(tmp_path):
    """A folder with the Python files of fastpost and no core, to go first on the path."""
    source = Path(fastpost.__file__).parent
    shutil.copytree(source, tmp_path / "fastpost", ignore=shutil.ignore_patterns("_core*", "__pycache__"))
    return tmp_path


def report(folder, *flags, **variables) -> dict:
    """The report of a process that sees `folder` first; -S leaves it nothing but the standard library."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("FASTPOST_")} | variables
    code = "import sys; from fastpost.cli import main; sys.exit(main(['env', '--json']))"
    variables["PYTHONPATH"] = str(folder)
    done = subprocess.run([sys.executable, *flags, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_works_here(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fastpost"]["version"] == fastpost.__version__
    assert found["core"] == {"file": _core.__file__, **dict(_core.build_info())}
    assert found["torch"]["version"] == found["packages"].get("torch", found["torch"]["version"])
    assert found["torch"]["exchange_api"] is True
    assert found["cpu"]["usable_threads"] >= 1
    assert not any("error" in found[section] for section in found if section != "advice")
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    for section in found:
        assert re.search(rf"^{section} ", shown, re.M)
    assert max(map(len, shown.splitlines())) < 200


def test_usage(capsys):
    assert main(["env", "--help"]) == 0
    assert main(["env", "--jsn"]) == 2
    assert capsys.readouterr().out.count("usage: fastpost env [--json]") == 2


def test_without_anything_but_the_standard_library(copy):
    found = report(copy, "-S")
    assert found["torch"]["error"] == "ModuleNotFoundError: No module named 'torch'"
    assert "pip install 'torch>=2.11'" in found["torch"]["do"]
    assert "_core" in found["core"]["error"] and "pip install" in found["core"]["do"]
    assert found["fastpost"]["version"] == fastpost.__version__
    assert found["cpu"]["model"] and found["packages"]["numpy"] is None
    assert f"torch: {found['torch']['do']}" in found["advice"]


def test_core_works_without_torch(copy):
    shutil.copy(_core.__file__, copy / "fastpost")
    found = report(copy, "-S")
    assert "error" in found["torch"]
    assert found["core"]["version"] == fastpost.__version__


@pytest.mark.parametrize(
    ("source", "error", "advice"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ended the process: SIGILL", "another kind of CPU"),
        ("import os; os._exit(3)", "ended the process: status 3", "Build it again"),
        ("raise ImportError('libstdc++.so.6: version `GLIBCXX_3.4.32\\' not found')", "GLIBCXX_3.4.32", "newer system"),
        ("raise RuntimeError('bad day')", "RuntimeError: bad day", "Build it again"),
        ("build_info = lambda: [('version', '0.0.1')]; __file__ = 'x'", None, "built as 0.0.1"),
    ],
    ids=["illegal-instruction", "exit", "newer-library", "error", "stale"],
)
def test_broken_core(copy, source, error, advice):
    (copy / "fastpost/_core.py").write_text(source)
    (copy / "torch.py").write_text(TORCH)
    found = report(copy, "-S")
    if error:
        assert error in found["core"]["error"]
    assert any(advice in line for line in found["advice"])
    assert found["torch"]["version"] == "9.9" and found["cpu"]["model"]


def test_core_of_another_python(copy):
    (copy / "fastpost/_core.cpython-399-x86_64-linux-gnu.so").write_bytes(b"")
    found = report(copy, "-S")
    assert "_core.cpython-399-x86_64-linux-gnu.so" in found["core"]["do"]


def test_torch_that_ends_the_process_does_not_take_the_core_with_it(copy):
    shutil.copy(_core.__file__, copy / "fastpost")
    (copy / "torch.py").write_text("import os; print('loading', flush=True); os.abort()")
    found = report(copy, "-S")
    assert found["torch"]["error"] == "loading it ended the process: SIGABRT"
    assert found["core"]["version"] == fastpost.__version__


def test_variables(copy):
    found = report(copy, "-S", FASTPOST_REFERNCE="1", FASTPOST_TRACEBACK="1", OMP_NUM_THREADS="3")
    assert found["environment"]["OMP_NUM_THREADS"] == "3"
    assert any("Did you mean FASTPOST_REFERENCE?" in line for line in found["advice"])
    assert any(line.startswith("FASTPOST_TRACEBACK is set: ") for line in found["advice"])
    shutil.copy(_core.__file__, copy / "fastpost")
    found = report(copy, "-S", FASTPOST_ISA="avx3")
    assert "expected baseline, avx2" in found["core"]["error"] and found["core"]["do"].startswith("Unset FASTPOST_ISA")


def test_a_probe_may_fail_alone(monkeypatch, capsys):
    def broken():
        raise OSError("no such thing")

    monkeypatch.setattr(probes, "cpu", broken)
    monkeypatch.setattr(probes, "load", lambda *stages: {s: {"version": "2.13.0", "cuda": None} for s in stages})
    assert main(["env"]) == 0
    assert re.search(r"^cpu +FAILED  OSError: no such thing", capsys.readouterr().out, re.M)


def test_gpu_advice():
    assert probes.gpus().keys() >= {"gpus"}
    for archs, capability, runs in [
        ("80,90a", "8.0", True), ("80,90a", "8.6", True), ("80,90a", "9.0", True), ("80,90a", "10.0", True),
        ("80-real,90a-real", "8.6", True), ("80-real,90a-real", "10.0", False), ("80-real,90a-real", "9.0", True),
        ("80,90a", "7.5", False), ("86", "8.0", False), ("90a", "9.1", False), ("120", "12.0", True),
    ]:  # fmt: skip
        assert env.runs_on(archs, capability) is runs, (archs, capability)
    base = {"fastpost": {}, "environment": {}, "gpu": {"gpus": [{"name": "T4", "capability": "7.5"}]}}
    off = base | {"torch": {"version": "2.13.0", "cuda": None}, "core": {"cuda": "off"}}
    assert [line[:18] for line in env.gpu_unused(off)] == ["There is a GPU, bu"] * 2
    assert env.gpu_unused(off)[1].endswith("FASTPOST_CUDA=ON pip install --force-reinstall --no-deps .")
    on = base | {"torch": {"version": "2.13.0", "cuda": "13.0"}, "core": {"cuda": "80,90a"}}
    (line,) = env.gpu_unused(on)
    assert "does not run on T4 (7.5)" in line and "FASTPOST_CUDA_ARCHITECTURES=75-real" in line


def test_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0, 580.1, 81559 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert probes.gpus() == {
        "gpus": [{"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "driver": "580.1", "memory": "81559 MiB"}]
    }
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it cannot talk to the driver.'; exit 9\n")
    assert probes.gpus()["note"] == "nvidia-smi: NVIDIA-SMI has failed because it cannot talk to the driver."


def test_lists_are_complete():
    """Each variable that the sources read is documented, and each optional dependency is looked for."""
    files = (p for folder in ("python", "cpp", "cuda") for p in (ROOT / folder).rglob("*"))
    text = "".join(p.read_text() for p in files if p.suffix in (".py", ".cpp", ".cu", ".h"))
    assert set(re.findall(r'(?:environ\S*[\[(]|getenv\()"(FASTPOST_\w+)"', text)) == set(env.VARIABLES)
    (extras,) = re.findall(r"\[project.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)
    assert set(re.findall(r'"([a-z-]+)[=>\d.]*"', extras)) <= set(probes.PACKAGES)
