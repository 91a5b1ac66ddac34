# SPDX-License-Identifier: Apache-2.0
"""Held-out loss, margin and accuracy, through the same operators as training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from fastpost import objectives
from fastpost.data.collate import Batch
from fastpost.data.loader import load_dataset
from fastpost.hf import folder

from . import reference
from .config import Config
from .device import pick_device
from .distributed import ALONE, Ranks
from .forward import forward, lengths
from .metrics import Sums, add_output
from .optim import COMPUTE_DTYPE


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, objective, batches: Iterable[Batch], *, idle: Iterable[Batch] = (), ranks: Ranks = ALONE
) -> dict[str, float]:
    """Means over all rows of the `batches` of all ranks under TRL's names, plus `rows`, their number. The model's mode
    and state are left alone. `idle`: see train_step."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    sums, rows = Sums(), 0
    try:
        for batch in batches:
            count = float(objective.count(lengths(batch)))
            batch = batch.to(device)
            add_output(sums, objective, batch, forward(model, batch, objective), count)
            rows += len(batch.rows)
        for batch in idle:
            forward(model, batch.to(device), objective)
    finally:
        model.train(was_training)
    rows = int(ranks.sum(rows))
    if not rows:
        raise ValueError("[evaluate] batches: expected at least one row, got none.")
    return sums.means(ranks) | {"rows": rows}


def evaluate_config(cfg: Config, path: Path | None = None) -> dict[str, float]:
    """`evaluate` with a recipe's objective and held-out rows (its training rows when it has none) of the model at
    `path`.

    path None = model.path. An objective with a reference measures against the recipe's: `start` is model.path.
    """
    device, dtype = pick_device(cfg.train.device), COMPUTE_DTYPE[cfg.optim.precision]
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
    source = reference.source(cfg.model.reference, objective)
    tokenizer = folder.load_tokenizer(cfg.model.path)
    data = load_dataset(
        cfg.data,
        tokenizer,
        objective,
        path=cfg.data.eval or cfg.data.train,
        require=reference.columns(objective, source),
    )
    rows = list(range(len(data)))
    parts = data.micro_batches(rows, cfg.train.max_tokens_per_micro_batch, cfg.train.micro_batch_size)

    def load(path):
        return folder.load_model(path, dtype, cfg.model.attention).to(device)

    if source not in ("none", "columns"):
        frozen = load(cfg.model.path if source == "start" else source)
        reference.fill(data, reference.logprobs(frozen, data, parts))
        del frozen
    return evaluate(load(path or cfg.model.path), objective, map(data.batch, parts))
