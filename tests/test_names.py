# SPDX-License-Identifier: Apache-2.0
"""The house rules that a machine can keep: one op is one stem in six files and five lists, layers include only what
they may, no file is a monster or a drawer for everything, nothing is left half done."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fastpost

ROOT = Path(__file__).parent.parent
OPS = sorted(p.stem for p in (ROOT / "python/fastpost/ops").glob("*.py") if not p.stem.startswith("_"))
DOSSIER = (
    "cpp/ops/{}.cpp",
    "cuda/ops/{}.cu",
    "python/fastpost/ops/{}.py",
    "python/fastpost/reference/{}.py",
    "tests/ops/test_{}.py",
    "bench/ops/bench_{}.py",
)
PART = re.compile(
    r"(_fused|_int8|_products)?(_simd|_sm\d+)?$"
)  # an op's second file: the path with the GEMM inside, with int8 multipliers, the products, or one instruction set
HARD_LIMIT = 600  # lines of a source file


def tracked(root: Path = ROOT) -> list[str]:
    """Paths in git, with those that are new and not ignored; without git, every file that looks like a source."""
    try:
        command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"]
        paths = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        paths = [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        paths = [p for p in paths if p.split("/")[0] in ("cpp", "cuda", "python", "tests", "bench", "tools")]
    return [p for p in sorted(paths) if (root / p).is_file()]


PATHS = tracked()
CODE = [p for p in PATHS if Path(p).suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]


def functions(path: str) -> set[str]:
    """Functions that a C++ file declares or defines at the margin."""
    return set(re.findall(r"^void (\w+)\(", (ROOT / path).read_text(), re.M))


def test_there_are_ops():
    assert {"token_logprob", "linear_logprob", "preference_loss"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_whole_dossier(op):
    files = {line.format(op) for line in DOSSIER}
    assert files <= set(PATHS)
    assert files <= {p for p in PATHS if op in Path(p).name}  # what git ls-files '*op*' shows
    assert hasattr(fastpost, op), f"{op} is not in python/fastpost/__init__.py"
    stems = {Path(p).stem for p in PATHS if op in Path(p).name}
    strays = {
        stem for stem in stems if PART.sub("", stem) not in (op, f"bench_{op}") and not stem.startswith(f"test_{op}")
    }
    assert not strays, f"files of another stem answer to *{op}*"
    assert not [other for other in OPS if other != op and op in other]


@pytest.mark.parametrize("op", OPS)
def test_op_is_in_every_list(op):
    def mine(*paths):
        found = set().union(*(functions(path) for path in paths if path in PATHS))
        return {f for f in found if f == op or f.startswith(op + "_")}

    bound = set(re.findall(r'def_op\(m, "(\w+)"', (ROOT / "cpp/bind/module.cpp").read_text()))
    assert mine("cpp/ops.h"), "cpp/ops.h has no function of this op"
    assert (
        mine("cpp/ops.h")
        == mine(f"cpp/ops/{op}.cpp", f"cpp/ops/{op}_fused.cpp")
        == {f for f in bound if f == op or f.startswith(op + "_")}
    )
    assert mine("cuda/ops.h") == mine("cuda/no_cuda.cpp") == mine(f"cuda/ops/{op}.cu") != set()
    assert mine("cuda/ops.h") <= mine("cpp/ops.h")


def test_no_op_without_a_dossier():
    for folder, pattern in (("cpp/ops", "*.cpp"), ("cuda/ops", "*.cu"), ("python/fastpost/reference", "*.py")):
        stems = {PART.sub("", p.stem) for p in (ROOT / folder).glob(pattern) if not p.stem.startswith("_")}
        assert stems == set(OPS), folder


FORBIDDEN = [  # folders, what their files may not include
    (("cpp/core/", "cpp/ops", "cpp/objectives", "cuda/"), r"torch/|ATen/|c10/|pybind11|nanobind|Python\.h"),
    (("cpp/bind/",), r"torch/|ATen/|c10/|pybind11"),
    (("cpp/core/", "cpp/ops", "cpp/objectives"), r"cuda_runtime|cutlass|cute/"),
]


def test_layers_include_only_what_they_may():
    for folders, words in FORBIDDEN:
        for path in (p for p in PATHS if p.startswith(folders)):
            found = re.findall(rf"^\s*#\s*include\s*[<\"](?:{words}).*", (ROOT / path).read_text(), re.M)
            assert not found, f"{path} includes {found}"


def test_core_allocates_no_device_memory():
    forbidden = re.compile(r"\bcudaMalloc|\bcudaDeviceSynchronize|\bcudaStreamSynchronize")
    for path in (p for p in CODE if p.startswith(("cpp/", "cuda/"))):
        assert not forbidden.search((ROOT / path).read_text()), path


def test_sizes_and_names():
    for path in CODE:
        lines = (ROOT / path).read_text().count("\n") if path.startswith(("cpp/", "cuda/", "python/", "bench/")) else 0
        assert lines <= HARD_LIMIT, (
            f"{path} has {lines} lines, the limit is {HARD_LIMIT}: cut it where its subjects part"
        )
        words = set(re.split(r"[_.\W]+", Path(path).stem.lower()))
        assert not words & {"util", "utils", "common", "misc", "helpers", "stuff"}, f"{path}: say what it holds"


def test_every_source_names_its_licence():
    for path in CODE:
        head = (ROOT / path).read_text().split("\n", 3)[:2]
        assert any("SPDX-License-Identifier: Apache-2.0" in line for line in head), path


def test_nothing_is_left_to_fill_in():
    mark = "FILL " + "IN"
    for path in CODE:
        if not path.startswith(("tools/stubs/", "tools/new_op.py")):
            assert mark not in (ROOT / path).read_text(), f"{path} still says {mark} (tools/new_op.py)"


# ---- tools/new_op.py, in a copy of the tree ----

NEW = "row_total"


def copy_tree(root: Path) -> Path:
    for path in PATHS:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, root / path)
    return root


def broken_rules(root: Path) -> tuple[set[str], str]:
    """Which tests of this file fail in another tree, and what they say."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/test_names.py",
        "-k",
        "not new_op and not notice",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return set(re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.M)), done.stdout


