# SPDX-License-Identifier: Apache-2.0
"""A data file as tokenised examples, with an account of what was kept, cut and dropped.

data = load_dataset(cfg.data, tokenizer, objective)
rows = order(cfg.train.seed, epoch, len(data))[step * B : (step + 1) * B]   # a pure function: resuming is arithmetic
for part in data.micro_batches(rows, max_tokens=8192):
    batch = data.batch(part)
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from fastpost.data.chat import Chat, parts_of
from fastpost.data.collate import Batch, Example, collate
from fastpost.data.columns import NUMBERS, TYPES, Row, is_chat, need, numbers, read_rows, row_type
from fastpost.data.encode import Encoder, fit
from fastpost.train.config import DataConfig
from fastpost.train.progress import progress

CHUNK = 1000
"""Rows tokenised in one call: the tokenizer works in parallel, and memory for text stays small."""


@dataclass
class Report:
    """What became of the rows. Counts are rows, except where a name says tokens or sequences."""

    path: str
    kind: str = ""
    rows: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason -> rows
    truncated: int = 0
    merged: int = 0  # sequences whose prompt and reply share a token when tokenised together; they are tokenised apart
    identical: int = 0  # pairs with the same tokens in chosen and rejected: no preference to learn
    bos: int = 0  # BOS tokens at the start of every sequence
    ends_trained: int = 0  # sequences whose last trained token ends the turn
    sequences: int = 0
    end: str = ""  # the token that ends a turn

    @property
    def kept(self) -> int:
        return self.rows - self.dropped.total()

    def line(self) -> str:
        """rows 2000 (kept 1987, dropped 13: prompt fills max_length 13)   truncated 4"""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
        text = f"rows {self.rows} (kept {self.kept}, dropped {self.dropped.total()}{': ' + reasons if reasons else ''})"
        for name, count in (("truncated", self.truncated), ("identical pairs", self.identical)):
            text += f"   {name} {count}" if count else ""
        return text


@dataclass
class Dataset:
    """Examples in file order and the report on them."""

    examples: list[Example]
    report: Report
    share_prompt: bool = True

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Iterable[int]) -> Batch:
        """The examples at `indices`, in that order, as one packed batch."""
        return collate([self.examples[i] for i in indices], self.share_prompt)

    def micro_batches(self, indices: list[int], max_tokens: int, rows: int | None = None) -> list[list[int]]:
        """Cut `indices`, in order, into parts of at most `max_tokens` tokens (or exactly `rows` rows, when given)."""
        if rows is not None:
            return [indices[i : i + rows] for i in range(0, len(indices), rows)]
        parts, room = [], 0
        for i in indices:
            example = self.examples[i]
            tokens = example.computed if self.share_prompt else example.tokens
            if not parts or tokens > room:
                parts.append([])
                room = max_tokens
            parts[-1].append(i)
            room -= tokens
        return parts


def order(seed: int, epoch: int, n: int, shuffle: bool = True) -> list[int]:
    """The order of n examples in an epoch: a pure function, the same on every machine and Python version."""
    if not shuffle:
        return list(range(n))
    draw = random.Random(f"{seed}/{epoch}")
    keys = [draw.random() for _ in range(n)]  # random() is what Python promises to keep from version to version
    return sorted(range(n), key=keys.__getitem__)


def load_dataset(
    cfg: DataConfig, tokenizer, objective=None, *, path: str | None = None, require: tuple[str, ...] = ()
) -> Dataset:
    """Read, render, tokenise and cut the rows of `path` (default: cfg.train).

    objective (optional) decides which row type and which stored numbers are wanted; `require` names more of the latter
    ("reference_logprob"). Rows with nothing left to train are dropped and counted; a row that is wrong is a ValueError
    with file and line."""
    path = str(path or cfg.train)
    if not os.path.isfile(os.path.expanduser(path)):
        name = "data.eval" if path == cfg.eval and path != cfg.train else "data.train"
        raise ValueError(
            f"[data] {name}: expected a .jsonl, .json or .parquet file, got {path}, and there is no such file. Correct "
            f"the path, or pass --{name} FILE."
        )
    limit = cfg.eval_limit if path == cfg.eval and path != cfg.train else cfg.limit
    if objective is not None:
        require += ("previous_logprob",) * objective.needs_previous + ("reward",) * objective.needs_reward
    chat, report, examples, encoder = Chat(tokenizer), Report(str(path)), [], None
    rows = progress(read_rows(path, limit, cfg.columns), f"tokenise {path}", _lines(path, limit), unit="rows")
    while chunk := list(islice(rows, CHUNK)):
        if encoder is None:
            report.kind = wanted_type(chunk[0], objective)
            column = TYPES[report.kind][0]
            plain = column == "text" or (cfg.format != "chat" and not is_chat(chunk[0], column))
            encoder = Encoder(tokenizer, plain)
        stored, parts = [], []
        for row in chunk:
            need(row, TYPES[report.kind])
            if is_chat(row, column) == plain and cfg.format != "chat":
                raise ValueError(
                    f"{row.where}: strings and message lists are mixed in this file. Use one of them throughout."
                )
            stored.append(_numbers(row, report.kind == "preference", require))
            parts.append(parts_of(row, report.kind, chat, cfg.format == "chat", cfg.mask))
        for row, encoded, values in zip(chunk, encoder.rows(chunk, parts), stored):
            report.rows += 1
            sequences, reason = fit(encoded, cfg, keep=encoder.leading_bos(encoded[0].ids))
            if reason:
                report.dropped[reason] += 1
            else:
                examples.append(Example(row.index, sequences, **values))
    if not examples:
        raise ValueError(f"{path}: every row was dropped: {report.line()}. Raise data.max_length or correct the rows; "
                         "`fastpost data` shows them.")  # fmt: skip
    _account(report, examples, encoder)
    return Dataset(examples, report, cfg.share_prompt)


def wanted_type(row: Row, objective) -> str:
    """The row type to train `objective` on, judged by the first row. Raises ValueError when the columns do not fit."""
    if objective is None:
        return row_type(row)
    if objective.paired:
        need(row, TYPES["preference"])
        return "preference"
    if objective.needs_reward and row.values.get("reward") is None:
        need(row, TYPES["unpaired"])
        return "unpaired"
    found = next((k for k in ("prompt_completion", "messages", "text") if all(c in row.values for c in TYPES[k])), None)
    if found is None and row_type(row) == "preference":
        raise ValueError(
            f"{row.where}: {objective.name} trains on single replies, but the rows are pairs (chosen, rejected). "
            "Name one of them with data.columns, e.g. {completion: chosen}, or choose a pair objective."
        )
    return found or row_type(row)


def _lines(path: str, limit: int | None) -> int | None:
    """How many rows to expect of a .jsonl file, or None: for the progress line alone."""
    if not path.endswith(".jsonl") or not os.path.isfile(path):
        return limit
    with open(path, "rb") as stream:
        count = sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
    return min(count, limit or count)


def _numbers(row: Row, paired: bool, require: tuple[str, ...]) -> dict:
    found = numbers(row, paired)
    for name in require:
        if found[name] is None:
            columns = NUMBERS[name][1:] if paired else NUMBERS[name][:1]
            raise ValueError(
                f"{row.where}: column '{columns[0][0]}' is missing (the row has: {', '.join(row.values)}). "
                f"{'Set model.reference to start, or add' if name == 'reference_logprob' else 'Add'} the column."
            )
    return found


def _account(report: Report, examples: list[Example], encoder: Encoder) -> None:
    """Fill in what is counted over the kept rows."""
    ends = Counter()
    for example in examples:
        report.truncated += any(s.truncated for s in example.sequences)
        report.identical += len(example.sequences) == 2 and example.sequences[0].ids == example.sequences[1].ids
        for s in example.sequences:
            report.sequences += 1
            trained = s.ids[: s.trained.rfind(1) + 1]
            last = trained[encoder.turn(trained) - 1]
            ends[last] += last in encoder.special
    report.ends_trained = ends.total()
    report.bos, report.merged = encoder.leading_bos(examples[0].sequences[0].ids), encoder.merged
    if report.ends_trained:
        report.end = encoder.tokenizer.convert_ids_to_tokens(ends.most_common(1)[0][0])
