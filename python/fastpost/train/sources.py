# SPDX-License-Identifier: Apache-2.0
"""data.train as a list: several files with their shares of the tokens. Needs no torch, like config.py."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass

from fastpost.train.strict import convert

if typing.TYPE_CHECKING:
    from fastpost.train.config import DataConfig


@dataclass
class Source:
    """One of several sources of data.train. A field left None has the value of the same field of `data`."""

    path: str = ""
    """A .jsonl, .json or .parquet file."""
    ratio: float | list[float] = 1.0
    """Its share of an epoch's tokens, relative to the other ratios; they need not sum to 1. A list has one for each
    epoch, the last of which holds from there on, and may have zeros."""
    repeat: bool = False
    """What happens when an epoch wants more tokens than there are: True = the source is read again, False = an
    error."""
    shuffle: bool | None = None
    """False = its rows come in file order, e.g. from easy to hard."""
    columns: dict[str, str] | None = None
    format: str | None = None
    mask: str | None = None
    pack: str | None = None
    limit: int | None = None


OPEN = ("shuffle", "columns", "format", "mask", "pack", "limit")
"""The fields that DataConfig has, too."""


def sources_of(data: DataConfig) -> list[Source]:
    """data.train as a list (one source for a plain path), every field that a source leaves open filled in from
    `data`."""
    sources = data.train if isinstance(data.train, list) else [Source(str(data.train))]
    return [dataclasses.replace(s, **{n: getattr(data, n) for n in OPEN if getattr(s, n) is None}) for s in sources]


def config_of(data: DataConfig, source: Source) -> DataConfig:
    """The settings by which the rows of `source` (from sources_of) are read."""
    return dataclasses.replace(data, train=source.path, **{n: getattr(source, n) for n in OPEN})


def check_sources(data: DataConfig, where: str) -> None:
    """Raise ValueError naming the entry of data.train that is wrong; `where` is the file or the command line."""
    kinds = typing.get_type_hints(type(data))
    for i, source in enumerate(data.train):
        name = f"data.train[{i}]"
        if not source.path:
            raise ValueError(f"{where}: {name}.path: expected a path, got nothing. Every source names its file.")
        ratios = source.ratio if isinstance(source.ratio, list) else [source.ratio]
        if isinstance(source.ratio, list) and any(source.ratio):  # zeros are for the epochs that do without it
            ratios = [r for r in ratios if r]
        if not ratios or not all(0 < r < float("inf") for r in ratios):
            raise ValueError(
                f"{where}: {name}.ratio: expected a number above 0, got {source.ratio}. Leave a source out to skip it."
            )
        if source.limit is not None and source.limit < 1:
            raise ValueError(f"{where}: {name}.limit: expected at least 1, got {source.limit}.")
        for key in ("format", "mask", "pack"):
            if getattr(source, key) is not None:
                convert(getattr(source, key), kinds[key], f"{name}.{key}", where)
    lists = [s.ratio if isinstance(s.ratio, list) else [s.ratio] for s in data.train]
    for epoch in range(max(map(len, lists))):
        if not any(ratios[min(epoch, len(ratios) - 1)] for ratios in lists):
            raise ValueError(
                f"{where}: data.train: expected a source with a ratio above 0 in each epoch, got none in epoch "
                f"{epoch + 1}. Give one of them a ratio there."
            )
