# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens, for rows with different wishes at once.

The random number of a token is a function of (seed, request, answer, position): not of the batch, nor of any state. The
order of operations is transformers': repetition penalty, callback, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch
import torch.nn.functional as F

from fastpost.generate.request import Sampling
from fastpost.ops.token_logprob import token_logprob

_MASK = (1 << 64) - 1
BLOCK = 512


def stream(seed: int, request: str | int, index: int) -> int:
    """The key of an answer's random numbers, 64 bits."""
    name = f"{seed}\0{type(request).__name__}\0{request}\0{index}"
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def uniform(key: int, position: int) -> float:
    """The number in [0, 1) for one token: splitmix64 at a counter."""
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


class Row(Protocol):
    """What `choose` must know of the sequence that a row of logits belongs to."""

    sampling: Sampling
    key: int  # stream(...)
    position: int  # tokens sampled so far

    def seen(self) -> list[int]:
        """Each token of prompt and answer once."""

    def so_far(self) -> list[int]:
        """The tokens of prompt and answer."""


@dataclass
class Chosen:
    """Per row: the token; its log-prob and [(id, log-prob)] of the likeliest, None where not asked for."""

    tokens: list[int]
    logprobs: list[float | None] | None = None
    top: list[list[tuple[int, float]] | None] | None = None


def choose(logits: torch.Tensor, rows: list[Row]) -> Chosen:
    """logits [R, V] of any float dtype, one row for each of `rows`; they are not changed."""
    wishes = [row.sampling for row in rows]
    if not any(s.temperature or s.repetition_penalty != 1 or s.logits_callback or s.logprobs is not None
               for s in wishes):  # fmt: skip
        return Chosen(_greedy(logits).tolist())
    adjusted = _adjust(logits, rows)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    drawn = torch.full((len(rows),), torch.nan, dtype=torch.float64, device=logits.device)
    greedy = [i for i, s in enumerate(wishes) if not s.temperature]
    if greedy:
        tokens[greedy] = _greedy(_pick(adjusted, greedy))
    filtered = [i for i, s in enumerate(wishes) if s.temperature and (s.top_k or s.top_p < 1 or s.min_p)]
    plain = [i for i, s in enumerate(wishes) if s.temperature and not (s.top_k or s.top_p < 1 or s.min_p)]
    for which, ask in ((plain, _draw_plain), (filtered, _draw_filtered)):
        if which:
            u = torch.tensor([uniform(rows[i].key, rows[i].position) for i in which], dtype=torch.float64)
            chosen = ask(_pick(adjusted, which), [wishes[i] for i in which], u.to(logits.device))
            tokens[which], drawn[which] = chosen
    result = Chosen(tokens.tolist())
    wanted = [i for i, s in enumerate(wishes) if s.logprobs is not None]
    if wanted:
        result.logprobs, result.top = _logprobs(logits, adjusted, tokens, drawn, wishes, wanted)
    return result


def _pick(rows: torch.Tensor, which: list[int]) -> torch.Tensor:
    return rows if len(which) == rows.shape[0] else rows[which]


def _greedy(logits: torch.Tensor) -> torch.Tensor:
    best, ids = logits.max(-1)
    _expect_numbers(best)
    return ids


def _expect_numbers(values: torch.Tensor) -> None:
    """One of each row, NaN if any of its logits is."""
    broken = values.isnan()
    if broken.any():
        raise ValueError(
            f"[generate] logits: expected numbers, got NaN in {int(broken.sum())} of {len(broken)} rows. The model's "
            "weights or a logits callback are broken."
        )


