# SPDX-License-Identifier: Apache-2.0
"""What is kept of a run: a file for each finished block, and the hidden states that the next one begins with."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastpost.int4 import Int4Weight, NestedScales

from .blocks import Hidden

INT4 = ("codes", "scales", "zeros", "order")
NESTED = tuple(f.name for f in fields(NestedScales))


@dataclass
class Layer:
    """A finished block.

    Fields:
        tensors: name in the block -> tensor as it will be stored; the weights that are in `int4` are not among them.
        int4: name of a linear layer -> its four-bit weight.
        report: name of a linear layer -> {"bits", "code_bits", "error", "weights"}: bits a weight, relative error of
            the matrix (‖Ŵ - W‖ / ‖W‖), number of weights.
    """

    tensors: dict[str, torch.Tensor]
    int4: dict[str, Int4Weight] = field(default_factory=dict)
    report: dict[str, dict] = field(default_factory=dict)

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of the block by its name, four-bit weights as float32."""
        return self.tensors | {f"{name}.weight": weight.dequantize() for name, weight in self.int4.items()}


def write_layer(file: Path, layer: Layer) -> None:
    """Write `file`, whole or not at all."""
    tensors, facts = {f"tensor:{name}": t.cpu() for name, t in layer.tensors.items()}, {}
    for name, weight in layer.int4.items():
        facts[name] = {"columns": weight.columns, "group_size": weight.group_size, "scheme": weight.scheme}
        parts = {part: getattr(weight, part) for part in INT4}
        if weight.nested is not None:
            parts |= {f"nested.{part}": getattr(weight.nested, part) for part in NESTED}
        tensors |= {f"int4:{name}:{part}": t.cpu() for part, t in parts.items() if t is not None}
    metadata = {"int4": json.dumps(facts), "report": json.dumps(layer.report)}
    _save({name: t.contiguous().clone() for name, t in tensors.items()}, file, metadata)


def read_layer(file: Path) -> Layer:
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    int4 = {}
    for name, facts in json.loads(metadata["int4"]).items():
        parts = {k.split(":")[2]: t for k, t in tensors.items() if k.startswith(f"int4:{name}:")}
        nested = None
        if "nested.table" in parts:
            nested = NestedScales(**{part: parts[f"nested.{part}"] for part in NESTED})
        int4[name] = Int4Weight(
            parts["codes"], parts["scales"], parts.get("zeros"), facts["columns"], facts["group_size"], facts["scheme"],
            order=parts.get("order"), nested=nested,
        )  # fmt: skip
    plain = {k.removeprefix("tensor:"): t for k, t in tensors.items() if k.startswith("tensor:")}
    return Layer(plain, int4, json.loads(metadata["report"]))


def read_report(file: Path) -> dict[str, dict]:
    """Layer.report alone, without its tensors."""
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["report"])


def write_hidden(file: Path, hidden: Hidden) -> None:
    _save({f"{i:06d}": row for i, row in enumerate(hidden)}, file)


def read_hidden(file: Path) -> Hidden:
    with safe_open(file, "pt") as opened:
        return [opened.get_tensor(key) for key in sorted(opened.keys())]


def _save(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    aside = file.with_name(file.name + ".new")
    save_file(tensors, aside, metadata=metadata)
    os.replace(aside, file)
