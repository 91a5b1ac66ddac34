# SPDX-License-Identifier: Apache-2.0
"""Files with one JSON object a line, as a run appends them: read and cut without torch, so that `fastpost plot` is
quick."""

from __future__ import annotations

import json
from pathlib import Path


def read(path: Path) -> list[dict]:
    """The objects of a .jsonl file of a run; a last line torn by a kill is left out."""
    if not path.exists():
        return []
    return [
        json.loads(text) for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if text.endswith("\n")
    ]


def truncate(path: Path, finished: int) -> int:
    """Keep the lines of the first `finished` steps (0: nothing, the run starts over), byte for byte. Returns how many
    whole lines were cut off."""
    if not path.exists():
        return 0
    from .checkpoint import replace_text

    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [text for text in lines if finished > 0 and text.endswith("\n") and json.loads(text)["step"] <= finished]
    if len(kept) < len(lines):
        replace_text(path, "".join(kept))
    return sum(text.endswith("\n") for text in lines) - len(kept)
