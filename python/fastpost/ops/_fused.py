# SPDX-License-Identifier: Apache-2.0
"""linear_logprob on the CPU with the GEMM inside the core (cpp/ops/linear_logprob_fused.cpp): only workspaces and rows
are arranged here. bfloat16 products become float32 logits, so log-probs are as exact as from float32 GEMMs, and a row's
result does not depend on what else is in the batch.
"""

from __future__ import annotations

import os

import torch

from fastpost import _core
from fastpost.ops import _spare

FORCED = os.environ.get("FASTPOST_CPU_GEMM", "")  # "fused" or "torch": for comparisons


def refusal(hidden, weight, a) -> str:
    """Why this path cannot take these arguments; empty when it can."""
    if hidden.device.type != "cpu":
        return f"it runs on the CPU, not on {hidden.device.type}"
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no {str(hidden.dtype).removeprefix('torch.')}"
    if a is not None:
        return "it has no low_rank"
    return "" if weight.stride(-1) == 1 and len(weight) and weight.shape[1] else "weight needs contiguous rows"


def usable(n, hidden, weight, a, budget: int, batch_invariant: bool) -> bool:
    """Whether n rows run here or through torch's GEMMs. Nothing that could change between forward and backward
    counts."""
    if why := refusal(hidden, weight, a):
        if batch_invariant:
            raise ValueError(f"[linear_logprob] batch_invariant: {why}.")
        return False
    if not batch_invariant and FORCED != "fused" and (FORCED or not _core.linear_logprob_fused_preferred(weight)):
        return False
    need = max(_core.linear_logprob_fused_bytes(weight, n, True, True, True, 1, True))
    if need > budget and batch_invariant:
        raise ValueError(
            f"[linear_logprob] memory_budget: batch_invariant needs {need} bytes for {n} rows, got {budget}. Raise it "
            "or pass fewer rows at once."
        )
    return need <= budget


def check_skipping(hidden, weight, a, softcap, with_entropy, skip_mass, order) -> None:
    """Raises ValueError where tiles cannot be skipped."""
    if order is not None and (order.dtype != torch.int64 or order.shape != weight.shape[:1]):
        got = f"{str(order.dtype).removeprefix('torch.')} {list(order.shape)}"
        raise ValueError(f"[linear_logprob] vocab_order: expected int64 [{len(weight)}], got {got}.")
    if not 0 <= skip_mass < 1:
        raise ValueError(f"[linear_logprob] skip_mass: expected a probability in [0, 1), got {skip_mass}.")
    if skip_mass == 0:
        return
    why = refusal(hidden, weight, a) or ("a softcap needs every logit" if softcap else "")
    why = why or ("the entropy needs every logit" if with_entropy else "")
    if why:
        raise ValueError(f"[linear_logprob] skip_mass: {why}. Leave it at 0.")
    if order is not None and not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError("[linear_logprob] vocab_order: expected each entry of the vocabulary once.")


def _workspace(room: int, which: int, weight, n, hidden, weights, recompute, ordered) -> torch.Tensor:
    """Of the forward (which = 0) or the backward (1): for all threads if there is room, else for one or more."""
    one, every = (
        _core.linear_logprob_fused_bytes(weight, n, hidden, weights, recompute, threads, ordered)[which]
        for threads in (1, torch.get_num_threads())
    )
    return torch.empty(max(one, min(every, room)), dtype=torch.uint8)


