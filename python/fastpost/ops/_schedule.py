# SPDX-License-Identifier: Apache-2.0
"""Which schedule a call takes: a pure function of shapes, wanted gradients and the byte budget, so that it can be told
before or after."""

from __future__ import annotations

from typing import NamedTuple

from fastpost.ops import _fused, _one_pass, _passes


class Schedule(NamedTuple):
    """How linear_logprob or preference_loss computes, as return_schedule=True reports it."""

    name: str
    """"forward": no gradient is wanted. "one pass": pieces of whole pairs (of rows, when only hidden
    wants a gradient), each finished at once. "kept": the logits of
    `kept` rows are kept for the backward, those of the others made again; "recompute": of all others."""
    rows: int
    """Scored rows."""
    kept: int
    """Rows whose logits are made once."""
    operations: float
    """In units of rows · V · D: 2 a GEMM, forward and backward together."""
    gemm: str
    """Whose GEMMs: "core" (fused with the softmax, CPU) or "torch"."""

    def __str__(self) -> str:
        return f"{self.name}, {self.operations:.1f} x rows x V x D ({self.kept} of {self.rows} rows kept, {self.gemm})"


def schedule(
    hidden, weight, target, *, needs, budget: int, a=None, ignore_index=-100, keeps=True, batch_invariant=False,
    cu_seqlens=None, paired=False, frozen=False,
) -> Schedule:  # fmt: skip
    """needs: whether gradients of (hidden, weight) are wanted. keeps: False with an entropy or softcap, which the fused
    kernels recompute. cu_seqlens: given where one pass over whole pairs is possible; frozen: where one over rows is."""
    n = int((target != ignore_index).sum())
    core = bool(n) and _fused.usable(n, hidden, weight, a, budget, batch_invariant)
    gemm, gradients = "core" if core else "torch", 2.0 * sum(needs)
    if not any(needs):
        return Schedule("forward", n, 0, 2.0, gemm)
    cut = cu_seqlens is not None and keeps and a is None and _one_pass.too_many_rows(hidden, weight, target, budget)
    if (cut and _one_pass.pieces(hidden, weight, target, cu_seqlens, paired, ignore_index, budget, needs[1])) or (
        frozen and _passes.direction_piece(n, hidden, weight, a, budget, 0.0 if keeps else 1.0)
    ):
        return Schedule("one pass", n, n, 2.0 + gradients, gemm)
    kept = _passes.kept_rows(n, hidden, weight, a, budget, keeps)
    again = 2.0 * (n - kept) / max(n, 1)
    return Schedule("kept" if kept else "recompute", n, kept, 2.0 + again + gradients, gemm)
