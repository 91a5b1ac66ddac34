# SPDX-License-Identifier: Apache-2.0
"""Complaint 2: `undefined symbol: _ZN3c10…` after torch was upgraded, and a wheel for each torch × CUDA × ABI. Here:
the core asks for no symbol of torch, so there is nothing that an upgrade could take away."""

import re
from pathlib import Path

import torch
from elf import Elf

from fastpost import _core

LIBRARIES = re.compile(r"torch|c10|caffe|aten|nanobind|shm", re.I)
SYMBOLS = re.compile(r"^_ZN?K?(2at|3c10|5torch|5caffe)|aoti_torch|THP|_ZN8pybind11")


def ties(path) -> list[str]:
    """Libraries and symbols of torch that a shared library cannot load without."""
    elf = Elf(path)
    return [n for n in elf.needed if LIBRARIES.search(n)] + [s for s in elf.undefined if SYMBOLS.search(s)]


def test_the_core_is_tied_to_no_torch():
    assert ties(_core.__file__) == []


def test_what_it_does_need_is_the_system():
    """A C++ runtime and libc: nothing that a Python environment replaces."""
    elf = Elf(_core.__file__)
    assert all(re.match(r"(libc|libm|libdl|libpthread|librt|libstdc\+\+|libgcc_s|libatomic|ld-linux)[.-]", n)
               for n in elf.needed), elf.needed  # fmt: skip
    assert "libc.so.6" in elf.needed and any(s.startswith("Py") for s in elf.undefined) and elf.search == []


def test_the_mistake_would_be_seen():
    """torch's own extension is tied to torch, as every extension built by its tools is."""
    (extension,) = Path(torch.__file__).parent.glob("_C.*.so")
    assert any("torch" in t for t in ties(extension))
    library = Path(torch.__file__).parent / "lib/libtorch_python.so"
    assert any(t.startswith("_ZN3c10") for t in ties(library)) and "libtorch.so" in ties(library)
