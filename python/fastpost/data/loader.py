# SPDX-License-Identifier: Apache-2.0
"""Data files as tokenised examples, with an account of what was kept, cut and dropped.

data = load_dataset(cfg.data, tokenizer, objective)                         # from the cache, when nothing changed
rows = order(cfg.train.seed, epoch, len(data))[step * B : (step + 1) * B]   # a pure function: resuming is arithmetic
for part in data.micro_batches(rows, max_tokens=8192):
    batch = data.batch(part)
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter
from dataclasses import dataclass, field, fields
from itertools import islice

import numpy as np

from fastpost.data import blocks, cache
from fastpost.data.chat import Chat, NothingToTrain, parts_of
from fastpost.data.collate import Example
from fastpost.data.columns import NUMBERS, TYPES, Row, is_chat, need, numbers, read_rows, row_type
from fastpost.data.dataset import Dataset, Part
from fastpost.data.encode import Encoder, fit
from fastpost.data.table import Examples, Table, Writer
from fastpost.data.translate import Translator
from fastpost.train.config import DataConfig
from fastpost.train.progress import progress
from fastpost.train.sources import Source, config_of, sources_of

CHUNK = 1000
"""Rows tokenised in one call: the tokenizer works in parallel, and memory for text stays small."""


@dataclass
class Report:
    """What became of the rows. Counts are rows, except where a name says tokens or sequences."""

    path: str
    kind: str = ""
    rows: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason -> rows
    dropped_at: dict[str, list[str]] = field(default_factory=dict)  # reason -> file:line of the first three
    truncated: int = 0
    merged: int = 0  # sequences whose prompt and reply share a token when tokenised together; they are tokenised apart
    identical: int = 0  # pairs with the same tokens in chosen and rejected: no preference to learn
    bos: int = 0  # BOS tokens at the start of every sequence
    ends_trained: int = 0  # sequences whose last trained token ends the turn
    sequences: int = 0
    end: str = ""  # the token that ends a turn
    blocks: int = 0  # blocks of data.max_length tokens that the rows were cut into; 0 = rows stay whole
    left_over: int = 0  # tokens at the end that fill no block
    inner_ends: int = 0  # rows whose text itself holds the end-of-document token
    translated: list[str] = field(default_factory=list)  # what other tools' columns were read as

    def drop(self, reason: str, where: str) -> None:
        """Count a row that is left out; the first few of each reason are named."""
        self.dropped[reason] += 1
        if len(self.dropped_at.setdefault(reason, [])) < 3:
            self.dropped_at[reason].append(where)

    def notes(self) -> list[str]:
        """What the user did not ask for and should know, a line each."""
        merged = (
            f"{self.merged} sequences would share a token between prompt and reply; they are tokenised apart, as when "
            "serving"
        )
        ends = f"{self.inner_ends} documents hold {self.end} inside"
        return self.translated + [merged] * (self.merged > 0) + [ends] * (self.inner_ends > 0)

    @property
    def kept(self) -> int:
        return self.rows - self.dropped.total()

    def line(self) -> str:
        """rows 2000 (kept 1987, dropped 13: prompt fills max_length 13)   truncated 4"""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
        text = f"rows {self.rows} (kept {self.kept}, dropped {self.dropped.total()}{': ' + reasons if reasons else ''})"
        for name, count in (("truncated", self.truncated), ("identical pairs", self.identical)):
            text += f"   {name} {count}" if count else ""
        if self.blocks:
            text += f"   blocks {self.blocks} ({self.left_over} tokens left over)"
        return text

    @classmethod
    def sum(cls, reports: list[Report]) -> Report:
        """The account of several sources as one."""
        if len(reports) == 1:
            return reports[0]
        values = {f.name: [getattr(r, f.name) for r in reports] for f in fields(cls)}
        total = cls(" + ".join(values["path"]))
        for name, parts in values.items():
            if name == "bos":
                total.bos = max(parts)
            elif name == "dropped":
                total.dropped = sum(parts, Counter())
            elif isinstance(parts[0], int):
                setattr(total, name, sum(parts))
            elif isinstance(parts[0], list):
                setattr(total, name, list(dict.fromkeys(x for part in parts for x in part)))
            elif isinstance(parts[0], dict):
                keys = dict.fromkeys(key for part in parts for key in part)
                setattr(total, name, {k: [x for part in parts for x in part.get(k, [])] for k in keys})
            elif isinstance(parts[0], str) and name != "path":
                setattr(total, name, ", ".join(dict.fromkeys(filter(None, parts))))
        return total


def order(seed: int | str, epoch: int, n: int, shuffle: bool = True) -> list[int]:
    """The order of n examples in an epoch: a pure function, the same on every machine and Python version."""
    if not shuffle:
        return list(range(n))
    draw = random.Random(f"{seed}/{epoch}")
    keys = [draw.random() for _ in range(n)]  # random() is what Python promises to keep from version to version
    return np.argsort(np.array(keys), kind="stable").tolist()


def load_dataset(
    cfg: DataConfig,
    tokenizer,
    objective=None,
    *,
    path: str | list[Source] | None = None,
    require: tuple[str, ...] = (),
) -> Dataset:
    """Read, render, tokenise and cut the rows of `path` (default: cfg.train, which may be several sources), or find
    them in the cache. Nothing here talks to other processes: under several ranks each calls it, before it joins the
    process group.

    objective (optional) decides which row type is wanted; `require` names stored numbers that every row must have
    ("reference_logprob", "previous_logprob", "reward"). Rows with nothing left to train are dropped and counted; a row
    that is wrong is a ValueError with file and line."""
    path = path or cfg.train
    path = path if isinstance(path, list) else str(path)
    if isinstance(path, str) and not os.path.isfile(os.path.expanduser(path)):
        name = "data.eval" if path == cfg.eval and path != cfg.train else "data.train"
        raise ValueError(
            f"[data] {name}: expected a .jsonl, .json or .parquet file, got {path}, and there is no such file. Correct "
            f"the path, or pass --{name} FILE."
        )
    if objective is not None:
        require += ("reward",) * objective.needs_reward
    if path == cfg.train:
        sources = sources_of(cfg)
    else:
        limit = cfg.eval_limit if path == cfg.eval else cfg.limit
        sources = [dataclasses.replace(s, limit=limit) for s in sources_of(dataclasses.replace(cfg, train=path))]
    tables, parts, rows = [], [], [0]
    for source in sources:
        one = config_of(cfg, source)
        table, account, line = cache.load_or_make(one, tokenizer, objective, require, _read)
        report = Report(**{**account, "dropped": Counter(account["dropped"])})
        start = parts[-1].stop if parts else 0
        parts.append(Part(source, start, start + len(table), report, line))
        tables.append(table)
        rows.append(rows[-1] + report.rows)
    return Dataset(Examples(tables, rows[:-1]), Report.sum([p.report for p in parts]), cfg.share_prompt, parts)


def _read(cfg: DataConfig, tokenizer, objective, require: tuple[str, ...]) -> tuple[Table, dict]:
    """Table and account (a Report as a dict) of the file cfg.train."""
    path, limit = cfg.train, cfg.limit
    if cfg.pack != "rows":
        report = Report(str(path), "text")
        rows = progress(read_rows(path, limit, cfg.columns), f"tokenise {path}", _lines(path, limit), unit="rows")
        return blocks.read(cfg, rows, tokenizer, objective, report), vars(report)
    chat, report, examples, encoder = Chat(tokenizer), Report(str(path)), Writer(), None
    margin = objective is not None and objective.needs_reward and objective.reward_is == "rewards"
    translate = Translator(plain=cfg.format == "plain", margin=margin)
    rows = progress(read_rows(path, limit, cfg.columns), f"tokenise {path}", _lines(path, limit), unit="rows")
    rows = map(translate, rows)
    while chunk := list(islice(rows, CHUNK)):
        if encoder is None:
            report.kind = wanted_type(chunk[0], objective)
            column = TYPES[report.kind][0]
            plain = column == "text" or (cfg.format != "chat" and not is_chat(chunk[0], column))
            encoder = Encoder(tokenizer, plain)
        whole, stored, parts = [], [], []
        for row in chunk:
            report.rows += 1
            need(row, TYPES[report.kind])
            if is_chat(row, column) == plain and cfg.format != "chat":
                raise ValueError(
                    f"{row.where}: strings and message lists are mixed in this file. Use one of them throughout."
                )
            values = _numbers(row, report.kind == "preference", require)
            try:
                parts.append(parts_of(row, report.kind, chat, cfg.format == "chat", cfg.mask))
            except NothingToTrain as reason:
                report.drop(str(reason), row.where)
                continue
            whole.append(row)
            stored.append(values)
        for row, encoded, values in zip(whole, encoder.rows(whole, parts), stored):
            sequences, reason = fit(encoded, cfg, keep=encoder.leading_bos(encoded[0].ids))
            if not reason and max(map(len, sequences)) < cfg.min_length:
                reason = "shorter than min_length"
            if reason:
                report.drop(reason, row.where)
            else:
                examples.append(Example(row.index, sequences, **values))
    report.translated = translate.notes
    if not examples:
        raise ValueError(
            f"{path}: every row was dropped: {report.line()}. Raise data.max_length or correct the rows; "
            "`fastpost data` shows them."
        )
    table = examples.table()
    _account(report, Examples([table]), encoder)
    return table, vars(report)


def wanted_type(row: Row, objective) -> str:
    """The row type to train `objective` on, judged by the first row. Raises ValueError when the columns do not fit."""
    kind = row_type(row)
    if kind == "prompt_only" and not {"completion", "chosen", "rejected"} & set(row.values):
        raise ValueError(
            f"{row.where}: the row has a prompt and no reply (its columns: {', '.join(row.values)}). "
            f"{objective.name if objective else 'Training'} learns from replies that are there: add chosen and "
            "rejected, or completion, or rename with data.columns. Prompts alone are for methods that write the "
            "replies while they train, which this version has not."
        )
    if objective is None:
        return kind
    if objective.row_type:
        need(row, TYPES[objective.row_type])
        return objective.row_type
    if objective.paired:
        need(row, TYPES["preference"])
        return "preference"
    if objective.needs_reward and row.values.get("reward") is None:
        need(row, TYPES["unpaired"])
        return "unpaired"
    found = next((k for k in ("prompt_completion", "messages", "text") if all(c in row.values for c in TYPES[k])), None)
    if found is None and kind == "two_part":
        raise ValueError(
            f"{row.where}: the reply has two parts (rationale, answer), which {objective.name} does not weigh. Use the "
            "objective two-part-sft, or name the whole reply with data.columns, e.g. {completion: response}."
        )
    if found is None and kind == "preference":
        raise ValueError(
            f"{row.where}: {objective.name} trains on single replies, but the rows are pairs (chosen, rejected). "
            "Name one of them with data.columns, e.g. {completion: chosen}, or choose a pair objective."
        )
    return found or kind


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


def _account(report: Report, examples: Examples, encoder: Encoder) -> None:
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
