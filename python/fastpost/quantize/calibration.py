# SPDX-License-Identifier: Apache-2.0
"""Texts to windows of tokens: what a model is calibrated on, and what its perplexity is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from fastpost.data.columns import is_chat, need, read_rows, row_type

TEXTS = (".txt", ".md")
ENOUGH = 8
"""Tokens read of a file, in multiples of those asked for: choosing rows of a huge file must not take an hour."""


def documents(path: str | Path, tokenizer) -> Iterator[str]:
    """The texts of a .txt file (one document) or of .jsonl, .json and .parquet rows with `text`, `messages` (through
    the chat template), or `prompt` and `completion`.

    Raises:
        ValueError: no such file, another kind of file, no text in it, or a row of another kind, with its line.
    """
    path = Path(path).expanduser()
    if path.suffix in TEXTS:
        if not path.is_file():
            raise ValueError(f"{path}: expected a text file, got no such file. Check the path.")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8 text, got byte {error.start} that is not. Convert it.") from None
        if not text.strip():
            raise ValueError(f"{path}: expected text, got an empty file. Write some, or name another.")
        yield text
        return
    if path.is_file() and path.suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(
            f"{path}: expected a file named .txt, .jsonl, .json or .parquet, got '{path.suffix}'. Rename it."
        )
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path}: expected rows, got an empty file. Write some, or name another.")
    for row in read_rows(path):
        kind = row_type(row)
        columns = {"text": ("text",), "messages": ("messages",), "prompt_completion": ("prompt", "completion"),
                   "unpaired": ("prompt", "completion")}.get(kind)  # fmt: skip
        if columns is None:
            raise ValueError(
                f"{row.where}: expected a column 'text' or 'messages', or 'prompt' and 'completion', got "
                f"{', '.join(row.values)}. Rename one, or write the texts to a .txt file."
            )
        need(row, columns)
        parts = [row.values[c] for c in columns]
        chat = [is_chat(row, c) for c in columns]
        if all(chat):
            yield tokenizer.apply_chat_template([m for part in parts for m in part], tokenize=False)
        elif any(chat):
            raise ValueError(f"{row.where}: one of {', '.join(columns)} is a chat and one is not. Make both the same.")
        else:
            yield "".join(parts)


def token_stream(path: str | Path, tokenizer, limit: int | None = None) -> torch.Tensor:
    """All tokens of a file, int64 [T], or the documents in which the first `limit` of them are. Documents are ended by
    the tokenizer's EOS, if it has one and they do not end with it; BOS stands at the begin, if the tokenizer writes
    one."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    found = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    several = Path(path).suffix not in TEXTS
    for text in documents(path, tokenizer):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids[:1] == [bos] and found[-1:] == [bos]:  # the chat template wrote it
            ids = ids[1:]
        found += ids
        if several and eos is not None and found[-1:] != [eos]:
            found.append(eos)
        if limit is not None and len(found) >= limit:
            break
    return torch.tensor(found, dtype=torch.int64)


def draw(
    tokens: torch.Tensor, rows: int | None, length: int, seed: int, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(calibration rows [R, length], the windows that are left [S, length], in a random order).

    The stream is cut into windows that do not overlap, and `rows` of them are drawn; None: 128, but an eighth of the
    windows is left to measure on.

    Raises:
        ValueError: not one window, or fewer than `rows`; sizes below 1 (length below 2).
    """
    if length < 2 or (rows is not None and rows < 1):
        raise ValueError(
            f"{where}: --rows and --length: expected at least 1 row of 2 tokens, got {rows} of {length}. Take more."
        )
    count = len(tokens) // length
    if count == 0:
        raise ValueError(
            f"{where}: expected at least one window of {length} tokens, got {len(tokens)} tokens. Give more text, or a "
            f"--length of {len(tokens)} at most."
        )
    if rows is not None and count < rows:
        raise ValueError(
            f"{where}: {rows} rows of {length} tokens need {rows * length} tokens, got {len(tokens)}, which is {count} "
            f"rows. Give more text, or --rows {count}."
        )
    windows = tokens[: count * length].view(count, length)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    rows = min(128, count - count // 8) if rows is None else rows
    return windows[order[:rows]].contiguous(), windows[order[rows:]].contiguous()
