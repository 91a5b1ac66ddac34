# SPDX-License-Identifier: Apache-2.0
"""linear_logprob: log-probabilities from hidden states and the output weight, the [N, V] logits never stored whole.

Logits are made a tile at a time with torch's own GEMM; between GEMMs the core (cpp/ops/linear_logprob.cpp) does
everything else in one pass. The gradient of a logit needs only its row's log-sum-exp, so the backward makes each tile
again (8·N·V·D operations in all), unless the byte budget allowed the forward to keep it (6·N·V·D, three GEMMs).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastpost import _core
from fastpost.ops._register import USE_REFERENCE, contiguous_float, expect_plain, register
from fastpost.reference import linear_logprob as reference

DEFAULT_MEMORY_BUDGET = 256 << 20
SMALLEST_MEMORY_BUDGET = 1 << 20


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    memory_budget: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target under ``softmax(z)``, ``z = softcap(hidden · weightᵀ + bias) / temperature``.

    Drop-in for ``log_softmax(lm_head(hidden)).gather(target)``. Extra memory (beyond inputs, outputs and gradients)
    stays below `memory_budget` whatever N and V. Rows whose target is `ignore_index` cost nothing, and rows whose
    incoming gradient is zero cost nothing in the backward.

    Args:
        hidden: [N, D] float32, bfloat16 or float16.
        weight: [V, D], dtype and device of `hidden`.
        target: [N] int64 in [0, V), or `ignore_index`.
        bias: [V], dtype of `hidden`, or None.
        temperature: divides the logits (after the softcap).
        softcap: c > 0 replaces each logit x by c·tanh(x / c); None for none.
        ignore_index: rows with this target get 0 and no gradient.
        return_entropy: also return H = -Σ_j p_j log p_j per row.
        memory_budget: bytes, at least 1 MiB; default 256 MiB. Half of it at most is held between forward and backward.

    Returns:
        log-probabilities [N] float32, in nats, differentiable in `hidden`, `weight` and `bias`; with
        `return_entropy` a pair (logprob [N], entropy [N]), both differentiable.

    Raises:
        ValueError: wrong dtype, shape, device or layout, or (on CPU) a target outside [0, V).
    """
    if USE_REFERENCE:
        return reference.linear_logprob(hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap,
                                        ignore_index=ignore_index, return_entropy=return_entropy)  # fmt: skip
    expect_plain("linear_logprob", hidden=hidden, weight=weight, target=target, bias=bias)
    if memory_budget is None:
        memory_budget = DEFAULT_MEMORY_BUDGET
    if memory_budget < SMALLEST_MEMORY_BUDGET:
        raise ValueError(
            f"[linear_logprob] memory_budget: expected at least {SMALLEST_MEMORY_BUDGET} bytes (1 MiB), "
            f"got {memory_budget}."
        )
    if torch.is_autocast_enabled(hidden.device.type):  # as F.linear does
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    logprob, _, entropy, _ = _forward_op(
        hidden, weight, target, bias, temperature, softcap or 0.0, ignore_index, return_entropy, memory_budget, keep
    )
    return (logprob, entropy) if return_entropy else logprob


# ---- the plan: how much at a time, and what is kept ------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How N rows and V columns are cut: a pure function of shapes and budget."""

    rows: int  # rows of a tile
    cols: int  # vocabulary slice of a tile
    kept: int  # the logits of this many first rows are kept for the backward
    sweep: str  # backward: "rows" outer, "cols" outer, or "twice" (no room for a float32 accumulator of either kind)


