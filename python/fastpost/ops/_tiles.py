# SPDX-License-Identifier: Apache-2.0
"""What linear_logprob does tile by tile: the plan of the cut, the forward's statistics and the backward's sweep.

Shapes: hidden [N, D], weight [V, D], a? [N, r] and b? [V, r] (a low-rank addition to the logits), bias? [V]. The weight
may also be one rank's slice of the vocabulary (fastpost.parallel): a target outside [0, V) is then another's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fastpost import _core
from fastpost.ops import _hopper
from fastpost.ops._register import USE_REFERENCE
from fastpost.reference import linear_logprob as reference


def kernels(t: torch.Tensor):
    """Who works between the GEMMs: the core, or for float64, which is there to check the rest, plain torch."""
    return reference if USE_REFERENCE or t.dtype == torch.float64 else _core


def compute_dtype(t: torch.Tensor) -> torch.dtype:
    # Half precision GEMMs on CPU run at 20 GFLOP/s where float32 reaches 150 (measured, torch 2.13, AVX-512), so tiles
    # are converted to float32 there.
    return torch.float32 if t.dtype == torch.float16 and t.device.type == "cpu" else t.dtype


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics, log-probs and sums over tiles."""
    return torch.promote_types(dtype, torch.float32)


# ---- the plan: how much at a time, and what is kept ------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How N rows and V columns are cut: a pure function of shapes and budget."""

    rows: int  # rows of a tile
    cols: int  # vocabulary slice of a tile
    kept: int  # the logits of this many first rows are kept for the backward
    sweep: str  # backward: "rows" outer, "cols" outer, or "twice" (no room for a float32 accumulator of either kind)