def test_the_rules_notice(tmp_path):
    root = copy_tree(tmp_path)
    (root / "bench/ops/bench_token_logprob.py").unlink()
    (root / "cpp/ops/lonely_op.cpp").write_text(
        "// SPDX-License-Identifier: Apache-2.0\n#include <torch/extension.h>\n"
    )
    (root / "cuda/core/utils.cuh").write_text(
        "// SPDX-License-Identifier: Apache-2.0\ncudaMalloc(p, 1);\n" + "\n" * 600
    )
    (root / "python/fastpost/hf/nameless.py").write_text("# FILL " + "IN\n")
    header = root / "cuda/ops.h"
    header.write_text(header.read_text().replace("void token_logprob_backward(", "void token_logprob_backwards("))
    failed, said = broken_rules(root)
    assert failed == {name for name in globals() if name.startswith("test_") and "new_op" not in name} - {
        "test_there_are_ops", "test_the_rules_notice"
    }, said  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = copy_tree(tmp_path_factory.mktemp("tree"))
    done = new_op(root, NEW)
    assert done.returncode == 0, done.stderr
    return root


def new_op(root: Path, *argv: str):
    return subprocess.run([sys.executable, root / "tools/new_op.py", *argv], capture_output=True, text=True)


def sources(root: Path) -> dict[str, bytes]:
    files = (p for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu"))
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def test_new_op_writes_dossier_and_lists(tree):
    now = sources(tree)
    assert {line.format(NEW) for line in DOSSIER} <= set(now)
    changed = [path for path in now if path not in PATHS or now[path] != (ROOT / path).read_bytes()]
    assert all(NEW.encode() in now[path] and b"op_name" not in now[path] for path in changed)
    # All the rules above hold in the new tree, but that much is to be filled in and that the installed core is another.
    failed, said = broken_rules(tree)
    assert failed == {"test_nothing_is_left_to_fill_in", "test_whole_dossier"}, said
    assert f"{NEW} is not in python/fastpost/__init__.py" in said


def test_new_op_refuses_and_then_writes_nothing(tree):
    before = sources(tree)
    for name, message in [
        (NEW, "neither name may be part of the other"),
        ("logprob", "expected lower-case words joined by _"),
        ("token_logprob_2", "found together with token_logprob"),
        ("Int4_gemm", "expected lower-case words"),
    ]:
        done = new_op(tree, name)
        assert done.returncode == 1 and message in done.stderr, name
    assert new_op(tree).returncode == 2 and new_op(tree, "--help").returncode == 0
    assert before == sources(tree)


def test_new_op_compiles_as_cuda(tree, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    flags = ["-std=c++20", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-arch=sm_80"]
    command = ["nvcc", *flags, f"-I{tree}", f"-I{tree}/cpp", "-c", tree / f"cuda/ops/{NEW}.cu", "-o", tmp_path / "x.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_new_op_runs_on_host(tree, tmp_path):
    """The CUDA kernel of the stub, by the machinery of tests/cuda_on_host."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    code = f"""if True:
        import pathlib, sys, torch
        sys.path.insert(0, "tests/cuda_on_host")
        import on_host
        core = on_host.Core(on_host.build_library(pathlib.Path(sys.argv[1])))
        x, out = torch.arange(1500.0).view(5, 300), torch.full((5,), torch.nan)
        core.{NEW}(x, out)
        assert torch.equal(out, x.sum(1)), out
        core.{NEW}_backward(out, x)
        assert torch.equal(x, out[:, None].expand(5, 300))
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_new_op_builds_and_passes_its_own_tests(tree, tmp_path):
    """A whole build: about a minute."""
    site = str(tmp_path / "site")
    found = all(importlib.util.find_spec(name) for name in ("scikit_build_core", "nanobind"))
    flags = ["-q", "--no-deps", "--target", site, "-C", "cmake.define.FASTPOST_WERROR=ON"]
    if found:
        flags.append("--no-build-isolation")
    done = subprocess.run([sys.executable, "-m", "pip", "install", *flags, tree], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # -S: an editable fastpost of this environment would come first.
    path = os.pathsep.join([site, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    command = [sys.executable, "-S", "-m", "pytest", "-p", "no:cacheprovider", f"tests/ops/test_{NEW}.py"]
    done = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
