# SPDX-License-Identifier: Apache-2.0
"""What products of grouped rows share, whatever their weights are made of."""

from __future__ import annotations

import torch

from fastpost import _core


def workspace(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """What the products of `rows` grouped rows with this weight [E, N, K] need, in either direction."""
    bytes = _core.grouped_gemm_bytes(weight, rows, torch.get_num_threads())
    return torch.empty(bytes, dtype=torch.uint8, device=weight.device)


def summed_back(rows: torch.Tensor, order: torch.Tensor, top_k: int, tokens: int) -> torch.Tensor:
    """The gradient of x [tokens, K] from that of its gathered rows [R, K], row r of which was x[order[r] // top_k]."""
    place = torch.empty_like(order)
    place[order.long()] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    grad_x = rows.new_empty(tokens, rows.shape[1])
    _core.moe_combine(rows, place.view(-1, top_k), None, grad_x)
    return grad_x
