# SPDX-License-Identifier: Apache-2.0
"""Training state on disk: complete or not there at all.

    run/checkpoints/step-000010/shard-00001-model-00001-of-00002.safetensors, ..., state.json

Written by torch.distributed.checkpoint (DCP): each rank its own part, tensors that all ranks hold by one of them. With
DCP's Hugging Face storage, because its native one keeps the layout in a pickle: here files are safetensors, with the
place of a part in its header, and JSON. Loading one runs no code, and any number of ranks can load it.

A checkpoint is written under a temporary name, synced to the disk and renamed; only then are older ones deleted. A
crash, a kill or a full disk at any moment, on any rank, leaves the previous checkpoint as it was.

Names in it: model.*, optimizer.* and, for each rank that wrote it, random.{cpu,cuda,python}.RANK.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from .distributed import ALONE, Ranks

FORMAT = 2
FILE_BYTES = 2e9
"""Tensors of one rank go into files of about this size: one file at a time is copied to host memory."""
_UNFINISHED = ".unfinished-"  # prefix of what is being written or deleted


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says what is left and what to do."""


def save(folder: Path, step: int, model: torch.nn.Module, optimizer, *, keep: int = 2, ranks: Ranks = ALONE) -> Path:
    """Write checkpoint `step` (the number of finished optimizer steps) into `folder`, keep the newest `keep`. Returns
    its path. Every rank calls this.

    Raises CheckpointError, on every rank, when the disk is full or fails; the previous checkpoint is untouched then and
    nothing is left behind.
    """
    final, draft = folder / f"step-{step:06d}", folder / f"{_UNFINISHED}step-{step:06d}"
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder)
    ranks.gather(None)  # what an earlier failure left is gone before anyone writes
    try:
        _write_tensors(draft, tensors(model, optimizer) | _random_tensors(ranks), ranks)
        if ranks.first:
            state = {"format": FORMAT, "step": step, "ranks": ranks.size, "kind": ranks.kind}
            write_text(draft / "state.json", json.dumps(state))
            _sync(draft)
            if final.exists():
                _remove(final)
            os.rename(draft, final)
            _sync(folder)
    except BaseException as error:
        if ranks.first:
            shutil.rmtree(draft, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        previous = latest(folder)
        left = f"The previous one, {previous}, is untouched" if previous else "There is no earlier one"
        raise CheckpointError(
            f"[checkpoint] step {step}: could not write {final}: {error}. {left}; the unfinished files are removed. "
            f"Free some space and start the same command again to go on from there."
        ) from error
    if ranks.first:
        for old in checkpoints(folder)[:-keep]:
            _remove(old)
    ranks.gather(None)  # for the others it is complete, too, when this returns
    return final


def space_warning(folder: Path, model: torch.nn.Module, optimizer) -> str | None:
    """One line if the disk of `folder` cannot hold one checkpoint: better said before the first hour than after it."""
    size = sum(t.numel() * t.element_size() for t in tensors(model, optimizer).values())
    free = shutil.disk_usage(folder).free
    if free >= 1.05 * size:
        return None
    return (
        f"WARNING: a checkpoint takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free at {folder}: saving will fail"
    )


def load(path: Path, model: torch.nn.Module, optimizer, *, ranks: Ranks = ALONE) -> int:
    """Restore model and optimizer in place, whatever number of ranks wrote them, and the random states if it was this
    number. Returns the number of finished steps.

    Raises CheckpointError when the files are damaged or do not fit the model.
    """
    try:
        state = _state(path)
        stored = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        _read_tensors(path, tensors(model, optimizer), stored)
        if state["ranks"] == ranks.size:
            randoms = {name: t for name, t in _random_tensors(ranks).items() if name in stored}
            _read_tensors(path, randoms, stored)
            _set_random(randoms, ranks)
        return state["step"]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"[checkpoint] {path}: cannot be loaded: {error}. Delete that folder to go on from an earlier checkpoint."
        ) from error


