# SPDX-License-Identifier: Apache-2.0
"""Training state on disk: complete or not there at all.

    run/checkpoints/step-000010/{model,optimizer}.safetensors, state.json

A checkpoint is written under a temporary name, synced to the disk and renamed; only then are older ones deleted. A
crash, a kill or a full disk at any moment leaves the previous checkpoint as it was. safetensors and JSON only:
loading one runs no code.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = 1
_UNFINISHED = ".unfinished-"  # prefix of what is being written or deleted


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says what is left and what to do."""


def save(folder: Path, step: int, model: torch.nn.Module, optimizer, *, keep: int = 2) -> Path:
    """Write checkpoint `step` (the number of finished optimizer steps) into `folder`, keep the newest `keep`. Returns
    its path.

    Raises CheckpointError when the disk is full or fails; the previous checkpoint is untouched then and nothing is
    left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    final, draft = folder / f"step-{step:06d}", folder / f"{_UNFINISHED}step-{step:06d}"
    try:
        draft.mkdir()
        _write_tensors(draft / "model.safetensors", dict(_model_tensors(model)))
        _write_tensors(draft / "optimizer.safetensors", dict(optimizer.tensors()) | _random_tensors())
        write_text(
            draft / "state.json", json.dumps({"format": FORMAT, "step": step, "python_random": random.getstate()})
        )
        _sync(draft)
        if final.exists():
            _remove(final)
        os.rename(draft, final)
        _sync(folder)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        previous = latest(folder)
        left = f"The previous one, {previous}, is untouched" if previous else "There is no earlier one"
        raise CheckpointError(
            f"[checkpoint] step {step}: could not write {final}: {error}. {left}; the unfinished files are removed. "
            f"Free some space and start the same command again to go on from there."
        ) from error
    for old in checkpoints(folder)[:-keep]:
        _remove(old)
    return final


def space_warning(folder: Path, model: torch.nn.Module, optimizer) -> str | None:
    """One line if the disk of `folder` cannot hold one checkpoint: better said before the first hour than after it."""
    size = sum(t.nbytes for _, t in [*_model_tensors(model), *optimizer.tensors()])
    free = shutil.disk_usage(folder).free
    if free >= 1.05 * size:
        return None
    return (
        f"WARNING: a checkpoint takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free at {folder}: saving will fail"
    )


def load(path: Path, model: torch.nn.Module, optimizer) -> int:
    """Restore model, optimizer and random states in place, tensor by tensor. Returns the number of finished steps.

    Raises CheckpointError when the files are damaged or do not fit the model.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}, this version reads {FORMAT}")
        _read_tensors(path / "model.safetensors", dict(_model_tensors(model)))
        randoms = _read_tensors(path / "optimizer.safetensors", dict(optimizer.tensors()))
        version, words, gauss = state["python_random"]
        random.setstate((version, tuple(words), gauss))
        torch.set_rng_state(randoms["random.cpu"])
        if torch.cuda.is_available() and "random.cuda" in randoms:
            torch.cuda.set_rng_state(randoms["random.cuda"])
        return state["step"]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"[checkpoint] {path}: cannot be loaded: {error}. Delete that folder to go on from an earlier checkpoint."
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest(folder: Path) -> Path | None:
    return (checkpoints(folder) or [None])[-1]


def clean(folder: Path) -> None:
    """Remove what an interrupted save or deletion left behind."""
    for leftover in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that readers see the old content or the new, never a part."""
    draft = path.with_name(f"{_UNFINISHED}{path.name}")
    write_text(draft, text)
    os.replace(draft, path)


def _model_tensors(model: torch.nn.Module):
    """What training can change: trainable parameters (shared ones once) and persistent buffers. The rest is in the
    start model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield name, p.detach()
    for name, tensor in model.state_dict().items():
        if name not in parameters:
            yield name, tensor


def _random_tensors() -> dict[str, torch.Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    _sync(path)


def _read_tensors(path: Path, into: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy the file's tensors into `into` and return the others (random states)."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if missing := sorted(set(into) - names):
            raise ValueError(f"{path.name} lacks {missing[0]!r} ({len(missing)} in all); it belongs to another model")
        for name, tensor in into.items():
            stored = file.get_tensor(name)
            if stored.shape != tensor.shape or stored.dtype != tensor.dtype:
                raise ValueError(f"{name}: expected {_kind(tensor)}, got {_kind(stored)}; it belongs to another model")
            tensor.copy_(stored)
        return {name: file.get_tensor(name) for name in sorted(names - set(into))}


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _remove(path: Path) -> None:
    """Rename first: a half-deleted folder must not look like a checkpoint."""
    doomed = path.with_name(f"{_UNFINISHED}delete-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
