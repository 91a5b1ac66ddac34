# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm's products by torch's own GEMM, an expert after the other: for CPUs where that is faster than ours, such
as those with matrix units (AMX), and experts with many rows. What is between the products stays ours."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from fastpost import _core

MANY = 32  # rows an expert, from which on a product is bound by its multipliers


def preferred(weight: torch.Tensor, rows: int) -> bool:
    """Whether torch's GEMM is known to be faster for this weight [E, N, K] and so many grouped rows."""
    few = rows < MANY * weight.shape[0]
    return not (weight.is_cuda or few or _core.linear_logprob_fused_preferred(weight))


def spans(offset: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for those that have any."""
    for e, (begin, end) in enumerate(pairwise(offset.tolist())):
        if begin < end:
            yield e, slice(begin, end)


def gathered(x: torch.Tensor, order: torch.Tensor | None, top_k: int) -> torch.Tensor:
    return x if order is None else x.index_select(0, order // top_k)


def product(x, weight, offset, order, top_k, bias, code, pre):
    """See grouped_gemm.product."""
    rows = gathered(x, order, top_k)
    made = x.new_empty(rows.shape[0], weight.shape[1]) if pre is None else pre
    for e, r in spans(offset):
        if bias is None:
            torch.mm(rows[r], weight[e].T, out=made[r])
        else:
            torch.addmm(bias[e], rows[r], weight[e].T, out=made[r])
    made[int(offset[-1]) :] = 0
    if not code:
        return made
    out = made.new_empty(made.shape[0], made.shape[1] // 2)
    _core.grouped_gemm_activate(made, code, None, out, None)
    return out


def activation_backward(grad, order, top_k, weight, offset, pre, code, gate, grad_pre, activated, grad_gate):
    """See grouped_gemm_activation_backward in cpp/ops.h; activated may be None."""
    d = product(grad, weight, offset, order, top_k, None, 0, None)
    a = torch.empty_like(d) if activated is None else activated
    _core.grouped_gemm_activate(pre, code, d, a, grad_pre)
    slots = order.long()
    grad_gate[slots] = (d.float() * a.float()).sum(1)
    scale = gate[slots][:, None].to(pre.dtype)
    grad_pre.mul_(scale)
    a.mul_(scale)


def weight_gradient(grad, x, offset, out):
    """out [E, N, K] = Σ grad ⊗ x over each expert's rows, both in grouped order."""
    present = set()
    for e, r in spans(offset):
        torch.mm(grad[r].T, x[r], out=out[e])
        present.add(e)
    for e in set(range(len(out))) - present:
        out[e] = 0
