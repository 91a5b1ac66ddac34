#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Start a new op: python tools/new_op.py NAME

Writes the six files of its dossier and its line in each list. What it writes is a small op that works (the sum of each
row), so that everything builds and passes from the first minute on; every place to change says FILL IN, and
tests/test_names.py fails until none is left. Nothing is written when anything is in the way.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

STUBS = Path(__file__).resolve().parent / "stubs"
STEM = "op_name"  # in the stubs' text and paths

OPS_H = """
// ---- op_name: FILL IN -----------------------------------------------------------------------------------------------

// FILL IN: out[i] = Σ_j x[i, j]. x [N, D] float32 with contiguous rows; out: [N] float32.
void op_name(Tensor x, Tensor out);

// grad_x [N, D] = d(Σ_i grad_out[i]·out[i]) / dx from grad_out [N], all float32.
void op_name_backward(Tensor grad_out, Tensor grad_x);
"""
CUDA_OPS_H = """
void op_name(Tensor x, Tensor out);
void op_name_backward(Tensor grad_out, Tensor grad_x);
"""
NO_CUDA = """
void op_name(Tensor, Tensor) { no_cuda("op_name"); }
void op_name_backward(Tensor, Tensor) { no_cuda("op_name"); }
"""
BIND = """  def_op(m, "op_name", &fastpost::op_name);
  def_op(m, "op_name_backward", &fastpost::op_name_backward);
"""
ON_HOST = """    {"op_name", address<cuda::op_name>},
    {"op_name_backward", address<cuda::op_name_backward>},
"""
LISTS = [  # file, what is added, the text that must follow it
    ("cpp/ops.h", OPS_H, r"\n}  // namespace fastpost\n"),
    ("cuda/ops.h", CUDA_OPS_H, r"\n}  // namespace fastpost::cuda\n"),
    ("cuda/no_cuda.cpp", NO_CUDA, r"\n}  // namespace fastpost::cuda\n"),
    ("cpp/bind/module.cpp", BIND, r"}\n\Z"),
    ("python/fastpost/__init__.py", '    "op_name": "fastpost.ops.op_name",\n', r"}\n_MODULES"),
    ("tests/cuda_on_host/exports.cpp", ON_HOST, r"};\n\n}  // namespace\n"),
]


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__.strip())
        return 0 if argv in (["-h"], ["--help"]) else 2
    name = argv[0]
    try:
        written = create(STUBS.parent.parent, name)
    except ValueError as error:
        print(f"new_op: {error}", file=sys.stderr)
        return 1
    print("\n".join(written))
    print(f"\nFill in, in this order: cpp/ops.h, python/fastpost/reference/{name}.py, cpp/ops/{name}.cpp, the rest.")
    print(f"Try it: pip install . && pytest tests/ops/test_{name}.py tests/test_names.py")
    print("What is left to do: git grep -n 'FILL IN'")
    return 0


def create(root: Path, name: str) -> list[str]:
    """Write the dossier of `name` into the tree at `root`; returns the paths written and changed.

    Raises ValueError, before anything is written, when the name does not fit or a file or anchor is in the way.
    """
    check_name(root, name)
    files = {}
    for stub in sorted(p for p in STUBS.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        path = root / str(stub.relative_to(STUBS)).replace(STEM, name)
        if path.exists():
            raise ValueError(f"{path.relative_to(root)} exists already.")
        files[path] = stub.read_text(encoding="utf-8").replace(STEM, name)
    for relative, addition, anchor in LISTS:
        path = root / relative
        if not path.is_file():
            raise ValueError(f"{relative} is missing: is this the root of fastpost?")
        text = path.read_text(encoding="utf-8")
        places = [m.start() for m in re.finditer(anchor, text)]
        if len(places) != 1:
            raise ValueError(
                f"{relative}: expected {anchor!r} once, found {len(places)} times. Mend LISTS in new_op.py."
            )
        files[path] = text[: places[0]] + addition.replace(STEM, name) + text[places[0] :]
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [str(path.relative_to(root)) for path in files]


def check_name(root: Path, name: str) -> None:
    """One op is one stem that is part of no other: `git ls-files '*NAME*'` must show its dossier and no more."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)+", name):
        raise ValueError(f"{name}: expected lower-case words joined by _, as token_logprob.")
    for other in sorted(p.stem for p in (root / "python/fastpost/ops").glob("[a-z]*.py")):
        if name in other or other in name:
            raise ValueError(f"{name}: found together with {other}; neither name may be part of the other.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
