# SPDX-License-Identifier: Apache-2.0
"""Tokenised files, kept: what was made once is mapped from disk the next time, if nothing that it depends on changed.

A file is named by a hash of all of that: the bytes of the data file, the tokenizer and its chat template (and the date,
for a template that writes it), every data setting that matters, what the objective asks of a row, the code that reads
and tokenises, and the versions of the libraries below it. So it cannot be stale, and it is safe to delete at any time.

It is safetensors (nothing is unpickled), written aside and renamed, and its content has a checksum: a damaged file is
made again. Processes that start together on one machine wait for the first of them by a file lock that the system frees
if that one dies; no process group is needed, and none can time out."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from functools import cache
from pathlib import Path

import safetensors.numpy
from safetensors import SafetensorError, safe_open

from fastpost.data.table import Table
from fastpost.train.config import DataConfig
from fastpost.user_cache import file_hash, location

ELSEWHERE = (
    "eval", "eval_limit", "shuffle", "share_prompt", "epoch_tokens", "draw", "cache", "mismatched",
)  # fmt: skip
"""Data settings that do not change what a file's rows become. Any other is part of the key, future ones too."""


def load_or_make(
    cfg: DataConfig, tokenizer, objective, require: tuple[str, ...], make: Callable
) -> tuple[Table, dict, str]:
    """(table, account, one line on where they came from) of the file cfg.train: from the cache, or from `make(cfg,
    tokenizer, objective, require)` and then written to the cache. A cache that cannot be written or read costs time,
    never the run."""
    folder = location(cfg.cache)
    if folder is None or not Path(cfg.train).expanduser().is_file():  # make() says what is wrong
        return *make(cfg, tokenizer, objective, require), ""
    tokens = tokenizer_hash(tokenizer)
    if tokens is None:
        return *make(cfg, tokenizer, objective, require), "cache  off: this kind of tokenizer has no state to hash"
    key = key_of(cfg, tokens, tokenizer, objective, require)
    path, note = folder / f"{key}.safetensors", ""
    found = None
    with _alone(folder / f".lock-{key[:2]}"):
        if path.is_file():
            found = read(path, key)
            note = "" if found else ", the old one was damaged"
        if found is None:
            found = make(cfg, tokenizer, objective, require)
            problem = write(path, key, *found)
            word = f"not written: {problem}" if problem else f"made{note}"
            return *found, f"cache  {key[:12]} {word} ({path})"
    return *found, f"cache  {key[:12]} hit ({path})"


# ---- the key ---------------------------------------------------------------------------------------------------------


def key_of(cfg: DataConfig, tokens: str, tokenizer, objective, require: tuple[str, ...]) -> str:
    """Hash of all that the rows of cfg.train become depends on."""
    settings = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name not in ELSEWHERE}
    if objective is not None:
        names = ("paired", "unit", "needs_reward", "needs_previous", "needs_reference", "row_type", "reward_is")
        settings["objective"] = {n: getattr(objective, n, None) for n in names}
    template = json.dumps(tokenizer.chat_template)
    parts = {
        "data": file_hash(Path(cfg.train).expanduser()),
        "tokenizer": tokens,
        "template": template,
        "date": str(date.today()) if "strftime_now" in template else None,
        "settings": settings,
        "require": sorted(set(require)),
        "code": code_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_hash(tokenizer) -> str | None:
    """Hash of a tokenizer's vocabulary, merges, normaliser and special tokens; None when it has no such state to
    read."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return None
    words = [tokenizer.bos_token, tokenizer.eos_token, sorted(tokenizer.all_special_ids)]
    words += [getattr(tokenizer, "split_special_tokens", False), type(tokenizer).__name__]
    return hashlib.sha256((backend.to_str() + json.dumps(words, default=str)).encode()).hexdigest()


@cache
def code_hash() -> str:
    """Hash of the code that turns files into tokens, and of the libraries' versions that it runs on."""
    import jinja2
    import tokenizers
    import transformers

    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    digest.update(f"{jinja2.__version__} {tokenizers.__version__} {transformers.__version__}".encode())
    return digest.hexdigest()


# ---- the file --------------------------------------------------------------------------------------------------------


def write(path: Path, key: str, table: Table, account: dict) -> str:
    """Write aside, then rename. Returns "" or what went wrong."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"key": key, "account": json.dumps(account)}
    metadata["checksum"] = str(checksum(table.columns, metadata["account"]))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(table.columns, draft, metadata=metadata)
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        return str(error)
    return ""


def read(path: Path, key: str) -> tuple[Table, dict] | None:
    """(table, account), the columns mapped from the file; None when it is damaged."""
    try:
        with safe_open(path, "pt") as file:  # "pt" maps, "numpy" would copy
            metadata = file.metadata() or {}
            columns = {name: file.get_tensor(name).numpy() for name in list(file.keys())}
        account = metadata["account"]
        if metadata["key"] != key or metadata["checksum"] != str(checksum(columns, account)):
            return None
        os.utime(path)  # when it was last of use, for whoever clears the folder
        return Table(columns), json.loads(account)
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def checksum(columns: dict, account: str) -> int:
    """CRC-32 of the account and of all columns with their names, about half a second for each GB."""
    value = zlib.crc32(account.encode())
    for name in sorted(columns):
        column = columns[name]
        value = zlib.crc32(f"{name} {column.dtype} {column.shape}".encode(), value)
        value = zlib.crc32(column, value) if column.size else value
    return value


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process on this machine makes the same file (or, one time in 256, another). Without locks
    (some network disks) each makes it: the rename keeps that right."""
    stream = None
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = open(lock, "a")  # noqa: SIM115, held until the end
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError:
        pass
    try:
        yield
    finally:
        if stream is not None:
            stream.close()
