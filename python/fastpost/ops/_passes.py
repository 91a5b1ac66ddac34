# SPDX-License-Identifier: Apache-2.0
"""The two passes of linear_logprob on plain tensors: which rows, whose kernels, and what goes from one to the other.

Three ways from the forward to the backward, chosen by shapes and budget alone (8, 6 to 8 and 4·N·V·D operations):
nothing but each row's log-sum-exp; the logits of as many rows as the budget holds; or, where only `hidden` wants a
gradient (a frozen head), d logprob / d hidden itself, a row of D numbers that the incoming gradient then multiplies.
"""

from __future__ import annotations

import torch

from fastpost.ops import _fused, _hopper
from fastpost.ops._tiles import (
    Backward,
    capturing,
    compute_dtype,
    forward_plan,
    kernels,
    row_statistics,
    scored_rows,
    spans,
    sum_dtype,
    take,
)


def forward(hidden, weight, target, bias, a, b, temperature, softcap, ignore_index, with_entropy, budget, keep,
            batch_invariant=False, skip_mass=0.0, vocab_order=None, frozen=False):  # fmt: skip
    """logprob, lse, entropy (empty when not asked for), each [N]; kept [·, V] for the backward. Arguments are checked
    already. frozen: no gradient but hidden's will be wanted."""
    outputs = row_outputs(hidden, with_entropy)
    scored = target != ignore_index
    rows = scored_rows(scored)
    n = len(target) if rows is None else len(rows)
    row_outputs_ = outputs if rows is None else [t.new_empty(min(len(t), n)) for t in outputs]
    exact = batch_invariant or skip_mass > 0
    piece = (
        direction_piece(n, hidden, weight, a, budget, softcap)
        if may_finish(keep and frozen, with_entropy, exact)
        else 0
    )
    if piece:
        kept = _directions(
            hidden, weight, target, bias, a, b, temperature, softcap, rows, n, budget, piece, row_outputs_
        )
        blocks = ()
    elif n and _fused.usable(n, hidden, weight, a, budget, exact):
        stats, kept = _fused.forward(hidden, weight, bias, target, rows, temperature, softcap, with_entropy, budget,
                                     keep, skip_mass, vocab_order)  # fmt: skip
        blocks = [(0, n, stats)]
    else:
        p = forward_plan(n, hidden, weight, a, budget)
        if columns := _hopper.tile_columns(hidden, weight, a):
            kept = _hopper.kept_like(hidden, p.kept if keep else 0, len(weight), columns)
        else:
            kept = hidden.new_empty(p.kept if keep else 0, len(weight), dtype=compute_dtype(hidden))
        blocks = row_statistics(hidden, weight, target, bias, a, b, temperature, softcap, with_entropy, rows, p, kept)
    for begin, end, stats in blocks:
        logprob, lse, entropy = (t[begin:end] for t in row_outputs_)
        kernels(hidden).linear_logprob_finish(stats, logprob, lse, entropy if with_entropy else None)
    if rows is not None:
        for out, of_rows in zip(outputs, row_outputs_):
            if len(out):
                out.zero_().index_copy_(0, rows, of_rows)
    elif capturing(target):
        for out in outputs:
            if len(out):
                out.masked_fill_(~scored, 0)
    return *outputs, kept


def backward(hidden, weight, target, bias, a, b, temperature, softcap, ignore_index, budget, logprob, lse, entropy,
             kept, grad_logprob, grad_entropy, needs, batch_invariant=False, skip_mass=0.0, vocab_order=None,
             frozen=False, weight_sum=None):  # fmt: skip
    """Gradients of hidden, weight, bias, a, b (empty where not needed). weight_sum [V, D] float32: the weight's
    gradient is added there instead."""
    # Rows of the forward, then those of them whose gradient is not zero.
    scored = target != ignore_index
    if capturing(target):  # rows without a gradient stay, as zeros
        grad_logprob = grad_logprob.masked_fill(~scored, 0)
        grad_entropy = None if grad_entropy is None else grad_entropy.masked_fill(~scored, 0)
    active = scored & ((grad_logprob != 0) if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0))
    n = len(target) if capturing(target) else int(scored.sum())
    nothing = hidden.new_empty(0)
    exact = batch_invariant or skip_mass > 0
    if may_finish(frozen, grad_entropy is not None, exact) and direction_piece(n, hidden, weight, a, budget, softcap):
        return _scaled(hidden, scored, active, kept, grad_logprob), nothing, nothing, nothing, nothing
    if n and _fused.usable(n, hidden, weight, a, budget, exact):
        grads = _fused.backward(hidden, weight, bias, target, scored, active, temperature, softcap, logprob, lse,
                                entropy, kept, grad_logprob, grad_entropy, needs, budget, weight_sum, skip_mass,
                                vocab_order)  # fmt: skip
        return *grads, nothing, nothing
    return Backward(hidden, weight, target, bias, a, b, temperature, softcap, scored, active, budget, logprob, lse,
                    entropy, kept, grad_logprob, grad_entropy, needs, weight_sum).run()  # fmt: skip


