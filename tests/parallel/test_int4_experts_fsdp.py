# SPDX-License-Identifier: Apache-2.0
"""FSDP2 cuts the packed experts of a mixture by rows, and the adapters on them, on gloo with two ranks."""

import pytest
import ranks
import torch
import transformers as tf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastpost.hf
from fastpost.hf import adapter
from fastpost.nn import MoE


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.mlp = nn.Linear(32, 32), MoE(32, 24, 5, 2, bias=True)
        self.mlp.quantize_(group_size=32, scheme="nf4", double_quant=True)

    def forward(self, x):
        return self.mlp(self.first(x))[0]


def mixtral():
    """With LoRA on experts."""
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(tf.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_key_value_heads=2,
        num_attention_heads=4, num_experts_per_tok=2, num_local_experts=5,
    ))  # fmt: skip
    fastpost.hf.quantize_experts(model, group_size=32)
    model = adapter.fresh(model, rank=3, alpha=6, targets=["experts.gate_up_proj", "experts.down_proj", "q_proj"])
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1)
    return model


def compare(world, alone, model, shard, x, loss):
    for part in (*shard(model), model):
        fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
    packed = [p for n, p in model.named_parameters() if n.endswith(".codes")]
    assert packed and all(isinstance(p, DTensor) and p.dtype == torch.uint8 and not p.requires_grad for p in packed)
    ours, expected = loss(model, x), loss(alone, x)
    torch.testing.assert_close(ours, expected)
    ours.backward()
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, p in alone.named_parameters():
        assert (p.grad is None) == (name not in gradients), name
        if p.grad is not None:
            torch.testing.assert_close(gradients[name].full_tensor(), p.grad, msg=name)
    assert len(gradients) >= 4


def check_module(rank, world):
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    compare(world, Mixture(), Mixture(), lambda m: [m.first, m.mlp], x, lambda m, x: m(x).square().sum())


def check_adapters(rank, world):
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    compare(world, mixtral(), mixtral(), lambda m: list(m.get_base_model().model.layers), ids,
            lambda m, ids: m(ids, labels=ids, use_cache=False).loss)  # fmt: skip


CHECKS = {"module": check_module, "adapters": check_adapters}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.run(2, tmp_path_factory.mktemp("ranks") / "store", CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name, results):
    assert not results[name], results[name]
