# SPDX-License-Identifier: Apache-2.0
"""Examples as columns of numbers: five bytes a token, ready to be mapped from a file, made into an Example when asked
for.

    Examples([table, ...])[i]    # an Example, like a list of them
"""

from __future__ import annotations

from array import array
from collections import abc
from dataclasses import fields

import numpy as np
import torch

from fastpost.data.collate import Example, Sequence

TOKEN, SEQUENCE, EXAMPLE, NUMBERS = "token.", "sequence.", "example.", "numbers."
"""What a column has one value of: a token, a sequence, an example; NUMBERS: a sequence's entry in a tuple of floats of
its Example (reference_logprob, ...), NaN = None. The rest of a column's name is the field."""


class Table:
    """Columns, all of them 1-D. "end": int64, where each sequence ends among the tokens; "first": int64 [examples + 1],
    each example's first sequence; "computed": int64 [examples], Example.computed."""

    def __init__(self, columns: dict[str, np.ndarray]):
        self.columns = columns
        end = np.concatenate([[0], columns["end"]])
        self._end, self._first = end, columns["first"]
        self.tokens = np.diff(end[self._first])
        """int64 [examples], Example.tokens."""
        self._fields = {
            prefix: [(name[len(prefix) :], column) for name, column in columns.items() if name.startswith(prefix)]
            for prefix in (TOKEN, SEQUENCE, EXAMPLE, NUMBERS)
        }

    def __len__(self) -> int:
        return len(self._first) - 1

    def example(self, i: int, row: int = 0) -> Example:
        """Example number i; `row` is added to its row number."""
        first, last = int(self._first[i]), int(self._first[i + 1])
        values = {name: column[i].item() for name, column in self._fields[EXAMPLE]}
        values["row"] += row
        for name, column in self._fields[NUMBERS]:
            numbers = column[first:last].tolist()
            values[name] = None if any(x != x for x in numbers) else tuple(numbers)
        return Example(sequences=tuple(self._sequence(s) for s in range(first, last)), **values)

    def _sequence(self, s: int) -> Sequence:
        begin, end = int(self._end[s]), int(self._end[s + 1])
        values = {name: column[s].item() for name, column in self._fields[SEQUENCE]}
        for name, column in self._fields[TOKEN]:
            data = column[begin:end].tobytes()
            values[name] = data if column.dtype == np.uint8 else array(CODES[column.dtype.name], data)
        return Sequence(**values)

    def put(self, name: str, values: np.ndarray) -> None:
        """Set the numbers `name`, one per sequence."""
        self.columns[NUMBERS + name] = values
        self._fields[NUMBERS] = [pair for pair in self._fields[NUMBERS] if pair[0] != name] + [(name, values)]


CODES = {"int32": "i", "int64": "q", "float32": "f", "float64": "d"}
"""The typecodes of array for the dtypes of token columns; uint8 stands for bytes."""


class Writer:
    """Collects examples for a Table. Which columns there are follows from the fields of Example and Sequence."""

    def __init__(self):
        self._columns: dict[str, array | bytearray | list] = {}
        self._end, self._first, self._computed = array("q"), array("q", [0]), array("q")

    def __len__(self) -> int:
        return len(self._computed)

    def append(self, example: Example) -> None:
        for f in EXAMPLE_FIELDS:
            value = getattr(example, f)
            if isinstance(value, (tuple, type(None))):
                numbers = [np.nan] * len(example.sequences) if value is None else value
                self._columns.setdefault(NUMBERS + f, array("d")).extend(numbers)
            else:
                self._columns.setdefault(EXAMPLE + f, []).append(value)
        for s in example.sequences:
            for f in SEQUENCE_FIELDS:
                value = getattr(s, f)
                if isinstance(value, array):
                    self._columns.setdefault(TOKEN + f, array(value.typecode)).extend(value)
                elif isinstance(value, bytes):
                    self._columns.setdefault(TOKEN + f, bytearray()).extend(value)
                elif value is not None:
                    self._columns.setdefault(SEQUENCE + f, []).append(value)
            self._end.append((self._end[-1] if self._end else 0) + len(s))
        self._first.append(len(self._end))
        self._computed.append(example.computed)

    def table(self) -> Table:
        columns = {"end": self._end, "first": self._first, "computed": self._computed, **self._columns}
        columns = {name: _column(values) for name, values in columns.items()}
        columns = {  # a column of numbers that no row has
            name: c for name, c in columns.items() if not name.startswith(NUMBERS) or not np.isnan(c).all()
        }
        sizes = {TOKEN: self._end[-1] if self._end else 0, SEQUENCE: len(self._end), EXAMPLE: len(self._computed)}
        for prefix, size in sizes.items():
            for name, column in columns.items():
                if name.startswith(prefix) and len(column) != size:
                    raise ValueError(f"[table] {name}: expected {size} values, got {len(column)}: some rows have none.")
        return Table(columns)


EXAMPLE_FIELDS = tuple(f.name for f in fields(Example) if f.name != "sequences")
SEQUENCE_FIELDS = tuple(f.name for f in fields(Sequence))


def _column(values) -> np.ndarray:
    if isinstance(values, bytearray):
        return np.frombuffer(values, np.uint8)
    return np.frombuffer(values, values.typecode) if isinstance(values, array) and values else np.asarray(values)


class Examples(abc.Sequence):
    """The examples of several tables, end to end. Their rows are numbered on: `rows` has the number of the first row of
    each table."""

    def __init__(self, tables: list[Table], rows: list[int] | None = None):
        self.tables, self.rows = tables, rows or [0] * len(tables)
        self.starts = np.cumsum([0] + [len(t) for t in tables])
        self.tokens = np.concatenate([t.tokens for t in tables])
        """int64 [len], Example.tokens."""
        self.computed = np.concatenate([t.columns["computed"] for t in tables])
        """int64 [len], Example.computed."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"example {i} of {n}")
        i = int(i) % n
        k = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.tables[k].example(i - int(self.starts[k]), self.rows[k])

    def __eq__(self, other) -> bool:
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def put(self, name: str, values: torch.Tensor) -> None:
        """Set the numbers `name` ("reference_logprob") of every example from [examples, sequences of each]."""
        for table, a, b in zip(self.tables, self.starts, self.starts[1:]):
            table.put(name, values[int(a) : int(b)].double().reshape(-1).numpy())
