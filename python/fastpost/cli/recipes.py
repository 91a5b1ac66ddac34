# SPDX-License-Identifier: Apache-2.0
"""`fastpost recipes ls | cp NAME [FILE]`: the recipes that come with fastpost."""

from __future__ import annotations

from pathlib import Path

from fastpost.train.config import suggest

FOLDER = Path(__file__).parent.parent / "recipes"
USAGE = """usage: fastpost recipes ls
       fastpost recipes cp NAME [FILE]     copy to FILE (default NAME.yaml here); an existing file is not overwritten"""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv == ["ls"]:
        for name, file in recipes().items():
            print(f"{name:<12} {summary(file)}")
        return 0
    if argv[0] != "cp" or len(argv) not in (2, 3):
        raise ValueError(
            f"recipes: expected ls or cp NAME [FILE], got '{' '.join(argv)}'. `fastpost recipes ls` lists them."
        )
    name = argv[1].removesuffix(".yaml")
    if name not in recipes():
        raise ValueError(f"recipes: there is no recipe '{name}'.{suggest(name, recipes())}")
    out = Path(argv[2] if len(argv) == 3 else f"{name}.yaml")
    if out.is_dir():
        out = out / f"{name}.yaml"
    try:
        with open(out, "x", encoding="utf-8") as stream:
            stream.write(recipes()[name].read_text(encoding="utf-8"))
    except FileExistsError:
        raise ValueError(
            f"{out}: expected a new file, got one that exists already and is not overwritten. Name another file."
        ) from None
    print(f"{out}: set model.path and data.train in it, then\n  fastpost data {out}\n  fastpost train {out}")
    return 0


def recipes() -> dict[str, Path]:
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def summary(file: Path) -> str:
    """A recipe's first line, which is a comment that says what it is."""
    return file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
