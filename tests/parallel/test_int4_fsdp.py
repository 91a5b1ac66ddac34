# SPDX-License-Identifier: Apache-2.0
"""FSDP2 cuts the packed tensors of Int4Linear by rows and puts them together for each layer, on gloo with two ranks."""

import pytest
import ranks
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastpost.nn import Int4Linear


def build(double=False):
    torch.manual_seed(1)
    first = Int4Linear.from_linear(nn.Linear(96, 33), 32, "nf4", double_quant=double)  # 33 rows: one rank has more
    second = Int4Linear.from_linear(nn.Linear(33, 16, bias=False), 32, "asymmetric")
    model = nn.Sequential(first, nn.Linear(33, 33), second)
    for p in model[0].parameters():
        p.requires_grad_(False)
    return model


def compare(world, double):
    alone, model = build(double), build(double)
    for part in (*model, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
    codes = model[0].codes
    assert isinstance(codes, DTensor) and codes.dtype == torch.uint8
    assert codes.to_local().shape[0] in (17, 16) and not codes.requires_grad
    assert torch.equal(codes.full_tensor(), alone[0].codes)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    out, expected = model(x), alone(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(model[1].weight.grad.full_tensor(), alone[1].weight.grad)
    model.to(torch.bfloat16)
    assert model[0].scales.dtype == alone[0].scales.dtype


def check_plain(rank, world):
    compare(world, False)


def check_nested(rank, world):
    compare(world, True)


CHECKS = {"plain": check_plain, "nested": check_nested}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.run(2, tmp_path_factory.mktemp("ranks") / "store", CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name, results):
    assert not results[name], results[name]