def kept_rows(n: int, weight, budget: int) -> int:
    """Rows that the forward keeps for the backward: whole panels, in half of the budget and beside the workspace."""
    room = min(budget // 2, budget - max(_core.linear_logprob_fused_bytes(weight, n, True, True, True, 1, True)))
    rows, _ = _core.linear_logprob_fused_kept(weight, n, room)
    return rows if rows * 16 >= n else 0  # a sixteenth is not worth its memory


class _Kept:
    """The tensor [·, V] that goes from the forward to the backward: log-masses [blocks, padded rows] float32 when tiles
    will be skipped, then what the core keeps of the logits."""

    def __init__(self, weight, n: int, skips: bool):
        self.dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
        self.weight, self.n = weight, n
        self.shape = _core.linear_logprob_fused_tiles(weight, n) if skips else (0, 0)
        self.head = -(-self.shape[0] * self.shape[1] * 4 // (self.dtype.itemsize * len(weight)))  # rows of log-masses

    def make(self, rows: int) -> torch.Tensor:
        elements = _core.linear_logprob_fused_kept(self.weight, rows, 1 << 62)[1]
        rows = self.head + -(-elements // len(self.weight))
        return _spare.empty(rows * len(self.weight) * self.dtype.itemsize).view(self.dtype).view(rows, len(self.weight))

    def parts(self, kept):
        """(log-masses or None, the rest, how many rows that holds)."""
        rest = kept[self.head :]
        rows = _core.linear_logprob_fused_kept(self.weight, self.n, rest.nbytes)[0] if len(rest) else 0
        if not self.head:
            return None, rest, rows
        blocks, padded = self.shape
        masses = kept[: self.head].view(-1).view(torch.float32)[: blocks * padded].view(blocks, padded)
        return masses, rest, rows


def forward(hidden, weight, bias, target, rows, temperature, softcap, with_entropy, budget: int, keep: bool,
            skip_mass: float = 0.0, order=None):  # fmt: skip
    """(stats [5, n], kept [·, V]: at most half of the budget, and with `keep` alone)."""
    n = len(target) if rows is None else len(rows)
    layout = _Kept(weight, n, keep and skip_mass > 0)
    kept = layout.make(kept_rows(n, weight, budget) if keep and not with_entropy and not softcap else 0)
    log_masses, rest, rows_kept = layout.parts(kept)
    stats = torch.empty(5, n, dtype=torch.float32)
    workspace = _workspace(budget - kept.nbytes, 0, weight, n, True, True, True, order is not None)
    _core.linear_logprob_fused(
        _rows(hidden), weight, _ordered_bias(bias, order), _places(target, order), rows, temperature, softcap,
        with_entropy, rows_kept, rest, order, log_masses, workspace, stats,
    )  # fmt: skip
    return stats, kept


def backward(hidden, weight, bias, target, scored, active, temperature, softcap, logprob, lse, entropy, kept,
             grad_logprob, grad_entropy, needs, budget: int, weight_sum=None, skip_mass: float = 0.0, order=None,
             dropped=None):  # fmt: skip
    """Gradients of hidden, weight, bias (empty where not needed). scored, active: masks [N] of the rows of the forward
    and of those with a gradient; logprob ... grad_entropy: [N]. weight_sum [V, D] float32: the weight's gradient is
    added there instead. dropped (a list): gets the core's account of what was skipped."""
    n_scored, n = int(scored.sum()), int(active.sum())
    log_masses, rest, rows_kept = _Kept(weight, n_scored, skip_mass > 0).parts(kept)
    rows = None if n == len(target) else active.nonzero()[:, 0]
    place = None if n == n_scored else scored.cumsum(0)[rows] - 1  # which row of the forward each row is
    if log_masses is not None:  # rows that need equally many blocks side by side: three times fewer tiles stay
        place = torch.arange(n) if place is None else place
        masses = (log_masses[:, place] - (lse if rows is None else lse[rows])).exp()
        needed = (masses.sort(0).values.cumsum(0) > skip_mass).sum(0)
        order_of_rows = needed.argsort(stable=True)
        rows, place = (order_of_rows if rows is None else rows[order_of_rows]), place[order_of_rows]
    recompute = bool(n) and int(n - 1 if place is None else place.max()) >= rows_kept

    def picked(t):
        return t if t is None or rows is None else t[rows]

    def result(like, needed, every):
        if not needed:
            return hidden.new_empty(0)
        return torch.empty(like.shape, dtype=like.dtype) if every else torch.zeros(like.shape, dtype=like.dtype)

    grad_hidden = result(hidden, needs[0], n == len(target) and n)
    grad_weight = result(weight, needs[1], n) if weight_sum is None else weight_sum
    grad_bias = torch.zeros(len(weight) if needs[2] else 0, dtype=torch.float32)
    if n and (needs[0] or needs[1] or needs[2]):
        workspace = _workspace(budget - kept.nbytes, 1, weight, n, needs[0], needs[1], recompute, order is not None)
        outputs = (t if needed else None for t, needed in zip((grad_hidden, grad_weight, grad_bias), needs))
        account = None if dropped is None else torch.zeros(n + 1)
        _core.linear_logprob_fused_backward(
            _rows(hidden), weight, _ordered_bias(bias, order), _places(target, order), rows, temperature, softcap,
            picked(logprob), picked(lse), picked(entropy), picked(grad_logprob), picked(grad_entropy), rows_kept, rest,
            place, order, log_masses, skip_mass, account, workspace, *outputs, weight_sum is not None,
        )  # fmt: skip
        if dropped is not None:
            dropped.append(account)
    return grad_hidden, grad_weight, grad_bias.to(hidden.dtype)


def _places(target, order):
    """Where each target stands in the order of the sweep (an index outside the vocabulary stays one)."""
    if order is None:
        return target
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    inside = (target >= 0) & (target < len(order))
    return torch.where(inside, place[target.where(inside, 0)], target)


def _ordered_bias(bias, order):
    return None if bias is None else bias.float() if order is None else bias.float()[order]


def _rows(hidden):
    return hidden if hidden.stride(-1) == 1 or hidden.shape[1] == 1 else hidden.contiguous()
