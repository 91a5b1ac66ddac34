# SPDX-License-Identifier: Apache-2.0
"""FSDP2 cuts the experts' matrices and puts them together for each layer, on gloo with two ranks: the same gradients as
one process has for all tokens."""

import pytest
import ranks
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastpost.hf
from fastpost.nn import MoA, MoE, router_loss

SHARED = dict(
    vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_key_value_heads=2, pad_token_id=0,
    num_experts_per_tok=2, num_local_experts=5,
)  # fmt: skip


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = MoA(32, 16, 5, 2, bias=True)
        self.mlp = MoE(32, 24, 5, 2, bias=True, scoring="sigmoid", correction=True, recompute=True)

    def forward(self, x):
        y, first = self.attention(x, lambda q: F.normalize(q.cumsum(1), dim=-1))
        z, second = self.mlp(x + y)
        return x + y + z, [first, second]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        routings = []
        for layer in self.layers:
            x, more = layer(x)
            routings += more
        return x, routings


def parts(kind):
    """(model, what to shard, loss of the rows of a rank)."""
    torch.manual_seed(1)
    if kind == "nn":
        model = Model()

        def loss(x):
            out, routings = model(x)
            return out.square().mean() + 0 * router_loss(routings)  # balance is no mean over ranks

        shard = [m for layer in model.layers for m in (layer.attention, layer.mlp)]
        rows = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0))
    else:
        heads = {} if kind == "jetmoe" else {"num_attention_heads": 4}
        config = {"jetmoe": tf.JetMoeConfig, "mixtral": tf.MixtralConfig}[kind](
            **SHARED, **heads, **({"kv_channels": 8} if kind == "jetmoe" else {})
        )
        model = tf.AutoModelForCausalLM.from_config(config)
        assert fastpost.hf.use_experts(model, quiet=True)
        shard = list(model.model.layers)
        rows = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(0))

        def loss(ids):
            return model(ids, labels=ids, use_cache=False).loss

    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    return model, shard, loss, rows


def compare(rank, world, kind):
    alone, _, whole, rows = parts(kind)
    whole(rows).backward()
    model, shard, loss, _ = parts(kind)
    for part in (*shard, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert {p.to_local().shape[0] for p in model.parameters() if p.ndim == 3} == {3 if rank == 0 else 2}
    loss(rows[rank::world]).backward()
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert q.grad.any(), name


def check_nn(rank, world):
    compare(rank, world, "nn")


def check_jetmoe(rank, world):
    compare(rank, world, "jetmoe")


def check_mixtral(rank, world):
    compare(rank, world, "mixtral")


CHECKS = {"nn": check_nn, "jetmoe": check_jetmoe, "mixtral": check_mixtral}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.run(2, tmp_path_factory.mktemp("ranks") / "store", CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name, results):
    assert not results[name], results[name]
