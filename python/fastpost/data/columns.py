# SPDX-License-Identifier: Apache-2.0
"""Files to rows: reading .jsonl, .json and .parquet, and telling by the columns what a row is.

Columns are TRL's:

    text                          language modelling, every token trained
    messages                      a chat; assistant turns are trained
    prompt, completion            the completion is trained
    prompt, completion, label     the same, and label (true / false) says whether it is wanted (KTO)
    prompt, chosen, rejected      a preference pair; the prompt may also be the shared beginning of chosen and rejected
    prompt                        for methods that write replies while they train: recognised, and refused by the others
    prompt, rationale, answer     ours: a reply in two parts, joined as they stand, each with a weight (two-part-sft)

A text column is a string or a list of {"role", "content"}. Numbers that ride along, one per sequence: reference_logps,
previous_logps, reward; in pairs reference_chosen_logps, reference_rejected_logps, previous_..., chosen_reward,
rejected_reward. `turn` names the assistant turn to train (data.mask: turn), counted from 0 over the whole conversation.
`tools` (a list, or JSON of one) and `chat_template_kwargs` (an object, or JSON of one) go to the chat template.
What other tools write is brought into this form by translate.py."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastpost.train.config import suggest

TYPES = {
    "preference": ("chosen", "rejected"),
    "two_part": ("prompt", "rationale", "answer"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt_only": ("prompt",),
}
"""Row types by their required columns, the most demanding first: the first that fits is taken."""

# Our field -> columns for (one sequence), (chosen), (rejected), each with the names that other tools write.
NUMBERS = {
    "reference_logprob": (
        ("reference_logps", "ref_logps"),
        ("reference_chosen_logps", "ref_chosen_logps"),
        ("reference_rejected_logps", "ref_rejected_logps"),
    ),
    "previous_logprob": (("previous_logps",), ("previous_chosen_logps",), ("previous_rejected_logps",)),
    "reward": (("reward",), ("chosen_reward",), ("rejected_reward",)),
}

RESERVED = {"conversation", "messages", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message",
            "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
            "tokenizer_kwargs", "documents"}  # fmt: skip
"""Arguments of apply_chat_template that a row may not set."""


@dataclass(frozen=True)
class Row:
    """One row as read: `where` is "file:line" for messages, `index` its number among the rows of the file."""

    index: int
    where: str
    values: dict


def read_rows(path: str | Path, limit: int | None = None, rename: dict[str, str] | None = None) -> Iterator[Row]:
    """Rows of a .jsonl, .json or .parquet file. `rename` maps our column names to those of the file.

    Raises ValueError naming file and line (row, for .json and .parquet) for a line that is not a JSON object.
    """
    path, count = Path(path).expanduser(), 0
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if not path.is_file():
        raise ValueError(f"{path}: expected a .jsonl, .json or .parquet file, got no such file. Check the path.")
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a file named .jsonl, .json or .parquet, got '{path.suffix}'. Convert it.")
    for where, values in readers[path.suffix](path):
        if limit is not None and count >= limit:
            return
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected an object with columns, got {type(values).__name__}. Write {{...}}.")
        for ours, theirs in (rename or {}).items():
            if theirs not in values:
                raise ValueError(
                    f"{where}: column '{theirs}' (data.columns.{ours}) is missing.{suggest(theirs, values)}"
                )
            values[ours] = values[theirs]
        yield Row(count, where, values)
        count += 1
    if count == 0:
        raise ValueError(f"{path}: expected rows, got no rows. Write one object a line, or name another file.")


def row_type(row: Row) -> str:
    """The first of TYPES whose columns the row has. Raises ValueError with the columns found when there is none."""
    for name, columns in TYPES.items():
        if all(c in row.values for c in columns):
            return name
    known = "; ".join(", ".join(c) for c in TYPES.values())
    raise ValueError(
        f"{row.where}: columns {', '.join(row.values) or '(none)'} are not a row type. Expected one of: {known}. "
        "Rename with data.columns, e.g. {prompt: question, completion: answer}."
    )


def need(row: Row, columns: tuple[str, ...]) -> None:
    """Raise ValueError naming file and line when a column is missing or null."""
    for column in columns:
        if row.values.get(column) is None:
            null = column in row.values
            what, do = ("is null", "Fill it in") if null else ("is missing", "Rename another with data.columns")
            raise ValueError(
                f"{row.where}: column '{column}' {what} (the row has: {', '.join(row.values)}). {do}, or drop the row."
            )


def is_chat(row: Row, column: str) -> bool:
    """True for a list of messages, False for a string; ValueError for anything else."""
    value = row.values[column]
    if isinstance(value, str):
        return False
    if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        for i, message in enumerate(value):
            if not isinstance(message.get("role"), str) or not ("content" in message or message.get("tool_calls")):
                raise ValueError(
                    f"{row.where}: {column}[{i}]: expected {{'role', 'content'}}, got keys {', '.join(message)}. "
                    "Rename them."
                )
        return True
    got = "an empty list" if value == [] else type(value).__name__
    raise ValueError(
        f"{row.where}: column '{column}': expected a string or a list of messages, got {got}. Write one of them."
    )


def numbers(row: Row, paired: bool) -> dict[str, tuple[float, ...] | None]:
    """The stored numbers of a row: field -> one float per sequence, or None when the row has no such column.

    label counts as reward +1 or -1, which is how KTO tells wanted from unwanted.
    """
    found = {}
    for name, (single, chosen, rejected) in NUMBERS.items():
        wanted = (chosen, rejected) if paired else (single,)
        keys = [next((k for k in names if row.values.get(k) is not None), None) for names in wanted]
        if all(k is None for k in keys):
            found[name] = None
            continue
        for key, names in zip(keys, wanted):
            value = row.values.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(
                    f"{row.where}: column '{key or names[0]}': expected a finite number, got {value!r}. Fill it in."
                )
        found[name] = tuple(float(row.values[k]) for k in keys)
    label = row.values.get("label")
    if not paired and label is not None:
        if not isinstance(label, bool) and label not in (0, 1):
            raise ValueError(f"{row.where}: column 'label': expected true or false, got {label!r}. Write it so.")
        found["reward"] = (1.0 if label else -1.0,)
    return found


def turn(row: Row) -> int | None:
    """The column `turn`, None where the row has none. Raises ValueError for anything but a whole number from 0 up."""
    value = row.values.get("turn")
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or value != int(value):
        raise ValueError(f"{row.where}: column 'turn': expected a whole number from 0 up, got {value!r}.")
    return int(value)


def template_arguments(row: Row) -> dict:
    """What the columns tools and chat_template_kwargs give to the chat template. Raises ValueError naming file, line
    and column for other types, broken JSON, and arguments that decide where a reply begins."""
    arguments = {}
    for column, kind in (("chat_template_kwargs", dict), ("tools", list)):
        value = row.values.get(column)
        if isinstance(value, str):
            value = _parse(value.encode(), f"{row.where}: column '{column}'") if value.strip() else None
        if value is None:
            continue
        if not isinstance(value, kind):
            names = {dict: "an object", list: "a list"}
            raise ValueError(
                f"{row.where}: column '{column}': expected {names[kind]} or JSON of one, got {type(value).__name__}."
            )
        arguments |= value if kind is dict else {"tools": value} if value else {}
    if ours := sorted(set(arguments) & RESERVED):
        raise ValueError(
            f"{row.where}: column 'chat_template_kwargs': {', '.join(ours)} is set by fastpost. Remove it from the row."
        )
    return arguments


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line.rstrip(), f"{path}:{number}")


def _json(path: Path) -> Iterator[tuple[str, object]]:
    tree = _parse(path.read_bytes(), str(path))
    if not isinstance(tree, list):
        raise ValueError(
            f"{path}: expected a list of rows, got {type(tree).__name__}. One object per line is a .jsonl file."
        )
    for index, values in enumerate(tree):
        yield f"{path} row {index}", values


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading parquet needs pyarrow. `pip install pyarrow`, or give a .jsonl file."
        ) from None
    index = 0
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: expected a parquet file, got something else ({error}). Write it again.") from None
    for batch in file.iter_batches():
        for values in batch.to_pylist():
            yield f"{path} row {index}", {name: _dense(value) for name, value in values.items()}
            index += 1


def _dense(value):
    """Parquet gives every struct the fields of all rows, null where a row has none: take those out again. An empty
    `content` is one that the writer meant."""
    if isinstance(value, list):
        return [_dense(v) for v in value]
    if isinstance(value, dict):
        return {k: _dense(v) for k, v in value.items() if v is not None or k == "content"}
    return value


def _parse(data: bytes, where: str):
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(
            f"{where}: expected JSON, got broken JSON ({place}character {error.colno}: {error.msg}). Correct or "
            "remove it."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 (byte {error.start}: {error.reason}). Convert the file to UTF-8."
        ) from None
