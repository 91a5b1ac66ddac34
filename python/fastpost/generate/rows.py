# SPDX-License-Identifier: Apache-2.0
"""JSON lines in, JSON lines out, and nothing lost or done twice when the process is killed in between.

    with Output("out.jsonl", settings) as out:
        for row in out.missing(read("in.jsonl")):
            out.write(row, {"answers": [...], "finish": [...]})
        out.finish()

A row is written when its answers are there, in one piece, with its columns and the number of its line. When all are
there, the file is put in the order of the input. Beside it lies NAME.settings.json: what the answers were made with.
No torch here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastpost.generate.request import Completion, Request, Sampling

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody is told that a second process writes the same file
    fcntl = None

ADDED = ("line", "answers", "finish", "tokens", "logprobs")
"""Columns that an output row may have besides those of its input row."""
SYNC_S = 10.0
"""Seconds between two fsyncs: what a power cut can cost. A killed process loses none of what it wrote."""

OVERRIDES = {
    name: name
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "seed", "stop")
} | {"samples": "n"}
"""Columns of a row that override the command's option of that name, and their fields of Sampling; "system" too."""


@dataclass(frozen=True)
class Row:
    """One input row. `index` counts rows from 0, `line` lines of the file from 1; `own`: fields of Sampling that its
    columns set; `system`: its own system message."""

    index: int
    line: int
    where: str
    values: dict
    prompt: str | list[dict]
    own: dict = field(default_factory=dict)
    system: str | None = None


