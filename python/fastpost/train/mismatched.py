# SPDX-License-Identifier: Apache-2.0
"""KTO's estimate of how far the policy has moved: replies under other rows' prompts, where nothing was trained.

Row i gets the reply of the row before it (the first gets the last one's), as in TRL; rows with the same prompt are
passed over, because a reply under its own prompt is no mismatch. Then, without a gradient,

    kl = mean over the rows of a step of (log p_policy - log p_reference)(mismatched reply)

which the loss subtracts from each reply's log-ratio, where it counts as 0 when negative. TRL takes the mean over a
micro-batch of a device; here it is over the whole step, so how rows are split changes nothing.
Source: Ethayarajh et al. 2024, section 4.1; TRL's KTOTrainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from fastpost.data.collate import Batch, Example, Sequence
from fastpost.data.dataset import Dataset
from fastpost.data.table import Examples, Writer
from fastpost.objectives import KTO, SFT

from .config import Config
from .distributed import ALONE, Ranks, Turns
from .forward import forward

PREFIX = "mismatched."


class Mismatched:
    """The mismatched rows of each dataset; none (and False) for objectives that have no use for them.

    `data` and `parts` are to be given to reference.attach beside those of the rows themselves."""

    def __init__(self, cfg: Config, objective, sources: dict[str, str], data: dict[str, Dataset]):
        wanted = isinstance(objective, KTO) and cfg.data.mismatched
        if wanted and sources.get("reference_logprob") in ("columns", "previous"):
            raise ValueError(
                f"[train] data.mismatched: expected false with model.reference {sources['reference_logprob']}, which "
                "holds no log-probs of replies under other prompts, got true. Set it to false (KL counts as 0), or "
                "model.reference to start or the path of a model."
            )
        made = {name: rows(dataset, cfg.data.max_length) for name, dataset in data.items()} if wanted else {}
        self.data = {PREFIX + name: dataset for name, dataset in made.items()}
        self.temperature = cfg.model.temperature

    def __bool__(self) -> bool:
        return bool(self.data)

    def parts(self, parts: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        """The micro-batches of the rows themselves: then policy and reference see the same packing, and the estimate
        begins at exactly 0."""
        return {PREFIX + name: parts[name] for name in parts if PREFIX + name in self.data}

    @torch.no_grad()
    def estimate(self, model: torch.nn.Module, name: str, turns: Turns, ranks: Ranks = ALONE) -> float | None:
        """kl over the rows of `turns` of all ranks; None without mismatched rows."""
        if not self:
            return None
        data, device, was_training = self.data[PREFIX + name], next(model.parameters()).device, model.training
        model.eval()
        total = rows = 0.0
        for part in turns.mine:
            batch = data.batch(part).to(device)
            logprob = forward(model, batch, SFT(), self.temperature).logprob
            total, rows = total + (logprob - batch.reference_logprob).double().sum().item(), rows + len(part)
        for part in turns.idle:
            forward(model, data.batch(part).to(device), SFT(), self.temperature)
        model.train(was_training)
        return ranks.sum(total) / ranks.sum(rows)


def given(batches: Iterable[Batch], kl: float | None) -> Iterable[Batch]:
    """`batches` with the estimate."""
    return (batch if kl is None else replace(batch, kl=torch.tensor([kl])) for batch in batches)


def rows(data: Dataset, max_length: int) -> Dataset:
    """As many rows as `data` has, each its prompt with another row's reply, cut at the end to `max_length` tokens."""
    split = [(s.ids[: s.first_scored + 1], s) for (s,) in (e.sequences for e in data.examples)]
    out = Writer()
    for i, (prompt, _) in enumerate(split):
        other = next((j for k in range(1, len(split)) if split[j := i - k][0] != prompt), i - 1)
        reply = split[other][1]
        at = reply.first_scored + 1
        ids = (prompt + reply.ids[at:])[:max_length]
        trained = (bytes(len(prompt)) + reply.trained[at:])[: len(ids)]
        out.append(Example(i, (Sequence(ids, trained),)))
    return Dataset(Examples([out.table()]), data.report, data.share_prompt)