def contents(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name, shape and dtype of each tensor of a checkpoint, whole, whatever number of ranks wrote it."""
    stored = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: (found.size, found.properties.dtype) for name, found in stored.items()}


def read(path: Path, names: list[str]) -> list[torch.Tensor]:
    """Some tensors of a checkpoint, whole. Raises CheckpointError when a file is damaged."""
    try:
        stored = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        into = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in names}
        _read_tensors(path, into, stored)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"[checkpoint] {path}: cannot be read: {error}. Leave that checkpoint out.") from error
    return list(into.values())


def resharded(path: Path, ranks: Ranks) -> str:
    """What to add to "resume from `path`" when it was written by other ranks than these, else "". It loads."""
    state = _state(path)
    if (state["ranks"], state["kind"]) == (ranks.size, ranks.kind):
        return ""
    return (
        f"; it was written by {state['ranks']} ranks ({state['kind']}), now there are {ranks.size} ({ranks.kind}): "
        "weights and optimizer are exact, rows and their order stay the same, sums round differently"
    )


def _state(path: Path) -> dict:
    state = json.loads((path / "state.json").read_text())
    if state["format"] != FORMAT:
        raise ValueError(f"format {state['format']}, this version reads {FORMAT}")
    return state


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


def tensors(model: torch.nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """The live tensors of a checkpoint by name; DTensors are parts of a whole that has that name on every rank.

    What training can change: trainable parameters (shared ones once), persistent buffers, the optimizer's state. The
    rest is in the start model."""
    found = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found |= {f"model.{name}": t for name, t in model.state_dict().items() if name not in parameters}
    return found | {f"optimizer.{name}": t for name, t in optimizer.tensors()}


def _random_tensors(ranks: Ranks) -> dict[str, torch.Tensor]:
    """The random states of this rank, as tensors of its own."""
    version, words, gauss = random.getstate()
    states = {"cpu": torch.get_rng_state()}
    states["python"] = torch.tensor([version, *words, math.nan if gauss is None else gauss], dtype=torch.float64)
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"random.{name}.{ranks.rank}": t for name, t in states.items()}


def _set_random(states: dict[str, torch.Tensor], ranks: Ranks) -> None:
    version, *words, gauss = states[f"random.python.{ranks.rank}"].tolist()
    random.setstate((int(version), tuple(map(int, words)), None if math.isnan(gauss) else gauss))
    torch.set_rng_state(states[f"random.cpu.{ranks.rank}"])
    if f"random.cuda.{ranks.rank}" in states:
        torch.cuda.set_rng_state(states[f"random.cuda.{ranks.rank}"])


def _write_tensors(folder: Path, tensors: dict[str, torch.Tensor], ranks: Ranks) -> None:
    """All ranks write their parts into `folder` and sync them. Raises, on every rank, what went wrong on one."""
    files, used = {}, 0.0
    for of_rank in ranks.gather([(name, t.numel() * t.element_size()) for name, t in tensors.items()]):
        for name, size in of_rank:
            if name not in files:
                files[name] = 1 + int(used // FILE_BYTES)
                used += size / ranks.size
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process is alone
            dcp.save(tensors, storage_writer=writer, no_dist=ranks.size == 1)
    except CheckpointException as error:  # a BaseException
        raise _cause(error) from error


def _read_tensors(path: Path, into: dict[str, torch.Tensor], stored: dict) -> None:
    """Fill this rank's part of each tensor of `into` from the files, whose contents are `stored`. No rank waits for
    another."""
    if missing := sorted(set(into) - set(stored)):
        raise ValueError(f"it lacks {missing[0]!r} ({len(missing)} in all); it belongs to another model")
    for name, tensor in into.items():
        found = stored[name]
        if found.size != tensor.shape or found.properties.dtype != tensor.dtype:
            kinds = _kind(tensor.dtype, tensor.shape), _kind(found.properties.dtype, found.size)
            raise ValueError(f"{name}: expected {kinds[0]}, got {kinds[1]}; it belongs to another model")
        if sum(chunk.sizes.numel() for chunk in found.chunks) != tensor.numel():
            raise ValueError(f"{name}: a part of it is missing; a file was deleted")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    except CheckpointException as error:
        raise _cause(error) from error


def _cause(error: BaseException) -> Exception:
    """The first rank's own exception inside DCP's; a SafetensorError and the like where that is how a disk fails."""
    cause = next(iter(error.failures.values()))[0]
    return cause if isinstance(cause, Exception) else RuntimeError(str(cause))


def _kind(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


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