def plan(
    n: int, v: int, d: int, itemsize: int, budget: int, row_width: int | None = None, col_width: int | None = None
) -> Plan:
    """An eighth of the budget for the tile, an eighth for a gathered row block, then float32 sums; kept logits get what
    is left, at most half. row_width, col_width: numbers per row and per vocabulary entry in the gradients that are
    wanted; d each unless given."""
    row_width, col_width = (d if width is None else width for width in (row_width, col_width))
    part = budget // 8
    tile = part // itemsize  # elements
    most = max(64, part // (4 * d))  # rows of float32 [·, D] that fit a part
    cols = min(v, most, max(4096, tile // max(n, 1)), max(64, tile // 64))
    cols = -(-v // -(-v // cols)) if v else 1  # slices of nearly equal width
    rows = max(1, min(n, tile // cols, part // (itemsize * d)))
    slices, blocks = -(-v // cols), -(-n // rows)
    # Sums across tiles; one GEMM over everything needs none.
    by_cols = (n * row_width * 4 if slices > 1 else 0) + (cols * col_width * 4 if blocks > 1 else 0)
    by_rows = (v * col_width * 4 if blocks > 1 else 0) + (rows * row_width * 4 if slices > 1 else 0)
    sums, sweep = min((by_cols, "cols"), (by_rows, "rows"))
    if sums > 6 * part:
        sums, sweep, rows = part, "twice", min(rows, most)
    kept = min(n, min(4 * part, 6 * part - sums) // max(1, v * itemsize))
    return Plan(rows, cols, kept if kept * 16 >= n else 0, sweep)  # a sixteenth kept is not worth its memory


def forward_plan(n: int, hidden, weight, a, budget: int) -> Plan:
    """The plan for n scored rows before it is known which gradients will be wanted."""
    v, d = weight.shape
    width = d + (0 if a is None else a.shape[1])
    return plan(n, v, d, compute_dtype(hidden).itemsize, budget, width, width)


def capturing(t: torch.Tensor) -> bool:
    """Whether a CUDA graph is being recorded. Nothing may then depend on values, so every row is computed."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def scored_rows(mask: torch.Tensor) -> torch.Tensor | None:
    """Indices of True, or None when all are: then rows are taken as slices, without a copy. The host waits for a GPU
    once, and not at all while a graph is recorded."""
    if capturing(mask):
        return None
    rows, count = torch.empty(len(mask), dtype=torch.int64, device=mask.device), mask.new_empty(1, dtype=torch.int64)
    _core.linear_logprob_rows(mask.long(), 0, None, None, rows, count)
    n = int(count)
    return None if n == len(mask) else rows[:n]


def spans(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + step, end)) for i in range(begin, end, step))


def take(t: torch.Tensor, rows: torch.Tensor | None, begin: int, end: int) -> torch.Tensor:
    return t[begin:end] if rows is None else t.index_select(0, rows[begin:end])


def make_logits(x, w, a, b, out):
    """One tile of hidden · weightᵀ + a · bᵀ; the sum never exists as a merged weight."""
    torch.mm(x, w.T, out=out)
    return out if a is None else torch.addmm(out, a, b.T, out=out)


# ---- forward ---------------------------------------------------------------------------------------------------------


def row_statistics(
    hidden, weight, target, bias, a, b, temperature, softcap, with_entropy, rows, p: Plan, kept
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(begin, end, stats [5, end - begin]) of one block of scored rows after the other; `kept` [k, V] is filled with
    the logits of the first k of them."""
    dtype, n, v = compute_dtype(hidden), len(target) if rows is None else len(rows), len(weight)
    bias = None if bias is None else bias.to(dtype)
    columns, step = _hopper.tile_columns(hidden, weight, a), p.rows
    if columns:  # no tile, but partial statistics: up to 16 bytes for each row and tile of columns
        kept, tile_max = _hopper.unpack(kept, columns)
        step = max(1, p.rows * p.cols * dtype.itemsize // (16 * -(-v // columns)))
    tile = torch.empty(p.rows * p.cols if len(kept) < n and not columns else 0, dtype=dtype, device=hidden.device)
    for begin, end in [*spans(0, len(kept), step), *spans(len(kept), n, step)]:
        x, y = take(hidden, rows, begin, end).to(dtype), take(target, rows, begin, end)
        x_low = None if a is None else take(a, rows, begin, end).to(dtype)
        stats = torch.zeros(5, end - begin, dtype=sum_dtype(dtype), device=hidden.device)
        stats[0] = -torch.inf
        stats[4] = torch.nan  # stays where a target is in no slice (CUDA does not look at targets before)
        if columns:
            exponentials = kept[begin:end] if end <= len(kept) else None
            maxima = _hopper.forward(x, weight, bias, y, 0, temperature, softcap, with_entropy, stats, exponentials,
                                     columns)  # fmt: skip
            if exponentials is not None:
                tile_max[:, begin:end] = maxima
            yield begin, end, stats
            continue
        for v0, v1 in spans(0, v, p.cols):
            if end <= len(kept):
                z = kept[begin:end, v0:v1]
            else:
                z = tile[: (end - begin) * (v1 - v0)].view(end - begin, v1 - v0)
            make_logits(x, weight[v0:v1].to(dtype), x_low, None if b is None else b[v0:v1].to(dtype), z)
            kernels(hidden).linear_logprob_tile(
                z, None if bias is None else bias[v0:v1], y, v0, temperature, softcap, with_entropy, stats
            )
        yield begin, end, stats


# ---- backward --------------------------------------------------------------------------------------------------------


class Backward:
    """One backward pass: which rows, where their logits come from, and the sweep over tiles.

    scored, active [N]: masks of the forward's rows and of those with a gradient that is not zero. logprob, lse,
    entropy?, grad_logprob, grad_entropy? [N]; kept [k, V] from the forward. needs: which gradients, in
    the order hidden, weight, bias, a, b, in which `run` returns them (empty where not needed). weight_sum [V, D]
    float32: the weight's gradient is added there instead."""

    def __init__(self, hidden, weight, target, bias, a, b, temperature, softcap, scored, active, memory_budget, logprob,
                 lse, entropy, kept, grad_logprob, grad_entropy, needs, weight_sum=None):  # fmt: skip
        self.hidden, self.weight, self.a, self.b, self.needs = hidden, weight, a, b, needs
        self.weight_sum = weight_sum if needs[1] else None
        self.columns = _hopper.tile_columns(hidden, weight, a)
        self.kept, self.tile_max = _hopper.unpack(kept, self.columns) if self.columns else (kept, None)
        kept = self.kept
        self.transform = temperature, softcap
        self.dtype = compute_dtype(hidden)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.rows = scored_rows(active)
        per_row = (target, logprob, lse, entropy, grad_logprob, grad_entropy)
        self.per_row = [t if t is None or self.rows is None else t[self.rows] for t in per_row]
        self.n = len(self.per_row[0])
        n_scored = self.n if capturing(scored) else int(scored.sum())
        # Which row of `kept` each active row is; None when row i is row i.
        self.place = None if self.n == n_scored else scored.cumsum(0)[self.rows] - 1
        self.n_kept = min(self.n, len(kept)) if self.place is None else int((self.place < len(kept)).sum())
        v, d = weight.shape
        rank = 0 if a is None else a.shape[1]
        sums_weight = needs[1] and weight_sum is None
        row_width, col_width = needs[0] * d + needs[3] * rank, sums_weight * d + needs[4] * rank
        self.plan = plan(self.n, v, d, self.dtype.itemsize, memory_budget, row_width, col_width)
        if self.columns:  # slices begin where tiles do
            cols = max(self.plan.cols // self.columns * self.columns, self.columns)
            self.plan = replace(self.plan, cols=min(v, cols))
        self.tile = torch.empty(self.plan.rows * self.plan.cols, dtype=self.dtype, device=hidden.device)

    def run(self) -> tuple[torch.Tensor, ...]:
        def result(like, needed, per_row=False):
            if not needed:
                return self.hidden.new_empty(0)
            every = self.n and len(self.weight) and (self.rows is None or not per_row)  # is each row written?
            make = torch.empty_like if every else torch.zeros_like
            return make(like, memory_format=torch.contiguous_format)

        needs = self.needs
        hidden, a = result(self.hidden, needs[0], True), result(self.a, needs[3], True)
        b = result(self.b, needs[4])
        weight = result(self.weight, needs[1]) if self.weight_sum is None else self.weight_sum
        bias = torch.zeros(len(self.weight) if needs[2] else 0, dtype=sum_dtype(self.dtype), device=self.hidden.device)
        of_rows = (hidden if needs[0] else None, a if needs[3] else None)
        of_cols = (weight if needs[1] else None, b if needs[4] else None, bias if needs[2] else None)
        if self.n and self.plan.sweep == "twice":
            if needs[0] or needs[3]:
                self.sweep("rows", *of_rows, None, None, None)
            if any(t is not None for t in of_cols):
                self.sweep("cols", None, None, *of_cols)
        elif self.n:
            self.sweep(self.plan.sweep, *of_rows, *of_cols)
        return hidden, weight, bias.to(self.hidden.dtype), a, b

    def sweep(self, outer, grad_hidden, grad_a, grad_weight, grad_b, grad_bias):
        """Every tile once. With rows outside, the hidden gradient of a block is finished before the next block begins
        and the weight gradient is summed all along; with columns outside, the other way round."""
        p, v = self.plan, len(self.weight)
        # A block holds either kept or recomputed rows, never both.
        blocks = [*spans(0, self.n_kept, p.rows), *spans(self.n_kept, self.n, p.rows)]
        slices = [*spans(0, v, p.cols)]
        hidden_sums, a_sums = (Sums(out, parts=len(slices), rows=self.rows) for out in (grad_hidden, grad_a))
        weight_sums, b_sums = (Sums(out, parts=len(blocks)) for out in (grad_weight, grad_b))
        if grad_weight is not None and grad_weight is self.weight_sum:
            weight_sums = Total(grad_weight)
        for block, cut in (
            itertools.product(blocks, slices) if outer == "rows" else ((b, c) for c in slices for b in blocks)
        ):
            x, w = take(self.hidden, self.rows, *block).to(self.dtype), self.weight[slice(*cut)].to(self.dtype)
            x_low = None if self.a is None else take(self.a, self.rows, *block).to(self.dtype)
            w_low = None if self.b is None else self.b[slice(*cut)].to(self.dtype)
            grad = self.grad_logits(block, cut, x, w, x_low, w_low)
            hidden_sums.add(block, grad, w)
            a_sums.add(block, grad, w_low)
            weight_sums.add(cut, grad.T, x)
            b_sums.add(cut, grad.T, x_low)
            if grad_bias is not None:
                grad_bias[slice(*cut)] += grad.sum(0, dtype=grad_bias.dtype)

    def grad_logits(self, block, cut, x, w, x_low, w_low):
        """d loss / d logits of one tile, in self.tile until the next call."""
        (begin, end), (v0, v1) = block, cut
        grad = self.tile[: (end - begin) * (v1 - v0)].view(end - begin, v1 - v0)
        if self.columns:
            return self.grad_from_exponentials(block, cut, x, w, grad)
        if end > self.n_kept:
            logits = make_logits(x, w, x_low, w_low, grad)
        elif self.place is None:
            logits = self.kept[begin:end, v0:v1]
        else:  # some rows dropped out since the forward
            logits = torch.index_select(self.kept[:, v0:v1], 0, self.place[begin:end], out=grad)
        target, logprob, lse, entropy, grad_logprob, grad_entropy = (
            None if t is None else t[begin:end] for t in self.per_row
        )
        bias = None if self.bias is None else self.bias[v0:v1]
        kernels(self.hidden).linear_logprob_tile_backward(
            logits, bias, target, v0, *self.transform, logprob, lse, entropy, grad_logprob, grad_entropy, grad
        )
        return grad

    def grad_from_exponentials(self, block, cut, x, w, grad):
        (begin, end), (v0, v1) = block, cut
        target, *of_rows = (None if t is None else t[begin:end] for t in self.per_row)
        bias = None if self.bias is None else self.bias[v0:v1]
        tiles = slice(v0 // self.columns, -(-v1 // self.columns))
        exponentials = grad.view(torch.float16)
        if end > self.n_kept:
            stats = torch.zeros(5, end - begin, dtype=torch.float32, device=grad.device)  # of no interest any more
            tile_max = _hopper.forward(
                x, w, bias, target, v0, *self.transform, False, stats, exponentials, self.columns
            )
        elif self.place is None:
            exponentials, tile_max = self.kept[begin:end, v0:v1], self.tile_max[tiles, begin:end]
        else:
            place = self.place[begin:end]
            torch.index_select(self.kept[:, v0:v1], 0, place, out=exponentials)
            tile_max = self.tile_max[tiles].index_select(1, place)
        _core.linear_logprob_exponentials_backward(exponentials, tile_max, target, v0, *self.transform, *of_rows, grad)
        return grad


class Sums:
    """Blocks of rows of a gradient `out` (None: not wanted), each the sum of `parts` GEMMs. A sum of several is held in
    float32 until it is complete: bfloat16 sums over chunks bend loss curves."""

    def __init__(self, out, parts, rows=None):
        self.out, self.parts, self.rows = out, parts, rows
        self.open = {}  # block -> [sum so far, parts seen]

    def add(self, block, a, b):
        if self.out is None:
            return
        begin, end = block
        in_place = self.rows is None and a.dtype == self.out.dtype
        if self.parts == 1:
            if in_place:
                torch.mm(a, b, out=self.out[begin:end])
            else:
                self.write(block, torch.mm(a, b))
            return
        exact = sum_dtype(a.dtype)
        if block not in self.open:
            in_place = in_place and a.dtype == exact
            shape = len(a), b.shape[1]
            total = self.out[begin:end] if in_place else torch.empty(shape, dtype=exact, device=a.device)
            self.open[block] = [total.zero_(), 0]
        total = self.open[block][0]
        add_product(total, a, b)
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


class Total:
    """Sums over more than one backward pass: `out` is float32 and holds what came before."""

    def __init__(self, out):
        self.out = out

    def add(self, block, a, b):
        begin, end = block
        add_product(self.out[begin:end], a, b)


def add_product(total, a, b):
    """total += a · b, in the dtype of `total`, which is float32 for bfloat16 factors."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.device.type == "cuda":
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:  # torch has no bfloat16 GEMM with a float32 result on CPU
        total += torch.mm(a, b)
