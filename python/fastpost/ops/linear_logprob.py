# SPDX-License-Identifier: Apache-2.0
"""linear_logprob: log-probabilities from hidden states and the output weight, the [N, V] logits never stored whole.

Logits are made a tile at a time with torch's own GEMM; between GEMMs the core (cpp/ops/linear_logprob.cpp) does
everything else in one pass. The gradient of a logit needs only its row's log-sum-exp, so the backward makes each tile
again (8·N·V·D operations in all), unless the byte budget allowed the forward to keep it (6·N·V·D, three GEMMs).
"""

from __future__ import annotations

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
                                        ignore_index=ignore_index, return_entropy=return_entropy)
    expect_plain("linear_logprob", hidden=hidden, weight=weight, target=target, bias=bias)
    if memory_budget is None:
        memory_budget = DEFAULT_MEMORY_BUDGET
    if memory_budget < SMALLEST_MEMORY_BUDGET:
        raise ValueError(f"[linear_logprob] memory_budget: expected at least {SMALLEST_MEMORY_BUDGET} bytes (1 MiB), "
                         f"got {memory_budget}.")
    if torch.is_autocast_enabled(hidden.device.type):  # as F.linear does
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    logprob, _, entropy, _ = _forward_op(hidden, weight, target, bias, temperature, softcap or 0.0, ignore_index,
                                         return_entropy, memory_budget, keep)
    return (logprob, entropy) if return_entropy else logprob


# ---- the plan: how much at a time, and what is kept --------------------------------------------------------------------


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


def _spans(n: int, step: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + step, n)) for i in range(0, n, step))


def _take(t: torch.Tensor, rows: torch.Tensor | None, begin: int, end: int) -> torch.Tensor:
    return t[begin:end] if rows is None else t.index_select(0, rows[begin:end])


# ---- forward -----------------------------------------------------------------------------------------------------------


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
        for begin, end in [*_spans(kept_rows, p.rows), *((b + kept_rows, e + kept_rows) for b, e in
                                                          _spans(n - kept_rows, p.rows))]:
            x, y = _take(hidden, rows, begin, end).to(dtype), _take(target, rows, begin, end)
            stats = torch.zeros(5, end - begin, dtype=torch.float32, device=hidden.device)
            stats[0] = -torch.inf
            for v0, v1 in _spans(v, p.cols):
                if end <= kept_rows:
                    z = kept[begin:end, v0:v1]
                else:
                    z = tile[: (end - begin) * (v1 - v0)].view(end - begin, v1 - v0)
                torch.mm(x, weight[v0:v1].to(dtype).T, out=z)
                _core.linear_logprob_tile(z, None if bias is None else bias[v0:v1], y, v0, temperature, softcap,
                                          with_entropy, stats)
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


# ---- backward ----------------------------------------------------------------------------------------------------------


def _backward(hidden, weight, target, bias, temperature, softcap, ignore_index, memory_budget, logprob, lse, entropy,
              kept,
              grad_logprob, grad_entropy, needs_hidden, needs_weight, needs_bias):
    with torch.autocast(hidden.device.type, enabled=False):
        return _Backward(hidden, weight, target, bias, temperature, softcap, ignore_index, memory_budget, logprob, lse,
                         entropy, kept, grad_logprob, grad_entropy).run(needs_hidden, needs_weight, needs_bias)


