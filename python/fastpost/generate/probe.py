# SPDX-License-Identifier: Apache-2.0
"""What a model would say next after some more tokens, without a trace in the sequence that is asked.

A probe runs in forwards of its own, on a fork whose last shared page is copied before it is written and whose pages are
dropped afterwards. So no product of the sequence's own has other rows beside it than without the probe: its bits stay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastpost.generate.handle import Handle
from fastpost.generate.limits import Limits
from fastpost.generate.paged_cache import PagedCache
from fastpost.generate.request import Sampling
from fastpost.generate.schedule import Part, Scheduler


def logits(sources: list[Handle], token_ids: list[int], limits: Limits, schedule: Scheduler, cache: PagedCache,
           forward: Callable[[list[Part], list[int]], torch.Tensor]) -> torch.Tensor:  # fmt: skip
    """[n, V]: of the token after each sequence and token_ids. `forward` as Engine._forward."""
    forks = []
    for i, source in enumerate(sources):
        fork = Handle(None, source.id, source.index, source.prompt, Sampling(), (-1, i), None)
        fork.token_ids = source.token_ids + token_ids
        limits.probe(len(fork))
        forks.append(fork)
    rows: list[torch.Tensor] = []
    while len(rows) < len(forks):
        done = len(rows)
        rows += _together(sources[done:], forks[done:], schedule, cache, forward)
    return torch.stack(rows)


def _together(sources, forks, schedule, cache, forward) -> list[torch.Tensor]:
    """Logits of the first so many as have pages together."""
    held: list[Handle] = []
    rows: dict[int, torch.Tensor] = {}
    copies: list[tuple[int, int]] = []
    try:
        for source, fork in zip(sources, forks, strict=True):
            if source.cached:
                schedule.share(source, fork)
                schedule.cut(fork, len(fork) - 1)  # so that a token is left to compute
            else:
                schedule.find(fork)
            if not schedule.reserve(fork, len(fork) - fork.cached, copies):
                schedule.release(fork)
                break
            held.append(fork)
        if not held:
            raise ValueError(
                f"[Engine] probe: expected free pages for what {len(forks[0])} tokens do not share, got "
                f"{schedule.pages.available}. Give the engine more pages or memory, or cancel sequences."
            )
        if copies:
            cache.copy(copies)
        while len(rows) < len(held):
            budget, parts = schedule.prefill_tokens, []
            for fork in held:
                count = min(len(fork) - fork.cached, budget)
                if count:
                    parts.append(Part(fork, count))
                    budget -= count
            asked = [i for i, (fork, count) in enumerate(parts) if fork.cached + count == len(fork)]
            found = forward(parts, asked)
            for fork, count in parts:
                fork.cached += count
            rows |= {id(parts[i].handle): found[row] for row, i in enumerate(asked)}
        return [rows[id(fork)] for fork in held]
    finally:
        for fork in held:
            schedule.release(fork)
