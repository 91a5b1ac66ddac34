# SPDX-License-Identifier: Apache-2.0
"""Held-out loss, margin and accuracy, through the same operators as training."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from fastpost import objectives
from fastpost.data.collate import Batch
from fastpost.data.loader import load_dataset
from fastpost.hf import adapter, folder

from . import reference, routers
from .config import Config
from .device import pick_device
from .distributed import ALONE, Ranks, Turns
from .forward import base_format, forward, lengths, start_model, start_of
from .metrics import Sums, add_output
from .mismatched import Mismatched, given
from .optim import COMPUTE_DTYPE
from .progress import progress


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, objective, batches: Iterable[Batch], temperature: float = 1.0, *,
    idle: Iterable[Batch] = (), ranks: Ranks = ALONE,
) -> dict[str, float]:  # fmt: skip
    """Means over all rows of the `batches` of all ranks under TRL's names, plus `rows`, their number. `loss`,
    `aux_loss` and the like mean what they do in training. The model's mode and state are left alone. `idle`: see
    train_step."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    sums, rows = Sums(), 0
    try:
        for batch in batches:
            count = float(objective.count(lengths(batch)))
            batch = batch.to(device)
            add_output(sums, objective, batch, forward(model, batch, objective, temperature), count)
            rows += len(batch.rows)
        for batch in idle:
            forward(model, batch.to(device), objective, temperature)
    finally:
        model.train(was_training)
    rows = int(ranks.sum(rows))
    if not rows:
        raise ValueError("[evaluate] batches: expected at least one row, got none.")
    means = sums.means(ranks)
    means["loss"] += routers.share(model, means)
    return means | {"rows": rows}


def evaluate_config(cfg: Config, path: Path | None = None) -> dict[str, float]:
    """`evaluate` with a recipe's objective and held-out rows (its training rows when it has none) of the model at
    `path`.

    `path`: a model, adapter or run folder; None = what the recipe starts from. An objective with a reference measures
    against the recipe's: `start` is what the recipe starts from.
    """
    device, dtype = pick_device(cfg.train.device), COMPUTE_DTYPE[cfg.optim.precision]
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
    sources = reference.sources(cfg.model, objective)
    tokenizer = folder.load_tokenizer(cfg.model.path)
    data = load_dataset(
        cfg.data,
        tokenizer,
        objective,
        path=cfg.data.eval or cfg.data.train,
        require=reference.columns(objective, sources),
    )
    rows = list(range(len(data)))
    parts = data.micro_batches(rows, cfg.train.max_tokens_per_micro_batch, cfg.train.micro_batch_size)

    def load(place: folder.Place) -> torch.nn.Module:
        if place == start and cfg.model.from_scratch:
            return start_model(cfg, dtype).to(device)
        model = adapter.load_place(place, dtype, cfg.model.attention)
        if place == start and place.adapter is None:
            base_format(cfg.model).apply(model)
        return model.to(device)

    start, to_stderr = start_of(cfg.model), partial(print, file=sys.stderr, flush=True)
    others, whole = Mismatched(cfg, objective, sources, {"eval": data}), {"eval": parts}
    reference.attach(
        cfg,
        sources,
        {"eval": data} | others.data,
        whole | others.parts(whole),
        None,
        lambda: load(start),
        say=to_stderr,
    )
    model = load(folder.locate(path) if path else start)
    routers.attach(model, *routers.asked(cfg.model))
    batches = map(data.batch, progress(parts, "evaluate", unit="batches"))
    kl = others.estimate(model, "eval", Turns(parts, []))
    values = evaluate(model, objective, given(batches, kl), cfg.model.temperature)
    return values if kl is None else values | {"kl": kl}
