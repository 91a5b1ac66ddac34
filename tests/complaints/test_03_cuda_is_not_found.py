# SPDX-License-Identifier: Apache-2.0
"""Complaint 3: the search for CUDA libraries fails although there is a GPU. Here: the runtime is linked statically, so
there is no search, and `fastpost env` names what was found, what was loaded, and what to do."""

import json
import re
from pathlib import Path

import pytest
from elf import Elf

from fastpost import _core
from fastpost.cli import env, main, probes

CMAKE = (Path(__file__).parents[2] / "tools/cmake/cuda.cmake").read_text()


def searches(cmake: str) -> list[str]:
    """Ways in which a build leaves CUDA's libraries to be searched for when it is used."""
    code = re.sub(r"#.*", "", cmake)
    found = re.findall(r"CUDA::cudart\b|CUDA::cublas\w*|CUDA_RUNTIME_LIBRARY\s+(?:Shared|None)|\bcudart\.so", code)
    return found + ([] if re.search(r"CUDA_RUNTIME_LIBRARY\s+Static", code) else ["the default runtime"])


def test_the_cuda_runtime_is_linked_statically():
    assert searches(CMAKE) == []
    assert not [n for n in Elf(_core.__file__).needed if re.match(r"lib(cuda|cudart|cublas|nv)", n)]


@pytest.mark.parametrize(
    "old, new",
    [("CUDA_RUNTIME_LIBRARY Static", ""), ("LIBRARY Static", "LIBRARY Shared"), ("cuda_targets}", "x} CUDA::cublasLt")],
)
def test_the_mistake_would_be_seen(old, new):
    assert searches(CMAKE.replace(old, new))


def test_no_python_file_searches_for_cuda():
    """No ctypes search, no LD_LIBRARY_PATH surgery: torch finds its own CUDA."""
    package = Path(probes.__file__).parents[1]
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"find_library|CDLL\(|libcudart|environ\[.LD_LIBRARY_PATH.\] *=", text), path


def test_env_names_what_was_found_and_what_was_loaded(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["core"]["file"] == _core.__file__ and found["core"]["cuda"]
    assert found["torch"]["file"].endswith("__init__.py") and "cuda" in found["torch"] and "gpus" in found["torch"]
    assert "gpus" in found["gpu"] or "error" in found["gpu"]


def test_env_says_what_to_do_about_a_gpu_that_is_not_used():
    gpu = {"gpus": [{"name": "H100", "capability": "9.0"}]}
    lines = env.gpu_unused({"gpu": gpu, "torch": {"version": "2.13.0", "cuda": None}, "core": {"cuda": "off"}})
    assert len(lines) == 2 and "this torch has no CUDA" in lines[0] and "FASTPOST_CUDA=ON pip install" in lines[1]
    assert (
        env.gpu_unused({"gpu": gpu, "torch": {"version": "2.13.0", "cuda": "13.0"}, "core": {"cuda": "80,90a"}}) == []
    )
