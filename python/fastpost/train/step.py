# SPDX-License-Identifier: Apache-2.0
"""One optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastpost.data.collate import Batch

from . import routers
from .distributed import ALONE, Ranks
from .forward import forward, lengths
from .gradients import Gradients
from .metrics import Sums, add_output
from .optim import AdamW


class NotFinite(ArithmeticError):
    """Loss or gradient is NaN or infinite; the message names step and rows. Weights and optimizer are as before the
    step."""


def train_step(
    model: torch.nn.Module,
    objective,
    optimizer: AdamW,
    batches: Sequence[Batch],
    *,
    step: int,
    lr: float,
    max_grad_norm: float | None,
    temperature: float = 1.0,
    idle: Sequence[Batch] = (),
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Step number `step` (from 0) over all rows of the `batches` of all ranks; returns its metrics under TRL's names.

    The loss is sum(losses) / count with one count (of pairs, sequences or tokens, as the objective says) for the
    whole step, known on every rank before the first backward. So how rows are split into micro-batches and over ranks
    changes neither loss nor gradient. `idle`: batches that a sharded rank computes for the others' sake; they weigh
    nothing.

    With balanced routers (a mixture of experts) the loss has weight * aux_loss + z_weight * z_loss in it, means over
    micro-batches weighted by tokens, to the first of which it matters a little which rows share a micro-batch: see
    routers.losses.
    """
    counts = [float(objective.count(lengths(b))) for b in batches]
    denominator = ranks.sum(sum(counts))
    balance = routers.on(model)
    tokens = ranks.sum(sum(b.tokens for b in batches)) if balance else 0
    sums, losses = Sums(), []
    with Gradients(optimizer.parameters, len(batches) + len(idle), ranks) as gradients:
        for batch, count in zip(batches, counts, strict=True):
            batch = batch.to(optimizer.device)
            output = forward(model, batch, objective, temperature)
            loss = output.losses.sum() / denominator
            if balance:
                loss = loss + batch.tokens / tokens * routers.weighted(balance, output.aux_loss, output.z_loss)
            loss.backward()
            add_output(sums, objective, batch, output, count)
            losses.append(output.losses.detach())
        for batch in idle:
            (0.0 * forward(model, batch.to(optimizer.device), objective, temperature).losses.sum()).backward()
        gradients.reduce()
        norm = gradients.norm()
        means = sums.means(ranks)
        means["loss"] += routers.share(model, means)
        if not (math.isfinite(norm) and math.isfinite(means["loss"])):
            raise NotFinite(_explain(step, means["loss"], norm, losses, batches, lr, ranks))
        scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
        optimizer.step(gradients, step=step, lr=lr, scale=scale)
    return means | {"grad_norm": norm, "learning_rate": lr}


def _explain(
    step: int, loss: float, norm: float, losses: list[torch.Tensor], batches: Sequence[Batch], lr: float, ranks: Ranks
) -> str:
    """What a person needs to find the culprit: the rows whose own loss is bad, or all rows of the step if none is."""
    own = [
        (row, float(x)) for b, part in zip(batches, losses, strict=True) for row, x in zip(b.rows, part, strict=True)
    ]
    pairs = [pair for of_rank in ranks.gather(own) for pair in of_rank]  # all ranks say the same, so it is said once
    bad = [row for row, x in pairs if not math.isfinite(x)]
    what = f"the loss is {loss}" if bad else f"the gradient norm is {norm} (every loss is finite)"
    rows = sorted(set(bad or [row for row, _ in pairs]))
    listed = ", ".join(map(str, rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
    return (
        f"[train] step {step + 1}: {what}. Data rows: {listed}. The step was not taken and nothing was saved. "
        "`fastpost data` shows rows; if they look right, "
        f"lower optim.lr (now {lr:.3g}) or set optim.max_grad_norm."
    )