def read(path: str | Path, limit: int | None = None, added: tuple[str, ...] = (), *, begin: int = 0) -> Iterator[Row]:
    """The rows of a .jsonl file, the first `limit` of them, counted from `begin`. Raises ValueError naming file and
    line for a broken row, and for one that has a column of `added` already."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a .jsonl file of prompts, got no such file. Check the path of --file.")
    index, end = begin, None if limit is None else begin + limit
    with open(path, "rb") as stream:
        for line, data in enumerate(stream, 1):
            if end is not None and index >= end:
                return
            if data.strip():
                yield parse(data, index, line, f"{path}:{line}", added)
                index += 1


def parse(data: bytes, index: int, line: int, where: str, added: tuple[str, ...] = ()) -> Row:
    try:
        values = json.loads(data.decode("utf-8-sig" if line == 1 else "utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: expected UTF-8, got byte {error.start}: {error.reason}. Convert the file."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: expected an object with 'prompt', got broken JSON: {error}. Correct or remove it."
        ) from None
    if not isinstance(values, dict) or "prompt" not in values:
        got = f"columns {', '.join(values) or '(none)'}" if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{where}: expected an object with 'prompt', got {got}. Rename the column, or write it.")
    _check_prompt(values["prompt"], where)
    if taken := [name for name in added if name in values]:
        raise ValueError(
            f"{where}: column '{taken[0]}': expected no such column, which the answers' file adds, got one. Rename it."
        )
    own = {}
    for name, field_name in OVERRIDES.items():
        value = values.get(name)
        if value is None:
            continue
        try:
            own[field_name] = getattr(Sampling(**{field_name: value}), field_name)
        except (ValueError, TypeError) as error:
            words = str(error).partition(": ")[2] or f"expected a string or a list of them, got {value!r}. Correct it."
            raise ValueError(f"{where}: column '{name}', which overrides the command's option: {words}") from None
    system = values.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(
            f"{where}: column 'system': expected a string, got {type(system).__name__}. Correct it or leave it out."
        )
    return Row(index, line, where, values, values["prompt"], own, system)


def _check_prompt(prompt, where: str) -> None:
    if isinstance(prompt, str):
        return
    chat = isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt)
    if not chat:
        got = "an empty list" if prompt == [] else "null" if prompt is None else type(prompt).__name__
        raise ValueError(
            f"{where}: column 'prompt': expected a string or a list of messages, got {got}. Write one of them."
        )
    for i, message in enumerate(prompt):
        if not isinstance(message.get("role"), str) or not ("content" in message or message.get("tool_calls")):
            raise ValueError(
                f"{where}: prompt[{i}]: expected {{'role', 'content'}}, got keys {', '.join(message) or '(none)'}. "
                "Rename them."
            )


def answer(run: Callable, rows: Iterable[Row], request: Callable) -> Iterator[tuple[Row, list[Completion]]]:
    """Each row with its answers, as they get finished. run: of Engine, Endpoint or OneByOne; request(row) makes a
    Request, or None for a row that is left out."""
    waiting: dict[int, tuple[Row, int, list[Completion]]] = {}

    def requests() -> Iterator[Request]:
        for row in rows:
            made = request(row)
            if made is not None:
                waiting[row.index] = (row, made.sampling.n, [])
                yield replace(made, id=row.index)  # a number that stays, so that the draws do

    for completion in run(requests()):
        row, n, found = waiting[completion.id]
        found.append(completion)
        if len(found) == n:
            del waiting[completion.id]
            yield row, sorted(found, key=lambda c: c.index)


class Output:
    """The file of answers. Opening it takes a lock, cuts off a last line that a kill tore, and finds what is done.

    settings: what the answers depend on, by option name; they must be those of the rows that are there. added: the
    columns that write() will add. say: where a message goes. Raises ValueError for other settings, for a file that is
    not ours, for a broken line, and when another process writes it."""

    def __init__(
        self,
        path: str | Path,
        settings: dict,
        *,
        added: tuple[str, ...] = ADDED[:3],
        overwrite: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.path, self.added, self.say = Path(path).resolve(), added, say
        self.name = str(path)
        self.sidecar = self.path.with_name(f"{self.path.name}.settings.json")
        self.settings = json.loads(json.dumps(settings))  # as it will be read again
        self.done: dict[int, bytes] = {}
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{path}: --out: expected a file, got a folder or a device. Name a file.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._begin(overwrite)
        except BaseException:
            self.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)  # which lets go of the lock
            self._fd = -1

    def missing(self, rows: Iterable[Row], *, whole: bool = True) -> Iterator[Row]:
        """The rows that have no answers yet. Raises ValueError when a row that has is not the one in the input, and
        when answers are left over at the end of a `whole` input."""
        left = set(self.done)
        for row in rows:
            if row.line not in self.done:
                yield row
                continue
            left.discard(row.line)
            if self.done[row.line] != digest(row.values):
                source = row.where.rpartition(":")[0] or "these prompts"
                raise ValueError(
                    f"{self.name}: expected answers to the rows of {source}, got them to another line {row.line}. If "
                    "the input was edited, name another --out, or --overwrite."
                )
        if whole and left:
            raise ValueError(
                f"{self.name}: expected answers to the rows of this input, got one to line {min(left)}, which it does "
                "not have. If the input was edited, name another --out, or --overwrite."
            )

    def write(self, row: Row, added: dict) -> None:
        """Append a row with its answers. OSError when the disk is full: what is there stays good."""
        values = {**row.values, "line": row.line, **added}
        text = json.dumps(values, ensure_ascii=False)
        try:
            data = text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON may have
            data = json.dumps(values).encode()
        self._append(data + b"\n")
        self.done[row.line] = digest(row.values)
        if time.monotonic() - self._synced > SYNC_S:
            os.fsync(self._fd)
            self._synced = time.monotonic()

    def finish(self) -> None:
        """Put the rows in the order of the input. Without room for a second copy they stay as they are."""
        os.fsync(self._fd)
        places = [(json.loads(data)["line"], at, len(data)) for at, data in self._lines()]
        if places == sorted(places):
            return
        draft = self._draft
        try:
            with open(draft, "wb") as sorted_file:
                os.fchmod(sorted_file.fileno(), stat.S_IMODE(os.fstat(self._fd).st_mode))
                for _, at, size in sorted(places):
                    sorted_file.write(os.pread(self._fd, size, at))
                sorted_file.flush()
                os.fsync(sorted_file.fileno())
            os.replace(draft, self.path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            self.say(f"{self.name}: rows are in the order they were finished in: no room to sort them ({error})")

    @property
    def _draft(self) -> Path:
        return self.path.with_name(f".{self.path.name}.sorting")

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it may have put a sorted file in its place since it was opened here.
            other = not os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                return  # a file system without locks
            other = True
        if other:
            raise ValueError(
                f"{self.name}: expected nobody else to write it, got another process that does. Wait for it, stop it, "
                "or name another --out."
            )

    def _begin(self, overwrite: bool) -> None:
        self._draft.unlink(missing_ok=True)
        if overwrite:
            os.ftruncate(self._fd, 0)
        if os.fstat(self._fd).st_size == 0:  # nothing to keep: these settings count from now on
            self._write_settings()
            return
        self._check_settings()
        self._cut_torn_line()
        for number, (_, data) in enumerate(self._lines(), 1):
            line, which = self._read_back(data, f"{self.name}:{number}")
            if line in self.done:
                raise ValueError(
                    f"{self.name}:{number}: expected one row for line {line} of the input, got a second one. Remove it."
                )
            self.done[line] = which

    def _read_back(self, data: bytes, where: str) -> tuple[int, bytes]:
        """(line of the input, digest of its row) of a row that is there."""
        try:
            values = json.loads(data)
            own = {name: value for name, value in values.items() if name not in self.added}
            if not _whole(values["line"]) or len(own) + len(self.added) != len(values):
                raise ValueError
            return values["line"], digest(own)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"{where}: expected a row of answers, got {data[:60]!r}. Remove that line (its row is done again "
                "then), or --overwrite."
            ) from None

    def _check_settings(self) -> None:
        try:
            there = json.loads(self.sidecar.read_text(encoding="utf-8"))["settings"]
            assert isinstance(there, dict)
        except (OSError, ValueError, KeyError, TypeError, AssertionError):
            raise ValueError(
                f"{self.name}: --out: expected a new file, or one that this command wrote, with its settings in "
                f"{self.sidecar.name}; got one without. Name another file, or --overwrite."
            ) from None
        names = [name for name in {**there, **self.settings} if there.get(name) != self.settings.get(name)]
        if names:
            each = "; ".join(f"{n}: {_show(self.settings.get(n))}, there {_show(there.get(n))}" for n in names)
            raise ValueError(
                f"{self.name}: expected the settings that its {self._count()} rows were made with, got others: {each}. "
                "Give the same ones to go on, name another --out, or --overwrite."
            )

    def _count(self) -> int:
        return sum(1 for _ in self._lines())

    def _cut_torn_line(self) -> None:
        end = kept = os.fstat(self._fd).st_size
        while kept:
            begin = max(0, kept - (1 << 20))
            newline = os.pread(self._fd, kept - begin, begin).rfind(b"\n")
            if newline >= 0:
                kept = begin + newline + 1
                break
            kept = begin
        if kept < end:
            os.ftruncate(self._fd, kept)
            self.say(f"{self.name}: the last line was cut off in mid-write ({end - kept} bytes): removed, done again")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line) of each line, the end of the line included."""
        at = 0
        with open(self.path, "rb") as stream:
            for data in stream:
                yield at, data
                at += len(data)

    def _write_settings(self) -> None:
        from fastpost import __version__

        draft = self.sidecar.with_name(f".{self.sidecar.name}.draft")
        with open(draft, "w", encoding="utf-8") as stream:
            json.dump({"fastpost": __version__, "settings": self.settings}, stream, ensure_ascii=False, indent=2)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, self.sidecar)

    def _append(self, data: bytes) -> None:
        size = os.fstat(self._fd).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            os.ftruncate(self._fd, size)
            raise OSError(
                error.errno, f"{error.strerror}. The {len(self.done)} rows that are there are whole", self.name
            ) from None


def digest(values: dict) -> bytes:
    """16 bytes that tell one input row from another."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).digest()


def _show(value) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)


def _refuse(word: str):
    raise ValueError(f"{word} is not JSON")


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
