# SPDX-License-Identifier: Apache-2.0
"""`fastpost recipes ls | cp NAME [--gpu] [FILE]`: the recipes that come with fastpost.

NAME.yaml runs as it is, on a small model and small data (built_in.py); NAME-gpu.yaml has the authors' settings and
wants a model and data of yours."""

from __future__ import annotations

import re
from pathlib import Path

from fastpost.train.config import suggest

FOLDER = Path(__file__).parent.parent / "recipes"
GPU = "-gpu"
USAGE = """usage: fastpost recipes ls
       fastpost recipes cp NAME [--gpu] [FILE]

NAME runs as it is: a small model and word problems, a few minutes on two CPU cores (some go on from another's run, and
say so). --gpu is the authors' settings, to be given a model and data. FILE is NAME.yaml (NAME-gpu.yaml) here; an
existing file is not overwritten."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv == ["ls"]:
        print("\n".join(listing()))
        return 0
    gpu, words = "--gpu" in argv, [word for word in argv if word != "--gpu"]
    if words[:1] != ["cp"] or len(words) not in (2, 3):
        raise ValueError(
            f"recipes: expected ls or cp NAME [--gpu] [FILE], got '{' '.join(argv)}'. `fastpost recipes ls` lists them."
        )
    name = words[1].removesuffix(".yaml")
    name += GPU * (gpu and not name.endswith(GPU))
    if name not in recipes():
        plain = name.removesuffix(GPU)
        why = f"'{plain}' with --gpu" if gpu and plain in recipes() else f"'{plain if gpu else name}'"
        raise ValueError(f"recipes: there is no recipe {why}.{suggest(plain if gpu else name, recipes())}")
    out = Path(words[2] if len(words) == 3 else f"{name}.yaml")
    if out.is_dir():
        out = out / f"{name}.yaml"
    try:
        with open(out, "x", encoding="utf-8") as stream:
            stream.write(recipes()[name].read_text(encoding="utf-8"))
    except FileExistsError:
        raise ValueError(
            f"{out}: expected a new file, got one that exists already and is not overwritten. Name another file."
        ) from None
    first = "set model.path and data.train in it, then" if name.endswith(GPU) else "runs as it is"
    if before := re.search(r"^  path: runs/([\w-]+)", recipes()[name].read_text(encoding="utf-8"), re.M):
        first = f"goes on from the run of {before[1]} in this folder, then"
    print(f"{out}: {first}\n  fastpost data {out}\n  fastpost train {out}")
    return 0


def recipes() -> dict[str, Path]:
    """Every recipe by its name, those for GPUs as NAME-gpu."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"), key=lambda file: file.stem)}


def listing() -> list[str]:
    """Two lines for each recipe: what it is, and what its second file is."""
    found, lines = recipes(), []
    for name, file in found.items():
        if not name.endswith(GPU):
            lines.append(f"{name:<18} {summary(file)}")
            if other := found.get(name + GPU):
                lines.append(f"{'--gpu':>18} {summary(other)}")
    return lines


def summary(file: Path) -> str:
    """A recipe's first line, which is a comment that says what it is."""
    return file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
