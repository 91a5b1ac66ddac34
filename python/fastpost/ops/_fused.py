# SPDX-License-Identifier: Apache-2.0
"""linear_logprob on the CPU with the GEMM inside the core (cpp/ops/linear_logprob_fused.cpp): only workspaces and rows
are arranged here. bfloat16 products become float32 logits, so log-probs are as exact as from float32 GEMMs, and a row's
result does not depend on what else is in the batch.
"""

from __future__ import annotations

import os

import torch

from fastpost import _core

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
    need = max(_core.linear_logprob_fused_bytes(weight, n, True, True, True, 1))
    if need > budget and batch_invariant:
        raise ValueError(
            f"[linear_logprob] memory_budget: batch_invariant needs {need} bytes for {n} rows, got {budget}. Raise it "
            "or pass fewer rows at once."
        )
    return need <= budget


def _workspace(room: int, which: int, *shape) -> torch.Tensor:
    """For all threads if there is room, else for one or more."""
    one, every = (_core.linear_logprob_fused_bytes(*shape, threads)[which] for threads in (1, torch.get_num_threads()))
    return torch.empty(max(one, min(every, room)), dtype=torch.uint8)


def kept_rows(n: int, weight, budget: int) -> int:
    """Rows that the forward keeps for the backward: whole panels, in half of the budget and beside the workspace."""
    room = min(budget // 2, budget - max(_core.linear_logprob_fused_bytes(weight, n, True, True, True, 1)))
    rows, _ = _core.linear_logprob_fused_kept(weight, n, room)
    return rows if rows * 16 >= n else 0  # a sixteenth is not worth its memory


def forward(hidden, weight, bias, target, rows, temperature, softcap, with_entropy, budget: int, keep: bool):
    """(stats [5, n], kept [·, V]: at most half of the budget, and with `keep` alone)."""
    n, v = len(target) if rows is None else len(rows), len(weight)
    rows_kept = kept_rows(n, weight, budget) if keep and not with_entropy and not softcap else 0
    elements = _core.linear_logprob_fused_kept(weight, rows_kept, 1 << 62)[1]
    stats = torch.empty(5, n, dtype=torch.float32)
    kept = torch.empty(-(-elements // v), v, dtype=torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32)
    workspace = _workspace(budget - kept.nbytes, 0, weight, n, True, True, True)
    _core.linear_logprob_fused(
        _rows(hidden), weight, _float(bias), target, rows, temperature, softcap, with_entropy, rows_kept, kept,
        workspace, stats,
    )  # fmt: skip
    return stats, kept


def backward(hidden, weight, bias, target, scored, active, temperature, softcap, logprob, lse, entropy, kept,
             grad_logprob, grad_entropy, needs, budget: int, weight_sum=None):  # fmt: skip
    """Gradients of hidden, weight, bias (empty where not needed). scored, active: masks [N] of the rows of the forward
    and of those with a gradient; logprob ... grad_entropy: [N]. weight_sum [V, D] float32: the weight's gradient is
    added there instead."""
    n_scored, n = int(scored.sum()), int(active.sum())
    rows_kept = _core.linear_logprob_fused_kept(weight, n_scored, kept.nbytes)[0] if len(kept) else 0
    rows = None if n == len(target) else active.nonzero()[:, 0]
    place = None if n == n_scored else scored.cumsum(0)[rows] - 1  # which row of the forward each row is
    recompute = bool(n) and int(n - 1 if place is None else place[-1]) >= rows_kept

    def picked(t):
        return t if t is None or rows is None else t[rows]

    def result(like, needed, every):
        if not needed:
            return hidden.new_empty(0)
        return (torch.empty_like if every else torch.zeros_like)(like, memory_format=torch.contiguous_format)

    grad_hidden = result(hidden, needs[0], n and rows is None)
    grad_weight = result(weight, needs[1], n) if weight_sum is None else weight_sum
    grad_bias = torch.zeros(len(weight) if needs[2] else 0, dtype=torch.float32)
    if n and (needs[0] or needs[1] or needs[2]):
        workspace = _workspace(budget - kept.nbytes, 1, weight, n, needs[0], needs[1], recompute)
        outputs = (t if needed else None for t, needed in zip((grad_hidden, grad_weight, grad_bias), needs))
        _core.linear_logprob_fused_backward(
            _rows(hidden), weight, _float(bias), target, rows, temperature, softcap, picked(logprob), picked(lse),
            picked(entropy), picked(grad_logprob), picked(grad_entropy), rows_kept, kept, place, workspace, *outputs,
            weight_sum is not None,
        )  # fmt: skip
    return grad_hidden, grad_weight, grad_bias.to(hidden.dtype)


def _rows(hidden):
    return hidden if hidden.stride(-1) == 1 or hidden.shape[1] == 1 else hidden.contiguous()


def _float(bias):
    return None if bias is None else bias.float()
