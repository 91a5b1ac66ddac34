# SPDX-License-Identifier: Apache-2.0
"""int4_gemm in plain torch: dequantise, then a float32 (or, for float64 x, float64) product, rounded once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastpost.int4 import SYMMETRIC_ZERO, Int4Weight, int4_quantize


def dequantize(weight: Int4Weight) -> torch.Tensor:
    """[N, K] float32."""
    columns = torch.arange(weight.columns, device=weight.codes.device)
    group = columns // weight.group_size
    scales, codes = weight.float_scales().float()[:, group], weight.unpacked()
    if weight.table is not None:
        stored = scales * weight.table[codes.long()]
    else:
        zeros = SYMMETRIC_ZERO if weight.zeros is None else weight.zeros[:, group].float()
        stored = scales * (codes.float() - zeros)
    return stored if weight.order is None else torch.empty_like(stored).index_copy_(1, weight.order, stored)


def int4_gemm(x, weight, bias=None, *, activation_bits=None):
    """Same signature and meaning as :func:`fastpost.int4_gemm`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if activation_bits == 8:
        x_wide = _int8_rows(x.to(wide) if weight.order is None else x.to(wide)[..., weight.order])
        if weight.order is not None:
            x_wide = torch.empty_like(x_wide).index_copy_(-1, weight.order, x_wide)
    else:
        x_wide = x.to(wide)
    # A product rounds W to x's dtype at most once; the reference does not at all.
    out = x_wide @ dequantize(weight).to(wide).t()
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


def _int8_rows(x, block=32):
    """Each row to int8 with a scale for every `block` columns, and back."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    scale = padded.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(scale > 0, (padded / scale.where(scale > 0, 1)).round(), 0) * scale
    return rounded.flatten(-2)[..., : x.shape[-1]]


@dataclass(frozen=True)
class Case:
    """One shape and format; `inputs` draws x [M, K], the Int4Weight [N, K] and bias? [N]."""

    name: str
    m: int
    n: int
    k: int
    group_size: int = 128
    scheme: str = "symmetric"
    scale: float = 1.0
    bias: bool = False
    scales_dtype: torch.dtype = torch.bfloat16
    order: bool = False

    def inputs(self, dtype=torch.bfloat16, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        x = (torch.randn(self.m, self.k, generator=g) * self.scale).to(dtype)
        weight = int4_quantize(
            torch.randn(self.n, self.k, generator=g) / self.k**0.5, group_size=self.group_size, scheme=self.scheme,
            scales_dtype=self.scales_dtype,
        )  # fmt: skip
        if self.order:
            weight = replace(weight, order=torch.randperm(self.k, generator=g))
        bias = (torch.randn(self.n, generator=g) * self.scale).to(dtype).to(device) if self.bias else None
        return x.to(device), weight.to(device), bias


def cases() -> list[Case]:
    return [
        Case("no-rows", 0, 16, 128),
        Case("one-row", 1, 512, 1024),
        Case("one-output", 3, 1, 256),
        Case("few-columns", 4, 24, 32, group_size=32),  # a block that is not whole
        Case("odd-columns", 5, 33, 200, group_size=32),
        Case("not-whole-blocks", 7, 48, 576, group_size=64),  # SmolLM2's hidden width
        Case("group-32", 9, 100, 384, group_size=32),
        Case("group-64-asymmetric", 16, 130, 640, group_size=64, scheme="asymmetric"),
        Case("group-128-asymmetric", 17, 257, 1024, scheme="asymmetric", bias=True),
        Case("group-256", 6, 64, 1024, group_size=256),
        Case("per-channel", 8, 96, 1000, group_size=-1),
        Case("nf4", 12, 160, 768, group_size=64, scheme="nf4", scales_dtype=torch.float32),
        Case("nf4-32", 33, 64, 320, group_size=32, scheme="nf4", bias=True),
        Case("float16-scales", 31, 72, 512, scheme="asymmetric", scales_dtype=torch.float16),
        Case("tiny-scale", 8, 128, 512, scale=1e-3),
        Case("huge-scale", 8, 128, 512, scale=1e3, scheme="asymmetric"),
        Case("order", 10, 64, 384, order=True, scheme="asymmetric"),
        Case("many-rows", 200, 96, 512, bias=True),
        Case("rows-of-64", 64, 512, 2048, group_size=64, scheme="nf4"),
    ]
