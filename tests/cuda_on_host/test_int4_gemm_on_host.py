# SPDX-License-Identifier: Apache-2.0
"""int4_gemm's CUDA kernels on the CPU: matrix instructions are replaced by shuffles that follow the same fragments."""

import shutil
from dataclasses import replace

import on_host
import pytest
import torch

from compare import error
from fastpost.reference import int4_gemm as reference

pytestmark = pytest.mark.skipif(shutil.which(on_host.COMPILER) is None, reason=f"needs {on_host.COMPILER}")
HALVES = [torch.bfloat16, torch.float16]
SMALL = [c for c in reference.cases() if c.m * c.n * c.k < 1_500_000 and c.m <= 64 and c.k % 8 == 0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_few_rows(case, dtype, core):
    x, weight, bias = case.inputs(dtype)
    if weight.order is not None:
        x = x[:, weight.order].contiguous()
    out = torch.full((case.m, case.n), torch.nan, dtype=dtype)
    core.int4_gemm(x, weight.codes, weight.float_scales(), weight.zeros, weight.table, weight.group_size, bias, out)
    plain = replace(weight, order=None)
    truth = x.double() @ reference.dequantize(plain).double().T + (0 if bias is None else bias.double())
    rounded = (x.float() @ reference.dequantize(plain).to(dtype).float().T + (0 if bias is None else bias.float())).to(
        dtype
    )
    assert error(out, truth) <= 1.05 * error(rounded, truth) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", reference.cases(), ids=lambda c: c.name)
def test_dequantize(case, dtype, core):
    _, weight, _ = case.inputs()
    out = torch.full((case.n, case.k), torch.nan, dtype=dtype)
    core.int4_gemm_dequantize(weight.codes, weight.float_scales(), weight.zeros, weight.table, weight.group_size, out)
    assert torch.equal(out, reference.dequantize(replace(weight, order=None)).to(dtype))
