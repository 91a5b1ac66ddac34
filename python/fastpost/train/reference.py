# SPDX-License-Identifier: Apache-2.0
"""Log-probs under the reference: computed once before training, one float32 per sequence, so no second model stays in
memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastpost.data.loader import Dataset
from fastpost.objectives import SFT

from .distributed import ALONE, Ranks, Turns
from .forward import forward


def source(reference: str, objective) -> str:
    """Resolve model.reference to none | start | columns | a path. Raises ValueError when the objective needs one and
    gets none."""
    if not objective.needs_reference:
        return "none"
    if reference == "none":
        raise ValueError(
            f"[train] model.reference: {objective.name} needs log-probs of a reference, got 'none'. Use start (the "
            "model as loaded), columns (reference_* columns of the data) or the path of a model folder."
        )
    return "start" if reference == "auto" else reference


def columns(objective, source: str) -> tuple[str, ...]:
    """The numbers that every row of the data must bring along."""
    needs = {
        "reference_logprob": source == "columns",
        "previous_logprob": objective.needs_previous,
        "reward": objective.needs_reward and objective.paired,  # single replies may have a label instead
    }
    return tuple(name for name, needed in needs.items() if needed)


def attach(
    data: dict[str, Dataset],
    turns: dict[str, Turns],
    table: Path,
    model: Callable[[], torch.nn.Module],
    ranks: Ranks = ALONE,
) -> None:
    """Set reference_logprob on every example of `data`, from the file `table`, or from `model()` and then written to
    `table`.

    `turns`: this rank's micro-batches; those of all ranks cover each dataset once. Taking those of the first epoch
    makes the policy's first log-probs equal the reference to the last bit, because both see the same packing.
    """
    if not ranks.from_first(table.exists):
        frozen = model()
        tensors = {name: logprobs(frozen, data[name], turns[name].mine, turns[name].idle, ranks) for name in data}
        del frozen
        if ranks.first:
            draft = table.with_name(f".unfinished-{table.name}")
            save_file(tensors, draft)
            os.replace(draft, table)
        ranks.gather(None)  # it is there
    with safe_open(table, framework="pt") as file:
        for name, dataset in data.items():
            values = file.get_tensor(name)
            if len(values) != len(dataset):
                raise ValueError(
                    f"[train] {table}: expected {len(dataset)} rows for '{name}', got {len(values)}. The data changed "
                    "since this run began: start it in another folder."
                )
            fill(dataset, values)


def fill(dataset: Dataset, values: torch.Tensor) -> None:
    """Set reference_logprob of each example from a row of `values` [examples, sequences of each]."""
    pairs = zip(dataset.examples, values.tolist(), strict=True)
    dataset.examples[:] = [replace(example, reference_logprob=tuple(row)) for example, row in pairs]


@torch.no_grad()
def logprobs(
    model: torch.nn.Module,
    dataset: Dataset,
    parts: list[list[int]],
    idle: list[list[int]] = (),
    ranks: Ranks = ALONE,
) -> torch.Tensor:
    """Summed log-probs, float32 [examples, sequences of each], computed in the micro-batches `parts` of all ranks.
    `idle`: see train_step. A row in no micro-batch is NaN."""
    device = next(model.parameters()).device
    model.eval()
    out = torch.full((len(dataset), len(dataset.examples[0].sequences)), torch.nan)
    for part in parts:
        logprob = forward(model, dataset.batch(part).to(device), SFT()).logprob
        out[part] = logprob.float().cpu().view(len(part), -1)
    for part in idle:
        forward(model, dataset.batch(part).to(device), SFT())
    own = sorted(row for part in parts for row in part)
    for rows, values in ranks.gather((own, out[own])):
        out[rows] = values
    return out