def _adjust(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """float32 logits after repetition penalty and callback."""
    wishes = [row.sampling for row in rows]
    if not any(s.repetition_penalty != 1 or s.logits_callback for s in wishes):
        return logits.float()
    adjusted = logits.to(torch.float32, copy=True)
    for i, (row, s) in enumerate(zip(rows, wishes, strict=True)):
        if s.repetition_penalty != 1:
            ids = torch.tensor(row.seen(), device=logits.device)
            score = adjusted[i, ids]
            adjusted[i, ids] = torch.where(score < 0, score * s.repetition_penalty, score / s.repetition_penalty)
        if s.logits_callback:
            given = s.logits_callback(row.so_far(), adjusted[i])
            if given is not None:
                if not isinstance(given, torch.Tensor) or given.shape != adjusted[i].shape:
                    got = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
                    raise ValueError(
                        f"[Sampling] logits_callback: expected logits [{logits.shape[1]}] or None in return, got {got}."
                    )
                adjusted[i] = given
    return adjusted


def _weights(logits: torch.Tensor, wishes: list[Sampling]) -> torch.Tensor:
    """softmax(logits / temperature) but for its denominator: the likeliest token weighs 1."""
    temperature = torch.tensor([s.temperature for s in wishes], dtype=torch.float32, device=logits.device)
    scaled = logits / temperature[:, None]
    return scaled.sub_(scaled.amax(-1, keepdim=True)).exp_()


def _invert(weights: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(column that number u [R] falls on, log of its share) for weights [R, K]."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    _expect_numbers(total)
    # Rounding must not carry u · total up to total: beyond the last column that weighs anything.
    x = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    column = torch.searchsorted(sums, x, right=True)
    share = weights.gather(1, column).double() / total
    return column[:, 0], share[:, 0].log()


def _draw_plain(logits, wishes, u):
    """Over the sums of blocks first: one pass over the vocabulary instead of a running sum."""
    weights = _weights(logits, wishes)
    rows, vocab = weights.shape
    if vocab % BLOCK:
        weights = F.pad(weights, (0, BLOCK - vocab % BLOCK))
    blocks = weights.view(rows, -1, BLOCK)
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    total = ends[:, -1:]
    _expect_numbers(total)
    x = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    block = torch.searchsorted(ends, x, right=True)
    chosen = blocks[torch.arange(rows, device=weights.device), block[:, 0]]
    sums = chosen.cumsum(-1, dtype=torch.float64)
    before = ends.gather(1, block) - sums[:, -1:]  # so that the block's own sums end where the block does
    column = torch.searchsorted(sums, (x - before).clamp(min=0), right=True)
    # Rounding may carry it past the last column that weighs anything: then it is that one.
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    column = torch.minimum(column, last)
    share = chosen.gather(1, column).double() / total
    return (block * BLOCK + column)[:, 0], share[:, 0].log()


def _draw_filtered(logits, wishes, u):
    """Sorting a whole vocabulary would cost more than the model's head. So first the tokens that no filter can leave
    are put aside; what remains is sorted, as a matrix with room for the row that has most."""
    weights = _weights(logits, wishes)
    ids, left = candidates(weights, wishes)
    column, logprob = _invert(left, u)
    return ids.gather(1, column[:, None])[:, 0], logprob


def candidates(weights: torch.Tensor, wishes: list[Sampling]) -> tuple[torch.Tensor, torch.Tensor]:
    """weights [R, V], the likeliest 1 -> ids [R, K], likeliest first, and their weights, 0 where a filter took them."""
    vocab = weights.shape[1]
    # Tokens below (1 - top_p) / V of the total weigh less than 1 - top_p together, so that top-p leaves none of them.
    # Half of that bounds the rounding of the sum. Top-k renormalises first; the k-th is its own bound.
    total = weights.sum(-1)
    _expect_numbers(total)
    total = total.tolist()
    least = [
        max(0.0 if s.top_k else 0.5 * (1 - s.top_p) / vocab * t, 0.0 if s.top_k and s.top_p < 1 else s.min_p)
        for s, t in zip(wishes, total, strict=True)
    ]
    least = torch.tensor(least, dtype=torch.float32, device=weights.device)
    nucleus = torch.tensor([0.0 if s.top_k or s.top_p == 1 else s.top_p for s in wishes], device=weights.device)
    if bool((nucleus > 0).any()):
        # Where the tokens above a higher bound weigh enough, none below it stays either.
        whole = torch.tensor(total, device=weights.device)
        for share in (1e-5, 1e-3):
            bound = share * whole
            mass = weights.where(weights >= bound[:, None], 0).sum(-1)
            enough = (nucleus > 0) & (mass >= nucleus * whole * (1 + 1e-5))
            least = torch.where(enough, torch.maximum(least, bound), least)
    top = max(s.top_k for s in wishes)
    if top:
        limited = [i for i, s in enumerate(wishes) if s.top_k]
        best = _pick(weights, limited).topk(min(top, vocab)).values
        kth = torch.tensor([min(wishes[i].top_k, vocab) - 1 for i in limited], device=weights.device)
        kth = best.gather(1, kth[:, None])[:, 0]
        least[limited] = torch.maximum(_pick(least, limited), kth)
    there = weights >= least[:, None]
    row, token = there.nonzero(as_tuple=True)
    count = row.bincount(minlength=len(wishes))
    column = torch.arange(len(row), device=weights.device) - (count.cumsum(0) - count)[row]
    left = weights.new_zeros(len(wishes), int(count.max()))
    ids = torch.zeros(left.shape, dtype=torch.int64, device=weights.device)
    left[row, column], ids[row, column] = weights[row, token], token
    left, order = left.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    top_p = torch.tensor([s.top_p for s in wishes], dtype=torch.float64, device=weights.device)[:, None]
    above = left.cumsum(-1, dtype=torch.float64)
    # With top-k the shares are of what it left; without, of everything, also of what was put aside above.
    whole = torch.tensor([[0.0 if s.top_k else t] for s, t in zip(wishes, total, strict=True)], dtype=torch.float64)
    whole = torch.maximum(above[:, -1:], whole.to(weights.device))
    above -= left
    left = left.masked_fill((above >= top_p * whole) & (top_p < 1), 0)
    min_p = torch.tensor([s.min_p for s in wishes], dtype=torch.float32, device=weights.device)[:, None]
    return ids, left.masked_fill(left < min_p, 0)


def _logprobs(logits, adjusted, tokens, drawn, wishes, wanted):
    """Lists over all rows, None but at `wanted`."""
    logprobs: list = [None] * len(wishes)
    top: list = [None] * len(wishes)
    groups: dict[tuple, list[int]] = {}
    for i in wanted:
        s = wishes[i]
        groups.setdefault(
            (s.logprob_of, s.temperature or 1.0, s.logprobs if s.logprob_of == "model" else -1), []
        ).append(i)
    for (of, temperature, k), which in groups.items():
        if of == "model":
            rows = _pick(logits, which)
            own = token_logprob(rows.contiguous(), tokens[which], temperature=temperature)
            values = own.tolist()
            if k:
                chosen = rows.gather(1, tokens[which][:, None]).float()
                best = rows.topk(min(k, rows.shape[1]))
                best_logprob = (best.values.float() - chosen) / temperature + own[:, None]
                best_ids, best_logprob = best.indices.tolist(), best_logprob.tolist()
        for n, i in enumerate(which):
            if of == "model":
                logprobs[i] = values[n]
                if k:
                    top[i] = list(zip(best_ids[n], best_logprob[n], strict=True))
            else:
                logprobs[i], top[i] = _sampled(adjusted[i], int(tokens[i]), float(drawn[i]), wishes[i])
    return logprobs, top


def _sampled(adjusted, token: int, drawn: float, s: Sampling):
    """Log-prob of the token under what it was drawn from, and the likeliest of that. Greedy: softmax(logits)."""
    if s.temperature and not s.logprobs:
        return drawn, None
    if not s.temperature:
        logprob = adjusted.log_softmax(-1)
        ids = None
    else:
        weights = _weights(adjusted[None], [s])
        if s.top_k or s.top_p < 1 or s.min_p:
            ids, weights = candidates(weights, [s])
            ids = ids[0]
        else:
            ids = None
        logprob = (weights[0].double() / weights[0].sum(dtype=torch.float64)).log()
    own = float(logprob[token]) if not s.temperature else drawn
    if not s.logprobs:
        return own, None
    best = logprob.topk(min(s.logprobs, logprob.numel()))
    found = best.indices if ids is None else ids[best.indices]
    pairs = zip(found.tolist(), best.values.tolist(), strict=True)
    return own, [(i, value) for i, value in pairs if value > float("-inf")]
