# SPDX-License-Identifier: Apache-2.0
"""The lowest-scored documents that fill a token budget: sort by score, cut where the tokens reach it, without a sort of
the file. Memory follows what is selected (24 bytes a document), not what is read."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastpost.train.progress import progress
from fastpost.train.strict import suggest


@dataclass(frozen=True)
class Selection:
    """What `select` did. worst: the highest score that was taken."""

    rows: int
    tokens: int
    worst: float
    read: int
    unscored: int
    """Rows whose score is null: they are never taken."""
    full: bool
    """False: the file has fewer tokens than the budget, and all of it was taken."""


def select(
    path: str | Path,
    out: str | Path,
    budget: int,
    *,
    by: str = "perplexity",
    tokens: str = "tokens",
    sort: bool = False,
) -> Selection:
    """Write the lines of the .jsonl file `path` with the lowest `by` to `out`: the fewest that hold `budget` tokens, by
    the column `tokens`. Equal scores: the earlier line first. In file order, or with `sort` from the lowest on.

    Raises ValueError naming file and line for a row without the columns, and when `out` exists."""
    path, out = Path(path).expanduser(), Path(out)
    if out.exists():
        raise ValueError(f"{out}: already exists; nothing is overwritten. Name another file.")
    if budget < 1:
        raise ValueError(f"[select] tokens: expected a budget of at least 1, got {budget}.")
    best, read, unscored = Best(budget), 0, 0
    for number, place, row in progress(_lines(path), "select", unit="documents"):
        read += 1
        score, size = (_number(row, c, f"{path}:{number}") for c in (by, tokens))
        if score is None or size is None:
            unscored += 1
        else:
            best.add(score, int(size), place)
    scores, sizes, places = best.selected()
    if not len(scores):
        raise ValueError(f"{path}: no row has a score in column '{by}', so there is nothing to select.")
    order = np.arange(len(places)) if sort else np.argsort(places)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    with open(path, "rb") as source, open(draft, "wb") as stream:
        for place in progress(places[order].tolist(), "write", unit="documents"):
            source.seek(place)
            stream.write(source.readline().rstrip(b"\r\n") + b"\n")
    os.replace(draft, out)
    total = int(sizes.sum())
    return Selection(len(scores), total, float(scores.max()), read, unscored, total >= budget)


class Best:
    """Keeps the lowest-scored items whose tokens fill a budget, in a buffer of at most twice their number (and some
    more)."""

    SPARE = 65536

    def __init__(self, budget: int):
        self.budget = budget
        self._kept = [np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)]
        self._new = self._empty()
        self._limit = math.inf  # from this score on nothing can be taken any more

    def add(self, score: float, tokens: int, place: int) -> None:
        """`place` must grow from call to call: of equal scores the first is taken."""
        if score >= self._limit:
            return
        for column, value in zip(self._new, (score, tokens, place)):
            column.append(value)
        if len(self._new[0]) >= max(self.SPARE, len(self._kept[0])):
            self._cut()

    def selected(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(scores float64, tokens int64, places int64), sorted by score, then place."""
        self._cut()
        return tuple(self._kept)

    def _cut(self) -> None:
        columns = [np.concatenate([k, np.asarray(n, k.dtype)]) for k, n in zip(self._kept, self._new)]
        order = np.lexsort((columns[2], columns[0]))
        filled = int(np.searchsorted(columns[1][order].cumsum(), self.budget))
        if filled < len(order):
            order = order[: filled + 1]
            self._limit = columns[0][order[-1]]
        self._kept, self._new = [c[order] for c in columns], self._empty()

    @staticmethod
    def _empty() -> list[array]:
        return [array("d"), array("q"), array("q")]


def _lines(path: Path) -> Iterator[tuple[int, int, dict]]:
    """(line number, its byte offset, the object in it)."""
    if path.suffix != ".jsonl":
        raise ValueError(f"{path}: expected a .jsonl file with scores, as `fastpost data score` writes it.")
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    place = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: broken JSON ({error}). Correct or remove it.") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}:{number}: expected an object with columns, got {type(row).__name__}.")
                yield number, place, row
            place += len(line)


def _number(row: dict, column: str, where: str) -> float | None:
    if column not in row:
        raise ValueError(f"{where}: column '{column}' is missing.{suggest(column, row)}")
    value = row[column]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where}: column '{column}': expected a finite number, got {value!r}.")
    return value
