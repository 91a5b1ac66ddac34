# SPDX-License-Identifier: Apache-2.0
"""Perplexity of every document of a file, written beside it as a file that can be trained on, selected from or sorted.

    score(rows, NGramScorer(tokenizer, "reference.txt", order=5), "scored.jsonl", key)

A scorer maps texts to (number of tokens, mean negative log-prob in nats, or None where nothing could be scored). The
output has a line for each row, with `perplexity` and `tokens` added, and appears when it is whole; what an interrupted
run wrote is found by `key`, a hash of all that the numbers depend on, and continued."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from fastpost.data.columns import Row, need, read_rows
from fastpost.data.ngram import NGram
from fastpost.train.progress import progress

CHUNK = 256
"""Documents handed to a scorer in one call."""
ADDED = ("perplexity", "tokens")

Scorer = Callable[[list[str]], list[tuple[int, float | None]]]


def score(rows: Iterable[Row], scorer: Scorer, out: str | Path, key: str) -> tuple[int, int]:
    """Write `rows` (with a column `text`) and their scores to `out`, a .jsonl file. Returns (documents, documents
    found from an earlier attempt).

    Raises ValueError when `out` exists, or for a row without text or with the added columns already there."""
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: already exists; nothing is overwritten. Name another file.")
    partial = out.with_name(f".{out.name}.{key[:12]}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    done = whole_lines(partial)
    rows = islice(rows, done, None)
    with open(partial, "a", encoding="utf-8") as stream:
        for row, (tokens, loss) in progress(_scored(rows, scorer), "score", unit="documents"):
            values = row.values | dict(zip(ADDED, (None if loss is None else math.exp(min(loss, 700.0)), tokens)))
            try:
                stream.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise ValueError(f"{row.where}: cannot be written as JSON: {error}. Drop that column.") from None
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, out)
    return whole_lines(out), done


def whole_lines(path: Path) -> int:
    """How many lines of a file are whole; what a killed process left of the last one is cut off. 0 without a file."""
    if not path.exists():
        return 0
    lines = size = 0
    with open(path, "r+b") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                lines += 1
                size += len(line)
        stream.truncate(size)
    return lines


def _scored(rows: Iterator[Row], scorer: Scorer) -> Iterator[tuple[Row, tuple[int, float | None]]]:
    while chunk := list(islice(rows, CHUNK)):
        for row in chunk:
            need(row, ("text",))
            if not isinstance(row.values["text"], str):
                got = type(row.values["text"]).__name__
                raise ValueError(f"{row.where}: column 'text': expected a string, got {got}.")
            if taken := [c for c in ADDED if c in row.values]:
                raise ValueError(f"{row.where}: the row has a column '{taken[0]}' already; it would be overwritten.")
        yield from zip(chunk, scorer([row.values["text"] for row in chunk]), strict=True)


class NGramScorer:
    """Scores by an n-gram model over the tokenizer's tokens, learnt from a reference: a .txt file with a document a
    line, or a .jsonl, .json or .parquet file with a column `text`. The end of a document is scored, too."""

    def __init__(self, tokenizer, reference: str | Path, order: int = 5):
        self.tokenizer = tokenizer
        documents = (ids for texts in _chunks(_texts(Path(reference).expanduser())) for ids in self._ids(texts))
        self.model = NGram(progress(documents, "n-grams", unit="documents"), order, len(tokenizer))

    def __call__(self, texts: list[str]) -> list[tuple[int, float | None]]:
        return [(len(ids), float(-self.model.logprobs(ids).mean())) for ids in self._ids(texts)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _texts(path: Path) -> Iterator[str]:
    if path.suffix != ".txt":
        for row in read_rows(path):
            need(row, ("text",))
            yield row.values["text"]
        return
    if not path.is_file():
        raise ValueError(f"{path}: no such reference file.")
    with open(path, encoding="utf-8-sig") as stream:
        try:
            yield from filter(None, map(str.strip, stream))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 (byte {error.start}: {error.reason}). Convert the file.") from None


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    while chunk := list(islice(texts, CHUNK)):
        yield chunk
