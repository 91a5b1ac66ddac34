# SPDX-License-Identifier: Apache-2.0
"""A run or one of its checkpoints as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from fastpost.hf import folder

from . import checkpoint
from .config import load_config
from .forward import load_policy
from .optim import AdamW

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def export(run: Path, out: Path, *, step: int | None = None, dtype: str | None = None) -> Path:
    """Write the model of `run` at checkpoint `step` (None: the final model, else the newest checkpoint) to `out`.

    dtype None = as the start model's files. In bf16 training a checkpoint also holds what bf16 cannot, so fp32 is
    exact. Raises ValueError when there is no such run or checkpoint, or `out` is not empty.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"[export] {run}: expected a run folder with config.yaml, found none. Give the folder that "
            "`fastpost train` wrote."
        )
    cfg = load_config(run / "config.yaml")
    kind = DTYPES[dtype] if dtype else None
    if step is None and (run / "model").is_dir():
        model = folder.load_model(run / "model", torch.float32, "sdpa", check=False)
        return folder.save_folder(model, run / "model", out, kind)
    found = {int(p.name[5:]): p for p in checkpoint.checkpoints(run / "checkpoints")}
    if not found:
        raise ValueError(f"[export] {run}: expected a model/ or a checkpoint, found neither yet. Let it train to one.")
    step = max(found) if step is None else step
    if step not in found:
        raise ValueError(
            f"[export] --step: expected one of {', '.join(map(str, sorted(found)))}, got {step}. Choose one of these."
        )
    model = load_policy(cfg, torch.device("cpu"))
    optimizer = AdamW(model, precision=cfg.optim.precision)
    checkpoint.load(found[step], model, optimizer)
    optimizer.widen()
    return folder.save_folder(model, cfg.model.path, out, kind)
