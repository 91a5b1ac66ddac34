# SPDX-License-Identifier: Apache-2.0
"""Complaint 1: building takes hours or hangs, because torch is needed to build, isolation must be switched off, and one
huge CUDA file keeps one core busy. Here: no torch in the build, and a CUDA source of its own per op."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build_needs(pyproject: str, cmake: str) -> list[str]:
    """What ties a build to torch: a requirement, or CMake that looks for it."""
    (system,) = re.findall(r"\[build-system\](.*?)(?=\n\[)", pyproject, re.S)
    later = re.findall(r"^build\.requires = .*$", pyproject, re.M)  # scikit-build-core's conditional ones
    requires = re.findall(
        r'"([A-Za-z0-9_-]+)[^"]*"', "\n".join([*re.findall(r"requires = \[.*?\]", system, re.S), *later])
    )
    code = re.sub(r"#.*", "", cmake)
    found = re.findall(
        r"find_package\(\s*Torch|\bTORCH_\w+|torch\.utils\.cpp_extension|-D_GLIBCXX_USE_CXX11_ABI", code, re.I
    )
    return [r for r in requires if r.lower() in ("torch", "pytorch", "triton", "torchvision")] + found


def sources():
    cmake = [ROOT / "CMakeLists.txt", *(ROOT / "tools/cmake").glob("*.cmake")]
    return (ROOT / "pyproject.toml").read_text(), "\n".join(p.read_text() for p in cmake)


def test_a_build_needs_no_torch():
    assert build_needs(*sources()) == []


@pytest.mark.parametrize(
    "old, new",
    [
        ('"nanobind==3.1.0"', '"nanobind==3.1.0", "torch==2.13.0"'),
        ('build.requires = ["nvidia', 'build.requires = ["torch", "nvidia'),
        ("find_package(nanobind", "find_package(Torch REQUIRED)\nfind_package(nanobind"),
    ],
)
def test_the_mistake_would_be_seen(old, new):
    spoilt = [text.replace(old, new) for text in sources()]
    assert spoilt != list(sources()) and build_needs(*spoilt)


def test_cuda_compiles_in_many_small_jobs():
    files = sorted((ROOT / "cuda/ops").glob("*.cu"))
    ops = {p.stem for p in (ROOT / "python/fastpost/ops").glob("[a-z]*.py")}
    assert {f.stem for f in files} >= ops and len(files) >= 4
    for file in files:
        assert "#include" in file.read_text() and not re.search(r'#include ".*\.cu"', file.read_text()), file


def test_cuda_is_off_unless_there_is_a_gpu_or_someone_asks():
    """A laptop with a stray nvcc must not spend its evening on kernels that it cannot run."""
    cuda = (ROOT / "tools/cmake/cuda.cmake").read_text()
    assert 'set(FASTPOST_CUDA "AUTO"' in sources()[1]
    assert re.search(r'STREQUAL "AUTO"\)\s*if\(FASTPOST_NVCC AND gpu_devices\)', cuda)
