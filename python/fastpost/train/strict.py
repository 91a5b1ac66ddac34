# SPDX-License-Identifier: Apache-2.0
"""YAML into dataclasses, strictly: unknown keys, repeated keys and wrong types are errors that name the place and the
remedy."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

import yaml


class Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice: plain YAML would keep the last one without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: key '{key}' is written twice. Keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """SafeDumper that writes 1e-06 as 1.0e-06, which every YAML reader takes for a float."""


def _represent_float(dumper: yaml.SafeDumper, value: float):
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


Dumper.add_representer(float, _represent_float)


def read_yaml(path: Path, groups: list[str]) -> dict:
    """The file's mapping; `groups` are named when it is none. Raises ValueError with file and line."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(
            f"{path}: expected YAML, got a mistake{line}: {error.problem}. Look at indentation and colons there."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got byte {error.start} that is none. Save it as UTF-8.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path}: expected groups ({', '.join(groups)}), got {_kind(tree)}. `fastpost recipes cp NAME` writes a "
            "recipe to start from."
        )
    return tree


def build(cls: type, tree: dict, prefix: str, where: str):
    """An instance of dataclass `cls` from `tree`, with every key and type checked."""
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise ValueError(f"{where}: unknown key '{name}'.{suggest(str(key), names(cls))}")
        if dataclasses.is_dataclass(hints[key]):
            if value is None:  # "optim:" with every line below it commented out
                value = {}
            if not isinstance(value, dict):
                raise ValueError(
                    f"{where}: {name}: expected a group of keys, got {_kind(value)}. Write its keys below it."
                )
            values[key] = build(hints[key], value, f"{name}.", where)
        else:
            values[key] = convert(value, hints[key], name, where)
    return cls(**values)


def convert(value: Any, kind: Any, name: str, where: str) -> Any:
    """`value` as the declared type `kind`; a number may be written as a string (PyYAML reads 1e-6 as one)."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        kinds = [a for a in args if a is not type(None)]
        # YAML's own word is null, but Python's is what people type.
        if len(kinds) < len(args) and (value is None or value in ("none", "None")):
            return None
        for choice in kinds:
            try:
                return convert(value, choice, name, where)
            except ValueError:
                if len(kinds) == 1 or (isinstance(value, list) and typing.get_origin(choice) is list):
                    raise
    if kind is Any:
        return plain(value)
    if kind is str and value is None:  # "path:" left open in a recipe
        return ""
    if origin is Literal:
        if value in args:
            return value
        raise ValueError(
            f"{where}: {name}: expected one of {', '.join(args)}; got {value!r}.{suggest(str(value), args)}"
        )
    if origin is dict:
        if isinstance(value, dict):
            return {
                convert(k, args[0], name, where): convert(v, args[1], f"{name}.{k}", where) for k, v in value.items()
            }
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return build(kind, value, f"{name}.", where)
    elif origin is list:  # one alone may stand without brackets
        values = value if isinstance(value, (list, tuple)) else [] if value in (None, "", "none", "None") else [value]
        if not isinstance(value, dict):
            return [convert(v, args[0], f"{name}[{i}]", where) for i, v in enumerate(values)]
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and len(value) == len(args):
            return tuple(convert(v, a, f"{name}[{i}]", where) for i, (v, a) in enumerate(zip(value, args, strict=True)))
    elif kind is float:
        value = plain(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif kind is int:
        value = plain(value)
        if isinstance(value, float) and value.is_integer():  # 1e4 steps
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif origin is None and isinstance(value, kind):  # str and bool as they are
        return value
    raise ValueError(f"{where}: {name}: expected {_type_name(kind)}, got {_kind(value)} {value!r}.{_example(kind)}")


def plain(value: Any) -> Any:
    """A string that spells a number becomes that number; everything else stays."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                pass
    return value


def suggest(word: str, choices) -> str:
    """' Did you mean ...?' for the nearest choice, or ' Known: ...' when none is near."""
    choices = sorted(choices)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(choices)}."


def names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _kind(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "a string", bool: "a truth value", type(None): "nothing (null)"}
    return kinds.get(type(value), f"a number ({type(value).__name__})")


def _example(kind: Any) -> str:
    """' Write ...', where there is something to write."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f" Write [{', '.join(['0.9', '0.999', '0.5'][: len(args)])}]."
    words = {float: "a number such as 1e-6", int: "a number such as 8", bool: "true or false", dict: "{ours: theirs}"}
    word = words.get(typing.get_origin(kind) or kind)
    return f" Write {word}." if word else ""


def _type_name(kind: Any) -> str:
    kinds = {float: "a number", int: "a whole number", str: "a string", bool: "true or false", dict: "a mapping"}
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in args if a is not type(None))
    if origin is tuple:
        return f"a list of {len(args)} numbers"
    if origin is list:
        kinds = {str: "strings", int: "numbers", float: "numbers"}
        return f"a list of {'mappings' if dataclasses.is_dataclass(args[0]) else kinds.get(args[0], 'names')}"
    if dataclasses.is_dataclass(kind):
        return f"a mapping of {', '.join(names(kind))}"
    return kinds.get(origin or kind, str(kind))
