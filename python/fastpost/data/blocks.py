# SPDX-License-Identifier: Apache-2.0
"""Raw text for continued pre-training: documents joined and cut into blocks of exactly max_length tokens.

Each document is tokenised without special tokens and closed by one EOS; what does not fill a block goes on in the next
one, and what is left at the end of the file is left out and counted. Every token but the first of a block is trained.
With pack = blocks a token sees only its own document (and the first token of a document, which then follows nothing, is
not trained); with unmasked-blocks it sees the whole block before it, as in Llama-3-SynE's and ChocoLlama's code."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice, pairwise

from fastpost.data.collate import Example, Sequence
from fastpost.data.columns import Row, need, row_type
from fastpost.data.table import Table, Writer
from fastpost.train.config import DataConfig

CHUNK = 1000
"""Documents tokenised in one call."""


def read(cfg: DataConfig, rows: Iterator[Row], tokenizer, objective, report) -> Table:
    """The blocks of `rows`, those of the file cfg.train, as a Table; `report` (a loader.Report) is filled in.
    An Example's row is the number of its block."""
    if objective is not None and (objective.paired or objective.unit != "token"):
        raise ValueError(
            f"[data] data.pack: blocks are parts of documents, which {objective.name} has no use for. Set data.pack to "
            "rows, or objective.name to sft."
        )
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("[data] data.pack: this tokenizer has no EOS token to put between documents.")
    packer = Packer(cfg.max_length, masked=cfg.pack == "blocks")
    out = Writer()
    while chunk := list(islice(rows, CHUNK)):
        for row in chunk:
            if "text" not in row.values:
                raise ValueError(
                    f"{row.where}: data.pack {cfg.pack} joins raw text (column 'text'), but the columns are those of "
                    f"{row_type(row).replace('_', '-')} rows. Set data.pack to rows (a source may do so for itself)."
                )
            need(row, ("text",))
            if not isinstance(row.values["text"], str):
                got = type(row.values["text"]).__name__
                raise ValueError(f"{row.where}: column 'text': expected a string, got {got}.")
        texts = [row.values["text"] for row in chunk]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            report.rows += 1
            if len(ids) < max(cfg.min_length, 1):
                report.dropped["shorter than min_length" if ids else "empty"] += 1
                continue
            report.inner_ends += end in ids
            for block in packer.add(array("i", [*ids, end])):
                out.append(Example(len(out), block, packed=True))
    report.blocks, report.left_over = len(out), packer.left_over
    if not out:
        raise ValueError(
            f"{cfg.train}: not one block: {report.line()[: report.line().find(')') + 1]} gave {packer.left_over} "
            f"tokens, and data.max_length is {cfg.max_length}. Lower data.max_length, or set data.pack to rows."
        )
    report.sequences = packer.sequences
    report.ends_trained, report.end = packer.ends, tokenizer.convert_ids_to_tokens(end)
    return out.table()


class Packer:
    """A stream of documents cut every `size` tokens. masked: a block is the pieces of its documents; else one
    sequence."""

    def __init__(self, size: int, masked: bool = True):
        self.size, self.masked = size, masked
        self.sequences = self.ends = 0
        """Sequences given out, and those whose last token ends a document and is trained."""
        self._ids, self._cuts = array("i"), [0]

    @property
    def left_over(self) -> int:
        """Tokens that wait for their block to be full."""
        return len(self._ids)

    def add(self, document: array) -> list[tuple[Sequence, ...]]:
        """Add one document's tokens, EOS included; returns the blocks that are now full."""
        full, at = [], 0
        while at < len(document):
            piece = document[at : at + self.size - len(self._ids)]
            at += len(piece)
            self._ids += piece
            self._cuts.append(len(self._ids))
            if len(self._ids) == self.size:
                full.append(self._block(ends=at == len(document)))
        return full

    def _block(self, ends: bool) -> tuple[Sequence, ...]:
        cuts = self._cuts if self.masked else [0, self.size]
        block = tuple(Sequence(self._ids[a:b], b"\0" + b"\1" * (b - a - 1)) for a, b in pairwise(cuts))
        self.sequences += len(block)
        self.ends += sum(len(s) > 1 for s in block[:-1]) + (ends and len(block[-1]) > 1)
        self._ids, self._cuts = array("i"), [0]
        return block
