# SPDX-License-Identifier: Apache-2.0
"""AdamW on the shards of FSDP2 does to each number what it does to the whole parameter."""

import pytest
import ranks
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastpost.train.config import GroupConfig
from fastpost.train.gradients import Gradients, local
from fastpost.train.optim import AdamW, shard
from fastpost.train.rounding import join


class Net(torch.nn.Module):
    """Shards of whole vector widths, and two whose last rank has less or nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide = torch.nn.Linear(64, 96)
        self.uneven = torch.nn.Linear(96, 3, bias=False)
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.uneven(torch.tanh(self.wide(x))) * self.one


def sharded(mesh, dtype=torch.float32, **options):
    net = Net().to(dtype)
    fully_shard(net, mesh=mesh, **options)
    return net


def run(net, optimizer, steps=5, first=0, lr=1e-2, micro_batches=1):
    """The same rows on every rank: the mean of the ranks' gradients is each one's own, to the bit."""
    for step in range(first, first + steps):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        with Gradients(optimizer.parameters, micro_batches) as gradients:
            for part in x.to(next(net.parameters()).dtype).chunk(micro_batches):
                net(part).float().square().mean().backward()
            assert not any(isinstance(gradients.get(p), DTensor) for p in optimizer.parameters)
            optimizer.step(gradients, step=step, lr=lr)


OPTIONS = {"weight_decay": 0.1, "groups": {"wide": GroupConfig(lr_ratio=2.0)}, "ema": 0.7}


def check_shards_take_the_steps_of_the_whole(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for micro_batches in (2, 1):
        whole, net = Net(), sharded(mesh)
        optimizers = [AdamW(m, precision="fp32", **OPTIONS) for m in (whole, net)]
        for model, optimizer in zip((whole, net), optimizers, strict=True):
            run(model, optimizer, micro_batches=micro_batches)
        same_steps(mesh, whole, net, optimizers)


def same_steps(mesh, whole, net, optimizers):
    for (name, p), q in zip(net.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(p, DTensor)
        # The gradient of "one" is a sum over the batch whose order is the same, so all of it is equal to the bit.
        assert torch.equal(p.full_tensor(), q), name
    states = [dict(o.tensors()) for o in optimizers]
    for name, mine in states[1].items():
        parameter = dict(net.named_parameters())[name.split(".", 1)[1]]
        rows = distribute_tensor(states[0][name], mesh, [Shard(0)]).to_local()
        assert mine.shape == parameter.shape and torch.equal(local(mine), rows), name


def check_pairs_instead_of_a_module(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    net, other = sharded(mesh), sharded(mesh)
    run(net, AdamW(net, precision="fp32", **OPTIONS))
    run(other, AdamW(list(other.named_parameters()), precision="fp32", **OPTIONS))
    assert all(torch.equal(local(p), local(q)) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def check_bf16_shards_keep_float32_masters(rank, world):
    """precision bf16 makes bf16 shards with remainders: FSDP gathers half the bytes, no update is lost."""
    net = sharded(init_device_mesh("cpu", (world,)))
    start = local(net.wide.weight).clone()
    optimizer = AdamW(net, precision="bf16")
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}

    def master():
        return join(local(net.wide.weight), local(dict(optimizer.tensors())["remainder.wide.weight"]))

    assert torch.equal(master(), start)
    run(net, optimizer, lr=1e-6)
    assert 0 < (master() - start).abs().max() < 1e-5  # far below a bf16 ulp


def check_random_bits_depend_on_the_shard(rank, world):
    """Two shards with equal numbers must not round alike; replicas must."""
    for shape, placements in (((world,), [Shard(0)]), ((world, 1), [Replicate(), Shard(0)])):
        mesh = init_device_mesh("cpu", shape)
        value = torch.full((world * 64, 64), 0.1, dtype=torch.bfloat16)
        p = torch.nn.Parameter(distribute_tensor(value, mesh, placements))
        assert shard(p) == (rank if len(shape) == 1 else 0)
        optimizer = AdamW([("w", p)], precision="pure-bf16")
        with Gradients([p]) as gradients:
            p.grad = distribute_tensor(torch.ones_like(value), mesh, placements)
            optimizer.step(gradients, step=0, lr=1e-4)
        mine = local(p).float()[:64].contiguous()
        assert len(mine.unique()) == 2
        everyone = [torch.empty_like(mine) for _ in range(world)]
        torch.distributed.all_gather(everyone, mine)
        assert torch.equal(everyone[0], everyone[1]) == (len(shape) == 2)


def check_pure_bf16_repeats_itself_after_a_resume(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    nets = [sharded(mesh, torch.bfloat16) for _ in range(2)]
    run(nets[0], AdamW(nets[0], precision="pure-bf16", **OPTIONS), 6)
    optimizer = AdamW(nets[1], precision="pure-bf16", **OPTIONS)
    run(nets[1], optimizer, 4)
    fresh = AdamW(nets[1], precision="pure-bf16", **OPTIONS)
    for (_, into), (_, value) in zip(fresh.tensors(), optimizer.tensors(), strict=True):
        into.copy_(value)
    run(nets[1], fresh, 2, first=4)
    assert all(torch.equal(local(a), local(b)) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def check_the_average_goes_in_and_out_of_shards(rank, world):
    net = sharded(init_device_mesh("cpu", (world,)))
    optimizer = AdamW(net, precision="fp32", **OPTIONS)
    run(net, optimizer)
    before, x = [local(p).clone() for p in net.parameters()], torch.ones(1, 64)
    averages, kept = dict(optimizer.ema.tensors()), {n: t.clone() for n, t in optimizer.ema.tensors()}
    with torch.no_grad():
        output = net(x).clone()  # FSDP keeps what it gathered for this
        with optimizer.ema.applied():
            assert all(torch.equal(local(p), local(averages[f"ema.{n}"])) for n, p in net.named_parameters())
            assert not torch.equal(net(x), output)  # what FSDP gathers is the average
        assert all(torch.equal(local(p), b) for p, b in zip(net.parameters(), before, strict=True))
        assert torch.equal(net(x), output)
    assert all(torch.equal(local(t), local(kept[n])) for n, t in averages.items())


def check_eight_bit_shards_are_refused(rank, world):
    pytest.importorskip("bitsandbytes")
    net = sharded(init_device_mesh("cpu", (world,)))
    with pytest.raises(ValueError, match="expected adamw where the model is sharded, got adamw8bit"):
        AdamW(net, precision="fp32", eight_bit=True)


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.run(2, tmp_path_factory.mktemp("ranks") / "store", CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_sharded_optimizer(name, results):
    assert not results[name], results[name]
