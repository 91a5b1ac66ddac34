# SPDX-License-Identifier: Apache-2.0
"""Experts in four bits: grouped_gemm and the whole mixture, forward and input gradient. The weights are frozen.

One container holds all experts of a matrix: E·N rows of K columns, of which expert e has those from e·N on.

On a CPU each expert that has rows is a product of cpp/ops/int4_gemm.cpp on a view of its rows. H 1024, I 2816, 8
experts of which a token has 2, SwiGLU, bfloat16, one thread of an EPYC with avx512_bf16, medians of CPU time in ms,
interleaved, forward / with backward to x and gates:

    tokens   symmetric, 128   nf4, 64, nested   bfloat16 weights   dequantised first   plain torch in bfloat16
         1      1.4 /   5.6       2.8 /   8.0        3.0 /   5.5           95 /  96              4.7 /  10
         8      4.5 /  19        9.9 /  31         11  /  23             78 /  87             18   /  40
        64     19   /  42        26   /  56         25  /  55             94 / 118             28   /  63
       512    102   / 202       108   / 215         96  / 210            191 / 308            104   / 213

One token forward was 3.4, 2.7 and 3.3 times as fast as plain torch in three runs on a busy machine.

On a GPU nothing may wait for offset to reach the host. As many experts as fit in SLAB_BYTES are made in the dtype of x
at a time, and grouped_gemm's kernels compute with offset[first : last + 1] what those experts have to do. They leave
rows before offset[first] alone and clear rows after offset[last], which the next call fills (cpp/ops.h).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from fastpost import _core
from fastpost.int4 import NESTED_BLOCK, Int4Weight
from fastpost.ops._grouped import summed_back, workspace
from fastpost.ops._register import expect_plain, may_skip_dispatcher, register
from fastpost.ops.int4_gemm import rows_of

SLAB_BYTES = 256 << 20  # of dequantised experts at a time, on a GPU; at least one expert


class Stack(NamedTuple):
    """An Int4Weight as ops of torch take it: flat. columns is K, place is the container's order."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    table: torch.Tensor | None
    group_size: int
    columns: int
    place: torch.Tensor | None
    nested_table: torch.Tensor | None
    nested_outer: torch.Tensor | None
    nested_offset: torch.Tensor | None

    def rows(self, begin: int, end: int) -> tuple:
        """What int4_gemm's kernels take for rows begin to end: views, and nested scales made float32."""
        scales = self.scales[begin:end]
        if self.nested_table is not None:
            g = scales.shape[1]
            block = torch.arange(begin * g, end * g, device=scales.device) // NESTED_BLOCK
            outer = self.nested_outer.index_select(0, block)
            flat = self.nested_table.index_select(0, scales.reshape(-1).int())
            scales = (flat * outer + self.nested_offset).view(scales.shape)
        zeros = None if self.zeros is None else self.zeros[begin:end]
        return self.codes[begin:end], scales, zeros, self.table, self.group_size

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        """Columns of x in the order in which the container has them."""
        return x if self.place is None else x.index_select(1, self.place)

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `stored`."""
        return x if self.place is None else torch.empty_like(x).index_copy_(1, self.place, x)


_FIELDS = ("Tensor {0}codes, Tensor {0}scales, Tensor? {0}zeros, Tensor? {0}table, int {0}group_size, "
           "SymInt {0}columns, Tensor? {0}place, Tensor? {0}nested_table, Tensor? {0}nested_outer, "
           "Tensor? {0}nested_offset")  # fmt: skip
_WIDTH = len(Stack._fields)


def stack(weight: Int4Weight) -> Stack:
    n = weight.nested
    return Stack(weight.codes, weight.scales, weight.zeros, weight.table, weight.group_size, weight.columns,
                 weight.order, *((n.table, n.outer, n.offset) if n else (None, None, None)))  # fmt: skip


def expect_experts(op: str, argument: str, weight: Int4Weight, experts: int) -> int:
    """N, the rows of each of so many experts."""
    rows = weight.codes.shape[0]
    if experts < 1 or rows % experts:
        raise ValueError(
            f"[{op}] {argument}: expected as many rows for each of {experts} experts, got an Int4Weight of {rows} "
            "rows. offset has one number more than there are experts."
        )
    if weight.codes.requires_grad or weight.scales.requires_grad:
        raise ValueError(
            f"[{op}] {argument}: expected four-bit weights without gradients, got some that require them. Train what "
            "lies beside them (LoRA), or dequantize()."
        )
    return rows // experts


# ---- products --------------------------------------------------------------------------------------------------------


def product(x, w: Stack, offset, order=None, top_k=1, bias=None, code=0, pre=None) -> torch.Tensor:
    """[R, N] or, with an activation, [R, N / 2]. pre: [R, N] to fill, if it is to be kept."""
    experts = offset.numel() - 1
    rows, n = (x if order is None else order).shape[0], w.codes.shape[0] // experts
    out = x.new_empty(rows, n // 2 if code else n)
    if _by_slabs(x):
        for first, last, part in _slabs(w, experts, x):
            some = None if bias is None else bias[first:last]
            _core.grouped_gemm(x, order, top_k, part, offset[first : last + 1], some, code, workspace(part, rows), pre,
                               out)  # fmt: skip
        return out
    parts = _Parts(x, order, top_k, offset)
    x, space = rows_of(w.stored(x)), parts.space(x, (w, n, False))
    spare = x.new_empty(parts.most, n) if code and pre is None else None
    for e, a, b in parts:
        to = out[a:b] if not code else pre[a:b] if pre is not None else spare[: b - a]
        some = None if bias is None else bias[e]
        _core.int4_gemm(parts.take(x, a, b), *w.rows(e * n, (e + 1) * n), some, 0, space, to)
        if code:
            _core.grouped_gemm_activate(to, code, None, out[a:b], None)
    parts.clear_rest(out, pre)
    return out


def turned_product(grad, w: Stack, offset) -> torch.Tensor:
    """grad [R, N] in grouped order times W_e: [R, K]."""
    experts, (rows, n) = offset.numel() - 1, grad.shape
    out = grad.new_empty(rows, w.columns)
    if _by_slabs(grad):
        for first, last, part in _slabs(w, experts, grad):
            turned = part.mT
            _core.grouped_gemm(grad, None, 1, turned, offset[first : last + 1], None, 0, workspace(turned, rows), None,
                               out)  # fmt: skip
        return out
    parts = _Parts(grad, None, 1, offset)
    space = parts.space(grad, (w, n, True))
    for e, a, b in parts:
        _core.int4_gemm_backward(grad[a:b], *w.rows(e * n, (e + 1) * n), space, out[a:b])
    parts.clear_rest(out)
    return w.own(out)


def _by_slabs(x: torch.Tensor) -> bool:
    return x.is_cuda


def _slabs(w: Stack, experts: int, like: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(first, last, matrices [last - first, N, K] in the dtype of `like`), one after the other in the same memory."""
    n, k = w.codes.shape[0] // experts, w.columns
    step = min(experts, max(1, SLAB_BYTES // max(1, n * k * like.element_size())))
    slab = like.new_empty(step * n, k)
    for first in range(0, experts, step):
        last = min(first + step, experts)
        part = slab[: (last - first) * n]
        _core.int4_gemm_dequantize(*w.rows(first * n, last * n), part)
        yield first, last, w.own(part).view(last - first, n, k)


class _Parts:
    """The experts that have rows, on a CPU: iterates over (expert, first row, end)."""

    def __init__(self, x, order, top_k, offset):
        # Looks at x, order and offset as for any grouped_gemm; no columns of no weight are all that it computes.
        _core.grouped_gemm(rows_of(x), order, top_k, x.new_empty(offset.numel() - 1, 0, x.shape[1]), offset, None, 0,
                           None, None, x.new_empty((x if order is None else order).shape[0], 0))  # fmt: skip
        self.bounds = offset.tolist()
        self.token = order if order is None or top_k == 1 else order // top_k
        self.sizes = {b - a for a, b in pairwise(self.bounds)}
        self.most = max(self.sizes)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return ((e, a, b) for e, (a, b) in enumerate(pairwise(self.bounds)) if a < b)

    def take(self, x, a: int, b: int) -> torch.Tensor:
        return x[a:b] if self.token is None else x.index_select(0, self.token[a:b])

    def space(self, like, *products) -> torch.Tensor:
        """Enough for each of these (weight, rows of an expert, whether turned), with the rows that any expert has."""
        threads, most = torch.get_num_threads(), 0
        for w, n, turned in products:
            x = like.new_empty(self.most, n if turned else w.columns)
            sizes = (_core.int4_gemm_bytes(x[:m], w.codes[:n], w.columns, turned, 0, threads) for m in self.sizes)
            most = max(most, *sizes)
        return torch.empty(most, dtype=torch.uint8)

    def clear_rest(self, *tensors) -> None:
        for t in tensors:
            if t is not None and len(t) > self.bounds[-1]:
                t[self.bounds[-1] :].zero_()


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


def grouped_gemm(x, weight: Int4Weight, offset, order, top_k: int, bias, code: int) -> torch.Tensor:
    """fastpost.grouped_gemm with an Int4Weight; code: the number of the activation."""
    expect_plain("grouped_gemm", x=x, codes=weight.codes, offset=offset, order=order, bias=bias)
    experts = offset.numel() - 1
    n = expect_experts("grouped_gemm", "weight", weight, experts)
    if x.ndim != 2 or x.shape[1] != weight.columns:
        raise ValueError(f"[grouped_gemm] x: expected [any, {weight.columns}], got {list(x.shape)}.")
    if bias is not None and tuple(bias.shape) != (experts, n):
        raise ValueError(f"[grouped_gemm] bias: expected [{experts}, {n}], got {list(bias.shape)}.")
    if code and n % 2:
        raise ValueError(f"[grouped_gemm] weight: expected an even N for a gated activation, got {n} rows an expert.")
    quiet = may_skip_dispatcher(x, weight.codes, bias)
    keep = not quiet and code > 0 and torch.is_grad_enabled()
    call = _forward if quiet else _forward_op
    return call(x, offset, order, top_k, bias, code, keep, *stack(weight))[0]


def _forward(x, offset, order, top_k, bias, code, keep, *weight):
    x, w = rows_of(x), Stack(*weight)
    n = w.codes.shape[0] // (offset.numel() - 1)
    pre = x.new_empty((x if order is None else order).shape[0], n) if keep else None
    out = product(x, w, offset, order, top_k, bias, code, pre)
    return out, out.new_empty(0) if pre is None else pre


def _forward_fake(x, offset, order, top_k, bias, code, keep, *weight):
    rows, n = (x if order is None else order).shape[0], weight[0].shape[0] // (offset.shape[0] - 1)
    return x.new_empty(rows, n // 2 if code else n), x.new_empty((rows, n) if keep else 0)


def _backward(grad, offset, order, top_k, pre, code, tokens, wanted, *weight):
    grad, w, none = rows_of(grad), Stack(*weight), grad.new_empty(0)
    if code:
        grad_pre = torch.empty_like(pre)
        _core.grouped_gemm_activate(pre, code, grad, None, grad_pre)
        grad = grad_pre
    grad_bias = none
    if wanted[1]:
        e, n = offset.numel() - 1, grad.shape[1]
        grad_bias = grad.new_empty(e, n)
        like = grad.new_empty(e, n, 0)
        _core.grouped_gemm_weight_gradient(grad, None, 1, grad.new_empty(len(grad), 0), None, 1, offset,
                                           workspace(like, len(grad)), like, grad_bias)  # fmt: skip
    if not wanted[0]:
        return none, grad_bias
    grad_x = turned_product(grad, w, offset)
    if order is not None:
        grad_x = summed_back(grad_x, order, top_k, tokens)
    return grad_x, grad_bias


def _backward_fake(grad, offset, order, top_k, pre, code, tokens, wanted, *weight):
    none, e = grad.new_empty(0), offset.shape[0] - 1
    w = Stack(*weight)
    return (grad.new_empty(tokens, w.columns) if wanted[0] else none,
            grad.new_empty(e, w.codes.shape[0] // e) if wanted[1] else none)  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, offset, order, ctx.top_k, _, ctx.code, _, *weight = inputs
    ctx.tokens = x.shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    _keep(ctx, (offset, order, output[1]), weight)


def _autograd(ctx, grad, _):
    count = 7 + _WIDTH
    if grad is None:
        return (None,) * count
    (offset, order, pre), weight = _kept(ctx, 3)
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[4]]
    grad_x, grad_bias = _backward_op(grad, offset, order, ctx.top_k, pre, ctx.code, ctx.tokens, need, *weight)
    return (grad_x if need[0] else None, None, None, None, grad_bias if need[1] else None, *[None] * (count - 5))


def _keep(ctx, tensors, fields) -> None:
    """save_for_backward of tensors and of a Stack's fields (or two Stacks')."""
    ctx.fields = [None if isinstance(f, torch.Tensor) else f for f in fields]
    ctx.save_for_backward(*tensors, *(f if isinstance(f, torch.Tensor) else None for f in fields))


def _kept(ctx, count: int):
    saved = ctx.saved_tensors
    return saved[:count], [f if t is None else t for f, t in zip(ctx.fields, saved[count:], strict=True)]


# ---- the mixture -----------------------------------------------------------------------------------------------------


def experts(x, plan, gate, up: Int4Weight, down: Int4Weight, code: int, recompute: bool) -> torch.Tensor:
    """ops/_experts.py's mixture with both matrices in four bits."""
    expect_plain("experts", x=x, gate=gate, up=up.codes, down=down.codes, offset=plan.offset)
    count = plan.offset.numel() - 1
    for name, weight in (("up", up), ("down", down)):
        expect_experts("experts", name, weight, count)
    inner, hidden = down.columns, down.codes.shape[0] // count
    if x.ndim != 2 or not x.shape[1] == up.columns == hidden or up.codes.shape[0] // count != 2 * inner:
        raise ValueError(
            f"[experts] expected x [T, H], up [{count}·2I, H] and down [{count}·H, I], got {list(x.shape)}, "
            f"{list(up.shape)} and {list(down.shape)}."
        )
    gate = gate.to(torch.float32)
    quiet = may_skip_dispatcher(x, gate, up.codes, down.codes)
    keep = not (quiet or recompute) and torch.is_grad_enabled()
    return (_mixture if quiet else _mixture_op)(x, gate, *plan, code, keep, *stack(up), *stack(down))[0]


def _pair(weights) -> tuple[Stack, Stack]:
    return Stack(*weights[:_WIDTH]), Stack(*weights[_WIDTH:])


def _mixture(x, gate, offset, order, place, code, keep, *weights):
    x, (up, down), top_k = rows_of(x), _pair(weights), place.shape[1]
    pre = x.new_empty(order.shape[0], up.codes.shape[0] // (offset.numel() - 1)) if keep else None
    y = product(product(x, up, offset, order, top_k, None, code, pre), down, offset)
    out = torch.empty_like(x)
    _core.moe_combine(y, place, gate, out)
    return out, out.new_empty(0) if pre is None else pre


def _mixture_fake(x, gate, offset, order, place, code, keep, *weights):
    n = weights[0].shape[0] // (offset.shape[0] - 1)
    return x.new_empty(x.shape), x.new_empty((order.shape[0], n) if keep else 0)


def _mixture_backward(grad, x, gate, offset, order, place, pre, code, want_x, *weights):
    """grad_gate = (grad · Down) · act(pre), so that the experts' outputs need not be kept; see _experts.py."""
    grad, x, (up, down), top_k = rows_of(grad), rows_of(x), _pair(weights), place.shape[1]
    grad_gate, grad_x = torch.zeros_like(gate), torch.empty_like(x) if want_x else grad.new_empty(0)
    if _by_slabs(x):
        if pre.numel() == 0:
            pre = product(x, up, offset, order, top_k)
        grad_pre = torch.empty_like(pre)
        for first, last, part in _slabs(down, offset.numel() - 1, x):
            some = torch.empty_like(gate)
            _core.grouped_gemm_activation_backward(grad, order, top_k, part.mT, offset[first : last + 1], pre, code,
                                                   gate.view(-1), workspace(part.mT, len(order)), grad_pre, None,
                                                   some.view(-1))  # fmt: skip
            theirs = (place >= offset[first]) & (place < offset[last])
            grad_gate = torch.where(theirs, some, grad_gate)
        rows = turned_product(grad_pre, up, offset) if want_x else None
    else:
        rows = _each_backward(grad, x, gate.view(-1), offset, order, top_k, pre, code, want_x, up, down,
                              grad_gate.view(-1))  # fmt: skip
    if want_x:
        _core.moe_combine(rows, place, None, grad_x)
    return grad_x, grad_gate


def _each_backward(grad, x, gate, offset, order, top_k, pre, code, want_x, up, down, grad_gate):
    """On a CPU, an expert at a time, so that what lies between its products stays in caches. Fills grad_gate [slots],
    returns grad_x by rows [R, H] (None unless wanted)."""
    experts = offset.numel() - 1
    n, inner, hidden = up.codes.shape[0] // experts, down.columns, down.codes.shape[0] // experts
    parts, x, slot = _Parts(grad, order, top_k, offset), up.stored(x), order.long()
    grad_pre, a = x.new_empty(parts.most, n), x.new_empty(parts.most, inner)
    space = parts.space(x, (up, n, False), (up, n, True), (down, hidden, True))
    rows = x.new_empty(len(order), up.columns) if want_x else None
    for e, begin, end in parts:
        count, slots = end - begin, slot[begin:end]
        theirs, d = up.rows(e * n, (e + 1) * n), x.new_empty(count, inner)
        _core.int4_gemm_backward(parts.take(grad, begin, end), *down.rows(e * hidden, (e + 1) * hidden), space, d)
        d = down.own(d)
        before = pre[begin:end] if pre.numel() else x.new_empty(count, n)
        if not pre.numel():
            _core.int4_gemm(parts.take(x, begin, end), *theirs, None, 0, space, before)
        _core.grouped_gemm_activate(before, code, d, a[:count], grad_pre[:count])
        grad_gate[slots] = (d.float() * a[:count].float()).sum(1)
        if want_x:
            scaled = grad_pre[:count].mul_(gate[slots, None])
            _core.int4_gemm_backward(scaled, *theirs, space, rows[begin:end])
    return up.own(rows) if want_x else None


def _mixture_backward_fake(grad, x, gate, offset, order, place, pre, code, want_x, *weights):
    return x.new_empty(x.shape if want_x else 0), torch.empty_like(gate)


def _mixture_setup(ctx, inputs, output):
    x, gate, offset, order, place, ctx.code, _, *weights = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    _keep(ctx, (x, gate, offset, order, place, output[1]), weights)


def _mixture_autograd(ctx, grad, _):
    count = 7 + 2 * _WIDTH
    if grad is None:
        return (None,) * count
    tensors, weights = _kept(ctx, 6)
    want_x, want_gate = ctx.needs_input_grad[:2]
    grad_x, grad_gate = _mixture_backward_op(grad, *tensors, ctx.code, want_x, *weights)
    return (grad_x if want_x else None, grad_gate if want_gate else None, *[None] * (count - 2))


_ONE, _TWO = _FIELDS.format(""), f"{_FIELDS.format('up_')}, {_FIELDS.format('down_')}"
_backward_op = register(
    "grouped_gemm_int4_backward(Tensor grad, Tensor offset, Tensor? order, int top_k, Tensor pre, int code, "
    f"SymInt tokens, bool[] wanted, {_ONE}) -> (Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip
_forward_op = register(
    "grouped_gemm_int4(Tensor x, Tensor offset, Tensor? order, int top_k, Tensor? bias, int code, bool keep, "
    f"{_ONE}) -> (Tensor, Tensor)",
    _forward, _forward_fake, _autograd, _setup_context,
)  # fmt: skip
_mixture_backward_op = register(
    "moe_experts_int4_backward(Tensor grad, Tensor x, Tensor gate, Tensor offset, Tensor order, Tensor place, "
    f"Tensor pre, int code, bool want_x, {_TWO}) -> (Tensor, Tensor)",
    _mixture_backward, _mixture_backward_fake,
)  # fmt: skip
_mixture_op = register(
    "moe_experts_int4(Tensor x, Tensor gate, Tensor offset, Tensor order, Tensor place, int code, bool keep, "
    f"{_TWO}) -> (Tensor, Tensor)",
    _mixture, _mixture_fake, _mixture_autograd, _mixture_setup,
)  # fmt: skip