class _Backward:
    """One backward pass: which rows, where their logits come from, and the sweep over tiles."""

    def __init__(self, hidden, weight, target, bias, temperature, softcap, ignore_index, memory_budget, logprob, lse,
                 entropy, kept, grad_logprob, grad_entropy):
        self.hidden, self.weight, self.target = hidden, weight, target
        self.temperature, self.softcap = temperature, softcap
        self.logprob, self.lse, self.entropy = logprob, lse, entropy
        self.grad_logprob, self.grad_entropy = grad_logprob, grad_entropy
        self.dtype = _compute_dtype(hidden)
        self.bias = None if bias is None else bias.to(self.dtype)

        # Scored rows in the forward's order, then those of them whose gradient is not zero.
        scored = target != ignore_index
        active = scored & ((grad_logprob != 0) if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0))
        self.rows = _scored_rows(active)
        n_scored = int(scored.sum())
        self.n = len(target) if self.rows is None else len(self.rows)
        v, d = weight.shape
        self.kept, kept_rows = kept, len(kept)
        # Where in the forward's order each active row stood; None when it is the identity.
        self.place = None if self.n == n_scored else scored.cumsum(0)[self.rows] - 1
        self.n_kept = min(self.n, kept_rows) if self.place is None else int((self.place < kept_rows).sum())
        # The tile of kept logits that were gathered is a second one: plan for half the budget then.
        self.plan = plan(self.n, v, d, self.dtype.itemsize, memory_budget if self.place is None else memory_budget // 2)
        self.tile = torch.empty(self.plan.rows * self.plan.cols, dtype=self.dtype, device=hidden.device)

    def run(self, needs_hidden, needs_weight, needs_bias):
        (v, d), dtype, p = self.weight.shape, self.hidden.dtype, self.plan
        self.grad_hidden = self.grad_weight = self.grad_bias = None
        if needs_hidden:
            make = torch.empty_like if self.rows is None and self.n else torch.zeros_like
            self.grad_hidden = make(self.hidden, memory_format=torch.contiguous_format)
        if needs_weight:
            make = torch.empty_like if self.n else torch.zeros_like
            self.grad_weight = make(self.weight, memory_format=torch.contiguous_format)
        if needs_bias:
            self.grad_bias = torch.zeros(v, dtype=torch.float32, device=self.hidden.device)
        if self.n:
            if not needs_weight or p.sweep == "twice":
                self.sweep_rows(needs_hidden, False, needs_bias)
                if needs_weight:
                    self.sweep_cols(False, True, False)
            elif not needs_hidden or p.sweep == "cols":
                self.sweep_cols(needs_hidden, needs_weight, needs_bias)
            else:
                self.sweep_rows(needs_hidden, needs_weight, needs_bias)
        none = self.hidden.new_empty(0)
        return (
            none if self.grad_hidden is None else self.grad_hidden,
            none if self.grad_weight is None else self.grad_weight,
            none if self.grad_bias is None else self.grad_bias.to(dtype),
        )

    def row_blocks(self):
        """Blocks that hold either kept or recomputed rows, never both."""
        yield from _spans(self.n_kept, self.plan.rows)
        yield from ((b + self.n_kept, e + self.n_kept) for b, e in _spans(self.n - self.n_kept, self.plan.rows))

    def grad_tile(self, begin, end, v0, v1, x, w):
        """d loss / d logits of one tile, written to self.tile."""
        grad = self.tile[: (end - begin) * (v1 - v0)].view(end - begin, v1 - v0)
        if end > self.n_kept:
            z = torch.mm(x, w.T, out=grad)
        elif self.place is None:
            z = self.kept[begin:end, v0:v1]
        else:
            z = self.kept[:, v0:v1].index_select(0, self.place[begin:end])
        has_entropy = self.grad_entropy is not None
        _core.linear_logprob_tile_backward(
            z, None if self.bias is None else self.bias[v0:v1], _take(self.target, self.rows, begin, end), v0,
            self.temperature, self.softcap, _take(self.logprob, self.rows, begin, end),
            _take(self.lse, self.rows, begin, end),
            _take(self.entropy, self.rows, begin, end) if has_entropy else None,
            _take(self.grad_logprob, self.rows, begin, end),
            _take(self.grad_entropy, self.rows, begin, end) if has_entropy else None, grad,
        )  # fmt: skip
        if self.grad_bias is not None and self.wants_bias:
            self.grad_bias[v0:v1] += grad.sum(0, dtype=torch.float32)
        return grad

    def sweep_rows(self, needs_hidden, needs_weight, needs_bias):
        """Row blocks outside: the hidden gradient of a block is finished at once, the weight gradient is summed."""
        self.wants_bias, p = needs_bias, self.plan
        v, d = self.weight.shape
        weight_sum = _Sum(self.grad_weight, v, d, parts=len([*self.row_blocks()])) if needs_weight else None
        for begin, end in self.row_blocks():
            x = _take(self.hidden, self.rows, begin, end).to(self.dtype)
            out = None
            if needs_hidden and self.rows is None:
                out = self.grad_hidden[begin:end]
            elif needs_hidden:
                out = self.grad_hidden.new_empty(end - begin, d)
            hidden_sum = _Sum(out, end - begin, d, parts=-(-v // p.cols)) if needs_hidden else None
            for v0, v1 in _spans(v, p.cols):
                w = self.weight[v0:v1].to(self.dtype)
                grad = self.grad_tile(begin, end, v0, v1, x, w)
                if needs_hidden:
                    hidden_sum.add(grad, w, 0, end - begin)
                if needs_weight:
                    weight_sum.add(grad.T, x, v0, v1)
            if needs_hidden:
                hidden_sum.finish()
                if self.rows is not None:
                    self.grad_hidden.index_copy_(0, self.rows[begin:end], out)
        if needs_weight:
            weight_sum.finish()

    def sweep_cols(self, needs_hidden, needs_weight, needs_bias):
        """Vocabulary slices outside: the weight gradient of a slice is finished at once, the hidden gradient is summed."""
        self.wants_bias, p = needs_bias, self.plan
        v, d = self.weight.shape
        out = None
        if needs_hidden:
            out = self.grad_hidden if self.rows is None else self.grad_hidden.new_empty(self.n, d)
            hidden_sum = _Sum(out, self.n, d, parts=-(-v // p.cols))
        for v0, v1 in _spans(v, p.cols):
            w = self.weight[v0:v1].to(self.dtype)
            weight_sum = _Sum(self.grad_weight[v0:v1], v1 - v0, d, parts=len([*self.row_blocks()])) if needs_weight else None
            for begin, end in self.row_blocks():
                x = _take(self.hidden, self.rows, begin, end).to(self.dtype)
                grad = self.grad_tile(begin, end, v0, v1, x, w)
                if needs_hidden:
                    hidden_sum.add(grad, w, begin, end)
                if needs_weight:
                    weight_sum.add(grad.T, x, 0, v1 - v0)
            if needs_weight:
                weight_sum.finish()
        if needs_hidden:
            hidden_sum.finish()
            if self.rows is not None:
                self.grad_hidden.index_copy_(0, self.rows, out)


class _Sum:
    """A gradient that is one GEMM, or a float32 sum of several: bfloat16 sums over chunks bend the loss curve."""

    def __init__(self, out, rows, cols, parts):
        self.out, self.parts = out, parts
        self.total = out if out.dtype == torch.float32 else None
        if parts > 1:
            if self.total is None:
                self.total = torch.zeros(rows, cols, dtype=torch.float32, device=out.device)
            else:
                self.total.zero_()

    def add(self, a, b, begin, end):
        if self.parts == 1 and a.dtype == self.out.dtype:
            torch.mm(a, b, out=self.out[begin:end])
        elif self.parts == 1:
            self.out[begin:end] = torch.mm(a, b)
        elif a.dtype == torch.float32:
            torch.addmm(self.total[begin:end], a, b, out=self.total[begin:end])
        elif a.device.type == "cuda":
            self.total[begin:end] += torch.mm(a, b, out_dtype=torch.float32)
        else:  # torch has no bfloat16 GEMM with float32 output on CPU
            self.total[begin:end] += torch.mm(a, b)

    def finish(self):
        if self.parts > 1 and self.total is not self.out:
            self.out.copy_(self.total)


def _backward_fake(hidden, weight, target, bias, temperature, softcap, ignore_index, memory_budget, logprob, lse, entropy,
                   kept, grad_logprob, grad_entropy, needs_hidden, needs_weight, needs_bias):
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
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in
                                           zip(grads, (needs_hidden, needs_weight, needs_bias)))
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
