# SPDX-License-Identifier: Apache-2.0
"""What has been loaded: examples by their index, which source they came from, and how they are cut into micro-batches.
loader.load_dataset makes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastpost.data.collate import Batch, collate
from fastpost.data.table import Examples
from fastpost.train.sources import Source

if TYPE_CHECKING:
    from fastpost.data.loader import Report


@dataclass
class Part:
    """What a Dataset has from one source: its examples start, start + 1, ..., stop - 1."""

    source: Source
    start: int
    stop: int
    report: Report
    cache: str = ""
    """One line on the cache: hit or made, and the key; empty when it is off."""


@dataclass
class Dataset:
    """Examples in file order, one source after the other, and the report on them."""

    examples: Examples
    report: Report
    share_prompt: bool = True
    parts: list[Part] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Iterable[int]) -> Batch:
        """The examples at `indices`, in that order, as one packed batch."""
        return collate([self.examples[i] for i in indices], self.share_prompt)

    def lines(self) -> list[str]:
        """The account for people: a line for each source, and more on its cache and on what was not asked for."""
        lines = []
        for part in self.parts:
            lines.append(f"{f'{part.report.path}: ' if len(self.parts) > 1 else ''}{part.report.line()}")
            lines += [part.cache] if part.cache else []
            lines += [f"note: {text}" for text in part.report.notes()]
        return lines

    def split(self) -> list[Dataset]:
        """A dataset for each source, on the same examples."""
        return [
            Dataset(Examples([table], [row]), part.report, self.share_prompt, [part])
            for table, row, part in zip(self.examples.tables, self.examples.rows, self.parts)
        ]

    def micro_batches(self, indices: list[int], max_tokens: int, rows: int | None = None) -> list[list[int]]:
        """Cut `indices`, in order, into parts of at most `max_tokens` tokens (or exactly `rows` rows, when given)."""
        if rows is not None:
            return [indices[i : i + rows] for i in range(0, len(indices), rows)]
        sizes = self.examples.computed if self.share_prompt else self.examples.tokens
        parts, room = [], 0
        for i in indices:
            tokens = int(sizes[i])
            if not parts or tokens > room:
                parts.append([])
                room = max_tokens
            parts[-1].append(i)
            room -= tokens
        return parts