def plan(n: int, v: int, d: int, itemsize: int, budget: int) -> Plan:
    """An eighth of the budget for the tile, an eighth for a gathered row block, then float32 sums; kept logits get what
    is left, at most half."""
    part = budget // 8
    tile = part // itemsize  # elements
    most = max(64, part // (4 * d))  # rows of float32 [·, D] that fit a part
    cols = min(v, most, max(4096, tile // max(n, 1)), max(64, tile // 64))
    cols = -(-v // -(-v // cols)) if v else 1  # slices of nearly equal width
    rows = max(1, min(n, tile // cols, part // (itemsize * d)))
    slices, blocks = -(-v // cols), -(-n // rows)
    # Sums across tiles; one GEMM over everything needs none.
    by_cols = (n * d * 4 if slices > 1 else 0) + (cols * d * 4 if blocks > 1 else 0)
    by_rows = (v * d * 4 if blocks > 1 else 0) + (rows * d * 4 if slices > 1 else 0)
    sums, sweep = min((by_cols, "cols"), (by_rows, "rows"))
    if sums > 6 * part:
        sums, sweep, rows = part, "twice", min(rows, most)
    kept = min(n, min(4 * part, 6 * part - sums) // max(1, v * itemsize))
    return Plan(rows, cols, kept if kept * 16 >= n else 0, sweep)  # a sixteenth kept is not worth its memory


def _compute_dtype(t: torch.Tensor) -> torch.dtype:
    # Half precision GEMMs on CPU run at 20 GFLOP/s where float32 reaches 150 (measured, torch 2.13, AVX-512), so tiles
    # are converted to float32 there.
    return torch.float32 if t.dtype == torch.float16 and t.device.type == "cpu" else t.dtype


def _scored_rows(mask: torch.Tensor) -> torch.Tensor | None:
    """Indices of True, or None when all are: then rows are taken as slices, without a copy."""
    return None if bool(mask.all()) else mask.nonzero()[:, 0]


def _spans(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + step, end)) for i in range(begin, end, step))


def _take(t: torch.Tensor, rows: torch.Tensor | None, begin: int, end: int) -> torch.Tensor:
    return t[begin:end] if rows is None else t.index_select(0, rows[begin:end])


# ---- forward ---------------------------------------------------------------------------------------------------------


def _forward(hidden, weight, target, bias, temperature, softcap, ignore_index, with_entropy, memory_budget, keep):
    _core.linear_logprob_check(hidden, weight, bias, target, temperature, softcap, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        outputs = _row_outputs(hidden, with_entropy)
        rows = _scored_rows(target != ignore_index)
        n, v, d = len(target) if rows is None else len(rows), weight.shape[0], weight.shape[1]
        dtype = _compute_dtype(hidden)
        bias = None if bias is None else bias.to(dtype)
        p = plan(n, v, d, dtype.itemsize, memory_budget)
        kept_rows = p.kept if keep else 0
        kept = torch.empty(kept_rows, v, dtype=dtype, device=hidden.device)
        tile = torch.empty(p.rows * p.cols if kept_rows < n else 0, dtype=dtype, device=hidden.device)
        row_outputs = outputs if rows is None else [t.new_empty(min(len(t), n)) for t in outputs]
        for begin, end in [*_spans(0, kept_rows, p.rows), *_spans(kept_rows, n, p.rows)]:
            x, y = _take(hidden, rows, begin, end).to(dtype), _take(target, rows, begin, end)
            stats = torch.zeros(5, end - begin, dtype=torch.float32, device=hidden.device)
            stats[0] = -torch.inf
            stats[4] = torch.nan  # stays where a target is in no slice (CUDA does not look at targets before)
            for v0, v1 in _spans(0, v, p.cols):
                if end <= kept_rows:
                    z = kept[begin:end, v0:v1]
                else:
                    z = tile[: (end - begin) * (v1 - v0)].view(end - begin, v1 - v0)
                torch.mm(x, weight[v0:v1].to(dtype).T, out=z)
                _core.linear_logprob_tile(
                    z, None if bias is None else bias[v0:v1], y, v0, temperature, softcap, with_entropy, stats
                )
            slices = [t[begin:end] for t in row_outputs]
            _core.linear_logprob_finish(stats, slices[0], slices[1], slices[2] if with_entropy else None)
        if rows is not None:
            for out, of_rows in zip(outputs, row_outputs):
                if len(out):
                    out.zero_().index_copy_(0, rows, of_rows)
    return *outputs, kept


def _row_outputs(hidden, with_entropy):
    """logprob, lse, entropy (empty when not asked for)."""
    n = hidden.shape[0]
    return [torch.empty(k, dtype=torch.float32, device=hidden.device) for k in (n, n, n if with_entropy else 0)]


def _forward_fake(hidden, weight, target, bias, temperature, softcap, ignore_index, with_entropy, memory_budget, keep):
    # How many rows are scored, and so kept, is known only at run time.
    kept_rows = torch.library.get_ctx().new_dynamic_size() if keep else 0
    kept = hidden.new_empty(kept_rows, weight.shape[0], dtype=_compute_dtype(hidden))
    return *_row_outputs(hidden, with_entropy), kept


# ---- backward --------------------------------------------------------------------------------------------------------


def _backward(hidden, weight, target, bias, temperature, softcap, ignore_index, memory_budget, logprob, lse, entropy,
              kept, grad_logprob, grad_entropy, needs_hidden, needs_weight, needs_bias):  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False):
        sweep = _Backward(hidden, weight, target, bias, temperature, softcap, ignore_index, memory_budget, logprob, lse,
                          entropy, kept, grad_logprob, grad_entropy)  # fmt: skip
        return sweep.run(needs_hidden, needs_weight, needs_bias)


class _Backward:
    """One backward pass: which rows, where their logits come from, and the sweep over tiles."""

    def __init__(self, hidden, weight, target, bias, temperature, softcap, ignore_index, memory_budget, logprob, lse,
                 entropy, kept, grad_logprob, grad_entropy):  # fmt: skip
        self.hidden, self.weight, self.kept = hidden, weight, kept
        self.transform = temperature, softcap
        self.dtype = _compute_dtype(hidden)
        self.bias = None if bias is None else bias.to(self.dtype)
        # Scored rows in the forward's order, then those of them whose gradient is not zero.
        scored = target != ignore_index
        active = scored & ((grad_logprob != 0) if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0))
        self.rows = _scored_rows(active)
        per_row = (target, logprob, lse, entropy, grad_logprob, grad_entropy)
        self.per_row = [t if t is None or self.rows is None else t[self.rows] for t in per_row]
        self.n, n_scored = len(self.per_row[0]), int(scored.sum())
        # Which row of `kept` each active row is; None when row i is row i.
        self.place = None if self.n == n_scored else scored.cumsum(0)[self.rows] - 1
        self.n_kept = min(self.n, len(kept)) if self.place is None else int((self.place < len(kept)).sum())
        self.plan = plan(self.n, *weight.shape, self.dtype.itemsize, memory_budget)
        self.tile = torch.empty(self.plan.rows * self.plan.cols, dtype=self.dtype, device=hidden.device)

    def run(self, needs_hidden, needs_weight, needs_bias):
        def result(like, needed):
            if not needed:
                return self.hidden.new_empty(0)
            make = torch.empty_like if self.n and (self.rows is None or like is not self.hidden) else torch.zeros_like
            return make(like, memory_format=torch.contiguous_format)

        hidden, weight = result(self.hidden, needs_hidden), result(self.weight, needs_weight)
        bias = torch.zeros(len(self.weight) if needs_bias else 0, dtype=torch.float32, device=self.hidden.device)
        targets = (hidden if needs_hidden else None, weight if needs_weight else None, bias if needs_bias else None)
        if self.n and needs_hidden and needs_weight and self.plan.sweep == "twice":
            self.sweep("rows", targets[0], None, None)
            self.sweep("cols", None, *targets[1:])
        elif self.n:
            both = needs_hidden and needs_weight
            self.sweep(self.plan.sweep if both else "rows" if needs_hidden else "cols", *targets)
        return hidden, weight, bias.to(self.hidden.dtype)

    def sweep(self, outer, grad_hidden, grad_weight, grad_bias):
        """Every tile once. With rows outside, the hidden gradient of a block is finished before the next block begins
        and the weight gradient is summed all along; with columns outside, the other way round."""
        p, v = self.plan, len(self.weight)
        # A block holds either kept or recomputed rows, never both.
        blocks = [*_spans(0, self.n_kept, p.rows), *_spans(self.n_kept, self.n, p.rows)]
        slices = [*_spans(0, v, p.cols)]
        hidden_sums = _Sums(grad_hidden, parts=len(slices), rows=self.rows)
        weight_sums = _Sums(grad_weight, parts=len(blocks))
        for block, cut in (
            itertools.product(blocks, slices) if outer == "rows" else ((b, c) for c in slices for b in blocks)
        ):
            x, w = _take(self.hidden, self.rows, *block).to(self.dtype), self.weight[slice(*cut)].to(self.dtype)
            grad = self.grad_logits(block, cut, x, w)
            if grad_hidden is not None:
                hidden_sums.add(block, grad, w)
            if grad_weight is not None:
                weight_sums.add(cut, grad.T, x)
            if grad_bias is not None:
                grad_bias[slice(*cut)] += grad.sum(0, dtype=torch.float32)

    def grad_logits(self, block, cut, x, w):
        """d loss / d logits of one tile, in self.tile until the next call."""
        (begin, end), (v0, v1) = block, cut
        grad = self.tile[: (end - begin) * (v1 - v0)].view(end - begin, v1 - v0)
        if end > self.n_kept:
            logits = torch.mm(x, w.T, out=grad)
        elif self.place is None:
            logits = self.kept[begin:end, v0:v1]
        else:  # some rows dropped out since the forward
            logits = torch.index_select(self.kept[:, v0:v1], 0, self.place[begin:end], out=grad)
        target, logprob, lse, entropy, grad_logprob, grad_entropy = (
            None if t is None else t[begin:end] for t in self.per_row
        )
        bias = None if self.bias is None else self.bias[v0:v1]
        _core.linear_logprob_tile_backward(
            logits, bias, target, v0, *self.transform, logprob, lse, entropy, grad_logprob, grad_entropy, grad
        )
        return grad


class _Sums:
    """Blocks of rows of a gradient, each the sum of `parts` GEMMs. A sum of several is held in float32 until it is
    complete: bfloat16 sums over chunks bend loss curves."""

    def __init__(self, out, parts, rows=None):
        self.out, self.parts, self.rows = out, parts, rows
        self.open = {}  # block -> [sum so far, parts seen]

    def add(self, block, a, b):
        begin, end = block
        in_place = self.rows is None and a.dtype == self.out.dtype
        if self.parts == 1:
            if in_place:
                torch.mm(a, b, out=self.out[begin:end])
            else:
                self.write(block, torch.mm(a, b))
            return
        if block not in self.open:
            in_place = in_place and self.out.dtype == torch.float32
            shape = len(a), b.shape[1]
            total = self.out[begin:end] if in_place else torch.empty(shape, dtype=torch.float32, device=a.device)
            self.open[block] = [total.zero_(), 0]
        total = self.open[block][0]
        if a.dtype == torch.float32:
            torch.addmm(total, a, b, out=total)
        elif a.device.type == "cuda":
            total += torch.mm(a, b, out_dtype=torch.float32)
        else:  # torch has no bfloat16 GEMM with a float32 result on CPU
            total += torch.mm(a, b)
        self.open[block][1] += 1
        if self.open[block][1] == self.parts:
            self.write(block, total)
            del self.open[block]

    def write(self, block, total):
        begin, end = block
        if self.rows is not None:
            self.out.index_copy_(0, self.rows[begin:end], total.to(self.out.dtype))
        elif total.data_ptr() != self.out[begin:end].data_ptr():
            self.out[begin:end] = total


def _backward_fake(hidden, weight, target, bias, temperature, softcap, ignore_index, memory_budget, logprob, lse,
                   entropy, kept, grad_logprob, grad_entropy, needs_hidden, needs_weight, needs_bias):  # fmt: skip
    def like(t, needed):
        return torch.empty_like(t, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)

    return like(hidden, needs_hidden), like(weight, needs_weight), like(bias, needs_bias)


def _setup_context(ctx, inputs, output):
    hidden, weight, target, bias, ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.with_entropy, *rest = inputs
    ctx.memory_budget = rest[0]
    logprob, lse, entropy, kept = output
    ctx.mark_non_differentiable(lse, kept)
    ctx.save_for_backward(hidden, weight, target, bias, logprob, lse, entropy, kept)


def _autograd(ctx, grad_logprob, _grad_lse, grad_entropy, _grad_kept):
    hidden, weight, target, bias, logprob, lse, entropy, kept = ctx.saved_tensors
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    grads = _backward_op(
        hidden, weight, target, bias, ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.memory_budget, logprob, lse,
        entropy if ctx.with_entropy else None, kept, contiguous_float(grad_logprob),
        contiguous_float(grad_entropy) if ctx.with_entropy else None, needs_hidden, needs_weight, needs_bias,
    )  # fmt: skip
    grad_hidden, grad_weight, grad_bias = (
        g if need else None for g, need in zip(grads, (needs_hidden, needs_weight, needs_bias))
    )
    return grad_hidden, grad_weight, None, grad_bias, None, None, None, None, None, None


_backward_op = register(
    "linear_logprob_backward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float temperature, "
    "float softcap, int ignore_index, int memory_budget, Tensor logprob, Tensor lse, Tensor? entropy, Tensor kept, "
    "Tensor grad_logprob, Tensor? grad_entropy, bool needs_hidden, bool needs_weight, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip
_forward_op = register(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float temperature, float softcap, "
    "int ignore_index, bool with_entropy, int memory_budget, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _autograd, _setup_context,
)  # fmt: skip
