# SPDX-License-Identifier: Apache-2.0
"""The mean of several checkpoints' weights, read tensor by tensor, and how far each layer has moved."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open

from fastpost.hf import folder

from . import checkpoint
from .parameters import Parameters, layer
from .rounding import join

FINAL = "final"
"""What the finished model of a run is called beside the step numbers of its checkpoints."""


def sources(run: Path, which: str) -> list[Path]:
    """The folders that `which` names, oldest first: "last:6", or steps such as "100,200,final".

    The finished model is the newest. Raises ValueError when there are too few, or a step is missing or named twice.
    """
    found = {p.name[5:].lstrip("0") or "0": p for p in checkpoint.checkpoints(run / "checkpoints")}
    if (run / "model").is_dir():
        found[FINAL] = run / "model"
    there = f"It has {', '.join(found) or 'none'}; train.keep_latest says how many checkpoints are kept."
    if last := re.fullmatch(r"last:(\d+)", which):
        if not 1 <= int(last[1]) <= len(found):
            raise ValueError(f"[export] --average: expected at most {len(found)} checkpoints, got '{which}'. {there}")
        return list(found.values())[-int(last[1]) :]
    steps = [s.strip() for s in which.split(",")]
    if unknown := [s for s in steps if s not in found]:
        raise ValueError(
            f"[export] --average: expected last:N or steps of this run, got '{unknown[0]}' in '{which}'. {there}"
        )
    if len(set(steps)) < len(steps):
        raise ValueError(f"[export] --average: '{which}' names a checkpoint twice. Name each once.")
    return [found[s] for s in found if s in steps]


@torch.no_grad()
def fill(model: torch.nn.Module, folders: list[Path]) -> None:
    """Give every trainable parameter of `model` the mean over `folders` of its float32 master weights, as float32.

    Summed in float64, one tensor at a time, and rounded once: equal checkpoints give themselves, w and -w give 0. A
    finished model counts as its files hold it, which may be in bf16. Raises ValueError when a folder lacks a tensor.
    """
    stored = [_Stored(path) for path in folders]
    parameters = Parameters(model)
    for name, p in parameters.items():
        if p.requires_grad:
            total = torch.zeros(p.shape, dtype=torch.float64)
            for path, one in zip(folders, stored, strict=True):
                wide = one.read(parameters.names(p))
                if wide is None or wide.shape != p.shape:
                    raise ValueError(f"[export] --average: {path} has no {name} {list(p.shape)}. Leave it out.")
                total += wide
            p.data = (total / len(stored)).float().to(p.device)


def layer_updates(model: torch.nn.Module, start: torch.nn.Module) -> list[float]:
    """|w - w_0| / |w_0| of each layer, all of its parameters as one vector, norms in float64."""
    squares: dict[int, list[float]] = {}
    began = dict(start.named_parameters())
    for name, p in model.named_parameters():
        if (number := layer(name)) is not None:
            w, w_0 = p.detach().double(), began[name].detach().double()
            moved, size = squares.setdefault(number, [0.0, 0.0])
            squares[number] = [moved + float((w - w_0).square().sum()), size + float(w_0.square().sum())]
    return [(moved / size) ** 0.5 for _, (moved, size) in sorted(squares.items())]


def report(updates: list[float]) -> str:
    """`layer_updates` as text, with the means of the bottom and top 5 layers (half of them, when there are fewer than
    10) and their ratio, which tells of a stability gap: above 1 the bottom layers move more (arXiv 2406.14833)."""
    count = min(5, len(updates) // 2)
    lines = ["update of each layer, |w - w_0| / |w_0|:"]
    lines += [f"  layer {i:3d}  {value:.3e}" for i, value in enumerate(updates)]
    if count:
        bottom, top = sum(updates[:count]) / count, sum(updates[-count:]) / count
        ratio = f"ratio {bottom / top:.3f}" if top else "the top ones did not move"
        lines.append(f"bottom {count}  {bottom:.3e}   top {count}  {top:.3e}   {ratio}")
    return "\n".join(lines)


class _Stored:
    """The float32 weights of a checkpoint or of a model folder, tensor by tensor."""

    def __init__(self, path: Path):
        self.path = path
        if (path / "state.json").exists():
            self.names, self.files = set(checkpoint.contents(path)), {}
        else:
            opened = [safe_open(file, framework="pt") for file in folder.weight_files(path)]
            self.files = {name: file for file in opened for name in list(file.keys())}
            self.names = set(self.files)

    def read(self, names: list[str]) -> torch.Tensor | None:
        """The master weight under the first of `names` that is there."""
        if self.files:
            name = next((n for n in names if n in self.names), None)
            return None if name is None else self.files[name].get_tensor(name).float()
        name = next((n for n in names if f"model.{n}" in self.names), None)
        if name is None:
            return None
        remainder = f"optimizer.remainder.{name}"
        if remainder in self.names:
            return join(*checkpoint.read(self.path, [f"model.{name}", remainder]))
        return checkpoint.read(self.path, [f"model.{name}"])[0].float()
