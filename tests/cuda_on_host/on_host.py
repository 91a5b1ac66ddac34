# SPDX-License-Identifier: Apache-2.0
"""Build cuda/ops/*.cu as plain C++ and call it from Python on CPU tensors.

core = on_host.Core(on_host.build_library(folder))  # stands in for fastpost._core
core.token_logprob(logits, target, 1.0, 0.0, -100, logprob, lse, None)
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER = os.environ.get("CXX", "g++")
KERNELS = sorted((ROOT / "cuda" / "ops").glob("*.cu"))
# A file of the same name in this folder stands in for those whose matrix instructions have no stand-in here.
SOURCES = [p if (p := HERE / f"{k.stem}.cpp").exists() else k for k in KERNELS] + [HERE / "fibres.cpp"]
# -I of this folder comes first: it has the cuda_runtime.h that makes CUDA C++ plain C++.
FLAGS = ["-x", "c++", "-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-DFP_ISA=on_host",
         "-DFASTPOST_SM90", f"-I{HERE}", f"-I{ROOT}", f"-I{ROOT}/cpp"]  # fmt: skip
# ThreadSanitizer instruments kernels, not the fibres that stand for the GPU.
TSAN_FLAGS = {True: ["-fsanitize=thread"], False: ["-DCUDA_ON_HOST_TSAN"]}


def _run(command: list) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def _compile(sources: list[Path], folder: Path, flags) -> list[Path]:
    objects = [folder / (source.name + ".o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda so: _run([COMPILER, *FLAGS, *flags(so[0]), "-c", so[0], "-o", so[1]]),
                      zip(sources, objects)))  # fmt: skip
    return objects


def build_library(folder: Path) -> Path:
    library = folder / "libcuda_on_host.so"
    objects = _compile([*SOURCES, HERE / "exports.cpp"], folder, lambda _: [])
    _run([COMPILER, "-shared", *objects, "-o", library])
    return library


def build_race_check(folder: Path) -> Path:
    """The program of race_check.cpp with ThreadSanitizer."""
    program = folder / "race_check"
    sources = [*SOURCES, HERE / "race_check.cpp"]
    objects = _compile(sources, folder, lambda source: TSAN_FLAGS[source.name != "fibres.cpp"])
    _run([COMPILER, "-fsanitize=thread", *objects, "-o", program])
    return program


class _Tensor(ctypes.Structure):
    """fastpost::Tensor (cpp/core/tensor.h)."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("ndim", ctypes.c_int),
        ("dtype", ctypes.c_int8), ("device", ctypes.c_int8), ("device_index", ctypes.c_int),
        ("stream", ctypes.c_void_p), ("refused", ctypes.c_char_p),
    ]  # fmt: skip


class OnCpu:
    """A tensor that says it is on the CPU; all others say they are on a GPU."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


class _Objective(ctypes.Structure):
    """fastpost::Objective (cpp/objectives.h)."""

    _fields_ = [("kind", ctypes.c_int), ("params", ctypes.c_double * 4)]


class _PolicyObjective(ctypes.Structure):
    """fastpost::PolicyObjective (cpp/policy_objectives.h)."""

    _fields_ = [("kind", ctypes.c_int), ("level", ctypes.c_int), ("params", ctypes.c_double * 5)]


_DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.int8,
]  # DType's order
_CUDA = 1


class Core:
    """Every exported kernel launcher as a method that takes torch tensors. Names that are not exported come from
    `rest`, so that a Core can stand in for fastpost._core."""

    def __init__(self, library: Path, rest=None):
        self._find = ctypes.CDLL(str(library)).find_export
        self._find.restype, self._find.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        self._rest = rest

    def __getattr__(self, name):
        address = self._find(name.encode())
        return self._method(name, address) if address else getattr(self._rest, name)

    def linear_logprob_forward_columns(self, hidden, weight):
        columns = torch.zeros(1, dtype=torch.int64)
        self.forward_columns(hidden, weight, columns)
        return int(columns)

    def _method(self, name, address):
        def call(*args):
            if name == "preference_loss":  # _core takes kind and params, the launcher an Objective
                kind, params = args[4:6]
                args = *args[:4], _Objective(kind, tuple(params)), *args[6:]
            elif name == "policy_loss":
                kind, level, params = args[4:7]
                args = *args[:4], _PolicyObjective(kind, level, tuple(params)), *args[7:]
            elif name == "preference_loss_backward":
                args = *args[:3], ctypes.c_int(args[3]), *args[4:]
            kept, converted = [], []  # shapes and strides live as long as the call
            for a in args:
                converted.append(self._convert(a, kept))
            function = ctypes.CFUNCTYPE(ctypes.c_char_p, *map(type, converted))(address)
            message = function(*converted)
            if message is not None:
                raise RuntimeError(message.decode())

        return call

    @staticmethod
    def _convert(a, kept):
        if a is None:
            return _Tensor(ndim=-1)
        if isinstance(a, OnCpu):
            on_cpu = Core._convert(a.tensor, kept)
            on_cpu.device = 0
            return on_cpu
        if isinstance(a, torch.Tensor):
            sizes = (ctypes.c_int64 * (2 * a.ndim))(*a.shape, *a.stride())
            kept.append(sizes)
            start = ctypes.addressof(sizes)
            return _Tensor(a.data_ptr(), start, start + 8 * a.ndim, a.ndim, _DTYPES.index(a.dtype), _CUDA, 0)
        if isinstance(a, (_Objective, _PolicyObjective)):
            kept.append(a)
            return ctypes.c_void_p(ctypes.addressof(a))
        for python, c in ((bool, ctypes.c_bool), (int, ctypes.c_int64), (float, ctypes.c_float)):
            if isinstance(a, python):
                return c(a)
        return a