def row_outputs(hidden, with_entropy):
    """logprob, lse, entropy (empty when not asked for)."""
    n, dtype = hidden.shape[0], sum_dtype(hidden.dtype)
    return [torch.empty(k, dtype=dtype, device=hidden.device) for k in (n, n, n if with_entropy else 0)]


def kept_rows(n: int, hidden, weight, a, budget: int, keeps: bool = True) -> int:
    """Of how many of n scored rows the forward keeps the logits. keeps: False with an entropy or softcap, which the
    fused kernels recompute."""
    if not n or not len(weight):
        return 0
    if _fused.usable(n, hidden, weight, a, budget, False):
        return min(n, _fused.kept_rows(n, weight, budget)) if keeps else 0
    return forward_plan(n, hidden, weight, a, budget).kept


def most_kept(n: int, hidden, weight, a, budget: int, keeps: bool = True) -> int:
    """The most rows, up to n, of which a forward over them alone keeps every logit."""
    rows = min(n, budget // (2 * len(weight) * compute_dtype(hidden).itemsize))
    while rows and (kept := kept_rows(rows, hidden, weight, a, budget, keeps)) < rows:
        rows = kept
    return rows


# ---- a frozen head: one pass, whatever the loss ----------------------------------------------------------------------


def direction_piece(n: int, hidden, weight, a, budget: int, softcap: float) -> int:
    """How many rows at a time are finished in the forward when only hidden wants a gradient; 0 where this does not pay:
    the logits of all rows can be kept, or the budget is too small for the result or for a piece of 64 rows."""
    if not n or capturing(hidden) or kept_rows(n, hidden, weight, a, budget, not softcap) >= n:
        return 0
    room = budget - n * hidden.shape[1] * hidden.dtype.itemsize
    if room < budget // 2:
        return 0
    rows = most_kept(n, hidden, weight, a, room, not softcap)
    return rows if rows >= 64 else 0


def may_finish(frozen: bool, with_entropy: bool, exact: bool) -> bool:
    # An entropy has a gradient of its own; batch_invariant wants one way of rounding for any number of rows.
    return frozen and not with_entropy and not exact


def _directions(hidden, weight, target, bias, a, b, temperature, softcap, rows, n, budget, piece, outputs):
    """d logprob / d hidden of all scored rows, as the tensor [·, V] that `kept` is; fills logprob and lse."""
    d, v, dtype = hidden.shape[1], len(weight), compute_dtype(hidden)
    kept = hidden.new_empty(-(-n * d * hidden.dtype.itemsize // (v * dtype.itemsize)), v, dtype=dtype)
    kept[-1].zero_()  # of which a part may stay unused
    direction = _as_rows(kept, n, hidden)
    room = budget - n * d * hidden.dtype.itemsize
    logprob, lse, _ = outputs
    ignore_index = -1  # every row of a piece is scored
    for begin, end in spans(0, n, piece):
        x, y = take(hidden, rows, begin, end), take(target, rows, begin, end)
        low = None if a is None else take(a, rows, begin, end)
        tensors = (x, weight, y, bias, low, b, temperature, softcap, ignore_index)
        logprob[begin:end], lse[begin:end], _, logits = forward(*tensors, False, room, True)
        stats, ones = (logprob[begin:end], lse[begin:end], None), torch.ones_like(lse[begin:end])
        needs = [True, False, False, False, False]
        direction[begin:end], *_ = backward(*tensors, room, *stats, logits, ones, None, needs)
    return kept


def _as_rows(kept, n, hidden):
    d = hidden.shape[1]
    return kept.view(-1).view(hidden.dtype)[: n * d].view(n, d)


def _scaled(hidden, scored, active, kept, grad_logprob):
    """The incoming gradient times the direction, in float32 and rounded once; exactly zero where the gradient is."""
    direction = _as_rows(kept, int(scored.sum()), hidden)
    grad = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    rows, place = active.nonzero()[:, 0], (scored.cumsum(0) - 1)[active]
    for begin, end in spans(0, len(rows), max(1, (1 << 20) // hidden.shape[1])):
        r = rows[begin:end]
        grad[r] = (direction[place[begin:end]] * grad_logprob[r, None]).to(grad.dtype)
    return grad
