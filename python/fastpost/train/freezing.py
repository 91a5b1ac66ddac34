# SPDX-License-Identifier: Apache-2.0
"""Training a part of a model. A frozen parameter has no gradient and no optimizer state, and is in no checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpost.nn.int4_packed import stands_for

from .parameters import Parameters


def freeze(model: torch.nn.Module, train: Sequence[str], frozen: Sequence[str]) -> None:
    """Of the parameters that are trainable now, keep those that a pattern of `train` matches (all, when it is empty)
    and that no pattern of `frozen` does. Nothing frozen is thawed, so with an adapter only its own weights are meant.

    Patterns: see Parameters.select. Raises ValueError when one matches nothing, or when nothing is left to train.
    """
    parameters = Parameters(model)
    kept = {name for pattern in train for name in parameters.select(pattern, "model.train")}
    dropped = {name for pattern in frozen for name in parameters.select(pattern, "model.freeze")}
    for name, p in parameters.items():
        if (train and name not in kept) or name in dropped:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"[train] model.freeze: {', '.join(frozen)} leaves nothing to train. Freeze less, or leave it out."
        )


def summary(model: torch.nn.Module) -> str:
    """How much of the model trains, in one line."""
    packed = stands_for(model)
    numbers = [(packed.get(id(p), p.numel()), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in numbers), sum(n for n, trains in numbers if trains)
    frozen = sum(not trains for _, trains in numbers)
    rest = f", {frozen} of {len(numbers)} tensors are frozen" if frozen else ""
    return f"model  trains {trained:,} of {total:,} parameters ({100 * trained / total:.3g} %){rest}"


def frozen_names(model: torch.nn.Module) -> set[str]:
    """Every name of every frozen parameter. Files of a run take these weights from the start model: in bf16 training
    the model holds them rounded."""
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
