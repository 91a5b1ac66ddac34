# SPDX-License-Identifier: Apache-2.0
"""What `fastpost data` says of a data set, as facts: the terminal and the page write the same ones."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fastpost.train.config import Config

QUANTILES = {"min": 0.0, "p5": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True)
class Account:
    """A data set in numbers and sentences. Lengths are tokens, one per sequence, ascending."""

    path: str
    kind: str
    rows: int
    kept: int
    dropped: list[tuple[str, int, list[str]]]  # reason, rows, file:line of the first three
    truncated: int  # rows
    identical: int  # pairs
    empty: int  # sequences whose trained tokens are special tokens only: an empty reply and its end
    sequences: int
    lengths: dict[str, list[int]]  # sequence, prompt, and trained or its parts
    tokens: int
    trained: int
    bos: int
    end: str  # the token that ends a turn, "" = none is trained
    ends_trained: int
    template: str
    notes: list[str]
    warnings: list[str]

    def quantiles(self, name: str) -> dict[str, int]:
        values = self.lengths[name]
        return {q: values[min(len(values) - 1, int(len(values) * share))] for q, share in QUANTILES.items()}


def account(cfg: Config, data, tokenizer) -> Account:
    """The account of a loaded data set."""
    report = data.report
    sequences = [s for e in data.examples for s in e.sequences]
    lengths = {"sequence": [len(s) for s in sequences]}
    if cfg.data.mask != "full" and report.kind != "text":
        lengths["prompt"] = [s.first_scored + 1 for s in sequences]
    for name, values in trained_lengths(data).items():
        lengths[name] = values
    special = set(tokenizer.all_special_ids)
    return Account(
        path=report.path,
        kind=report.kind.replace("_", "-"),
        rows=report.rows,
        kept=report.kept,
        dropped=[(reason, n, report.dropped_at.get(reason, [])) for reason, n in report.dropped.most_common()],
        truncated=report.truncated,
        identical=report.identical,
        empty=sum(all(i in special for i, on in zip(s.ids, s.trained) if on) for s in sequences),
        sequences=len(sequences),
        lengths={name: sorted(values) for name, values in lengths.items()},
        tokens=sum(map(len, sequences)),
        trained=sum(s.trained.count(1) for s in sequences),
        bos=report.bos,
        end=report.end,
        ends_trained=report.ends_trained,
        template=template(tokenizer),
        notes=report.notes() + [f"{report.blocks} blocks, {report.left_over} tokens left over"] * (report.blocks > 0),
        warnings=warnings(cfg, report, tokenizer),
    )


def trained_lengths(data) -> dict[str, list[int]]:
    """Trained tokens of each sequence: chosen and rejected apart, and the two parts of a reply in two parts."""
    if data.report.kind == "preference":
        return {n: [e.sequences[i].trained.count(1) for e in data.examples] for i, n in enumerate(PAIR)}
    sequences = [s for e in data.examples for s in e.sequences]
    if sequences[0].split is not None:
        return {
            "rationale": [s.trained[: s.split].count(1) for s in sequences],
            "answer": [s.trained[s.split :].count(1) for s in sequences],
        }
    return {"trained": [s.trained.count(1) for s in sequences]}


PAIR = ("chosen", "rejected")


def names(example, kind: str) -> tuple[str, ...]:
    """What the sequences of a row are called: those of a pair have names."""
    return PAIR if kind == "preference" else ("",) * len(example.sequences)


def warnings(cfg: Config, report, tokenizer) -> list[str]:
    found = []
    if not report.end:
        found.append("no sequence trains a token that ends a turn; the model will not learn to stop")
    stops = stop_tokens(Path(cfg.model.path), tokenizer)
    if report.end and stops and report.end not in stops:
        found.append(f"turns end with {report.end}, but generation stops at {', '.join(sorted(stops))}")
    if "strftime_now" in str(tokenizer.chat_template or ""):
        found.append("the chat template writes today's date, so the same data differs from day to day")
    return found


def template(tokenizer) -> str:
    """The chat template by its hash: equal hashes render equally."""
    text = tokenizer.chat_template
    if not text:
        return "no chat template"
    return f"template {hashlib.sha256(str(text).encode()).hexdigest()[:8]} (the model's own)"


def stop_tokens(folder: Path, tokenizer) -> set[str]:
    """The tokens at which this model's generation stops: generation_config.json's, or the tokenizer's EOS."""
    stops = [tokenizer.eos_token_id]
    file = folder / "generation_config.json"
    if file.is_file():
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        stops = ids if isinstance(ids, list) else [ids] if ids is not None else stops
    return {tokenizer.convert_ids_to_tokens(i) for i in stops if i is not None}
