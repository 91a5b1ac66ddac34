# SPDX-License-Identifier: Apache-2.0
"""A run or one of its checkpoints as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from fastpost.hf import folder

from . import averaging, checkpoint
from .config import Config, load_config
from .forward import load_policy
from .freezing import frozen_names
from .optim import AdamW

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    ema: bool = False,
    average: str | None = None,
    updates: bool = False,
) -> Path:
    """Write the model of `run` at checkpoint `step` (None: the final model, else the newest checkpoint) to `out`.

    ema: the moving average of its weights instead. average: the mean of several checkpoints, see averaging.sources.
    updates: also print how far each layer has moved from the start model. dtype None = as the start model's files. In
    bf16 training a checkpoint also holds what bf16 cannot, so fp32 is exact. Raises ValueError when there is no such
    run or checkpoint, or `out` is not empty.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"[export] {run}: expected a run folder with config.yaml, found none.")
    cfg = load_config(run / "config.yaml")
    if ema and cfg.optim.ema is None:
        raise ValueError(f"[export] --ema: {run} kept no average of its weights (optim.ema is none). Leave --ema out.")
    if average is not None and (ema or step is not None):
        raise ValueError("[export] --average: names its checkpoints itself. Leave --step and --ema out.")
    source, final = Path(cfg.model.path), run / ("model-ema" if ema else "model")
    if average is not None:
        model, _ = _started(cfg)
        averaging.fill(model, averaging.sources(run, average))
    elif step is None and (run / "model").is_dir():
        model, source = folder.load_model(final, torch.float32, "sdpa", check=False), final
    else:
        model = _at_checkpoint(run, cfg, step, ema)
    if updates:
        start = folder.load_model(cfg.model.path, torch.float32, "sdpa", check=False)
        print(averaging.report(averaging.layer_updates(model, start)))
    return folder.save_folder(model, source, out, DTYPES[dtype] if dtype else None, unchanged=frozen_names(model))


def _at_checkpoint(run: Path, cfg: Config, step: int | None, ema: bool) -> torch.nn.Module:
    found = {int(p.name[5:]): p for p in checkpoint.checkpoints(run / "checkpoints")}
    if not found:
        raise ValueError(f"[export] {run}: has no model/ and no checkpoint yet.")
    step = max(found) if step is None else step
    if step not in found:
        raise ValueError(f"[export] --step: expected one of {', '.join(map(str, sorted(found)))}, got {step}.")
    model, optimizer = _started(cfg)
    checkpoint.load(found[step], model, optimizer)
    optimizer.widen(ema=ema)
    return model


def _started(cfg: Config) -> tuple[torch.nn.Module, AdamW]:
    """The start model and its optimizer, for a checkpoint to be loaded into."""
    model = load_policy(cfg, torch.device("cpu"))
    return model, AdamW.from_config(model, cfg)
