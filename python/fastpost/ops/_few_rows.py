# SPDX-License-Identifier: Apache-2.0
"""A plain linear layer for the few rows of a decoding step, through the kernels of grouped_gemm with one expert.

Plain products are torch's, but on a CPU its bfloat16 product of one row reads the weights at 7 to 8 GB/s where the
memory gives 20. SmolLM2-135M's matrices for one token, one thread: 15 to 17 ms, torch 34 to 38 (2 rows: 16 and 33, 8
rows: 26 and 43, 32 rows: 65 and 71)."""

from __future__ import annotations

import functools

import torch

from fastpost import _core

MOST = 32
"""Rows up to which this is faster than torch."""


@functools.cache
def _offset(rows: int) -> torch.Tensor:
    return torch.tensor([0, rows], dtype=torch.int32, device="cpu")


@functools.lru_cache(maxsize=4096)
def _bytes(shape: torch.Size, rows: int, threads: int) -> int:
    return _core.grouped_gemm_bytes(torch.empty(1, dtype=torch.bfloat16, device="cpu").expand(shape), rows, threads)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] · weight [N, K]ᵀ + bias [N], without gradient. What `fits` refuses does not belong here."""
    rows = x if x.ndim == 2 else x.reshape(-1, weight.shape[1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    weight = weight[None]
    out = x.new_empty(*x.shape[:-1], weight.shape[1])
    size = _bytes(weight.shape, rows.shape[0], torch.get_num_threads())
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    _core.grouped_gemm(rows, None, 1, weight, _offset(rows.shape[0]), None if bias is None else bias[None], 0,
                       workspace, None, out.view(-1, out.shape[-1]))  # fmt: skip
    return out


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` takes this and is the faster way."""
    return (
        0 < x.numel() <= MOST * x.shape[-1]
        and x.dtype is torch.bfloat16 is weight.dtype
        and x.is_cpu
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    )
