# SPDX-License-Identifier: Apache-2.0
"""The recipe as a JSON schema, for editors: names, types, choices, defaults and what each field means. Made from the
dataclasses and their docstrings, so it cannot go stale.

    fastpost train --schema > recipe.schema.json
    # yaml-language-server: $schema=recipe.schema.json      (first line of a recipe)
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from typing import Any, Literal, Union

from .config import Config, ObjectiveConfig


def schema() -> dict:
    """JSON schema (2020-12) that accepts what `load_config` accepts as a file, but for checks over several fields."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fastpost recipe",
        **_group(Config),
    }


def docs(cls: type) -> dict[str, str]:
    """Field -> the docstring under it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {
        entry.target.id: " ".join(doc.value.value.split())
        for entry, doc in itertools.pairwise(body)
        if isinstance(entry, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }


def _group(cls: type) -> dict:
    """A dataclass as an object; None stands for a group whose lines are all commented out."""
    texts, hints, properties = docs(cls), typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        made = _objective() if hints[field.name] is ObjectiveConfig else _kind(hints[field.name])
        if field.name in texts:
            made["description"] = texts[field.name]
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if not dataclasses.is_dataclass(default):
            made["default"] = list(default) if isinstance(default, tuple) else default
        properties[field.name] = made
    about = " ".join((cls.__doc__ or "").split())
    made = {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
    return made if about.startswith(f"{cls.__name__}(") else {"description": about} | made  # dataclass writes its own


def _kind(hint: Any) -> dict:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _group(hint)
    if origin in (Union, types.UnionType):
        choices = [_kind(a) for a in args if a is not type(None)]
        return {"anyOf": choices + ([{"enum": [None, "none"]}] if type(None) in args else [])}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is list:  # one alone may stand without brackets
        return {"anyOf": [{"type": "array", "items": _kind(args[0])}, _kind(args[0])]}
    if origin is tuple:
        return {"type": "array", "prefixItems": [_kind(a) for a in args], "minItems": len(args), "maxItems": len(args)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _kind(args[1])}
    simple = {float: "number", int: "integer", bool: "boolean"}
    if hint in simple:
        return {"type": simple[hint]}
    return {"type": ["string", "null"]} if hint is str else {}  # a path may be left open


def _objective() -> dict:
    """`name` beside the hyperparameters of the objective that it names."""
    from fastpost import objectives

    spellings = {key: sorted({key, *_spellings(kind)}) for key, kind in objectives.BY_NAME.items()}
    cases = []
    for key, kind in objectives.BY_NAME.items():
        properties = {"name": {"enum": spellings[key]}} | {f.name: _number(f) for f in dataclasses.fields(kind)}
        description = " ".join(kind.__doc__.split("\n\n")[0].split())
        cases.append(
            {
                "if": {"properties": {"name": {"enum": spellings[key]}}, "required": ["name"]},
                "then": {"description": description, "properties": properties, "additionalProperties": False},
            }
        )
    every = [name for names in spellings.values() for name in names]
    about = {"enum": every, "default": "sft", "description": docs(ObjectiveConfig)["name"]}
    return {
        "description": "The objective and its hyperparameters side by side.",
        "type": ["object", "null"],
        "properties": {"name": about},
        "allOf": cases,
    }


def _number(field: dataclasses.Field) -> dict:
    """A hyperparameter with its limits or choices, as the objective's own check has them."""
    if "choices" in field.metadata:
        return {"enum": list(field.metadata["choices"]), "default": field.default}
    words = {"above": "exclusiveMinimum", "below": "exclusiveMaximum", "least": "minimum", "most": "maximum"}
    limits = {words[name]: value for name, value in field.metadata.get("limits", {}).items()}
    return {"type": ["number", "null"] if field.default is None else "number", **limits, "default": field.default}


def _spellings(kind: type) -> list[str]:
    """The class's own name, and with dashes as recipes write it: LNDPO, ln-dpo."""
    dashed = {"LNDPO": ["ln-dpo"], "TwoPartSFT": ["two-part-sft"]}
    return [kind.__name__, *dashed.get(kind.__name__, [])]
