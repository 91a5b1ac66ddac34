# SPDX-License-Identifier: Apache-2.0
"""What a finished run leaves: model/ as a Hugging Face folder or adapter/ as a peft folder; the average beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from fastpost.hf import adapter, folder

from . import checkpoint
from .config import Config
from .distributed import ALONE, Ranks
from .forward import wider_than_bf16
from .freezing import frozen_names
from .run_folder import RunFolder


def write(cfg: Config, run: RunFolder, model: torch.nn.Module, optimizer, ranks: Ranks = ALONE) -> Path:
    """Write the folder and return it. Ends training: the optimizer's state is dropped. All ranks call this: the first
    writes, and of a sharded model the others give it their parts.

    Raises CheckpointError when the disk is full or fails, naming what the run can go on from.
    """
    adapted, place, unchanged = adapter.is_adapted(model), folder.locate(cfg.model.path), frozen_names(model)
    out = run.adapter if adapted else run.model

    def save(to: Path) -> None:
        if not ranks.first:
            if ranks.sharded and adapted:
                adapter.give_parts(model)
            elif ranks.sharded:
                folder.give_parts(model, place.base, unchanged)
        elif adapted:
            adapter.save(model, place.base, to, tokenizer=place.tokenizer)
        else:
            folder.save_folder(model, place.base, to, unchanged=unchanged)

    try:
        if optimizer.ema is not None:
            if ranks.first:
                shutil.rmtree(average(out), ignore_errors=True)  # of an end that was cut short
            with optimizer.ema.applied(torch.float32):
                save(average(out))
        if adapted or cfg.model.from_scratch or wider_than_bf16(place.base):
            optimizer.widen()
        optimizer.drop()
        save(out)
    except (OSError, SafetensorError) as error:
        begin = checkpoint.latest(run.checkpoints) or "the beginning (train.save_every is 0)"
        raise checkpoint.CheckpointError(
            f"[train] {out}: the final model could not be written: {error}. Free some space and start the same "
            f"command again: it goes on from {begin}."
        ) from error
    return out


def average(out: Path) -> Path:
    """The folder of the moving average (optim.ema) beside a run's model/ or adapter/."""
    return out.with_name(f"{out.name}-ema")
