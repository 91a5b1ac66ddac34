# SPDX-License-Identifier: Apache-2.0
"""A head under fully_shard: both ways to reach it train the same model as one process does."""

import itertools

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastpost
from fastpost.parallel import fsdp, fsdp_head_logprob

V, D = 101, 16  # 101 = 51 + 50 = 34 + 34 + 33


class Tiny(torch.nn.Module):
    """Everything of a language model but the call of its head."""

    def __init__(self, frozen_head=False):
        super().__init__()
        torch.manual_seed(1)
        self.embed = torch.nn.Embedding(V, D)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(D, 2 * D), torch.nn.GELU(), torch.nn.Linear(2 * D, D))
        self.lm_head = torch.nn.Linear(D, V, bias=False).requires_grad_(not frozen_head)

    def forward(self, ids):
        x = self.embed(ids)
        return x + self.mlp(x)


def sharded(world, **options):
    model = Tiny(**options)
    mesh = init_device_mesh("cpu", (world,))
    for part in (model.mlp, model.lm_head, model):
        fully_shard(part, mesh=mesh)
    return model


def batch(rank):
    """Ranks differ in length and in how much is scored."""
    g = torch.Generator().manual_seed(40 + rank)
    ids, target = torch.randint(0, V, (2, 12 + 9 * rank), generator=g)
    target[: 3 + rank] = -100
    return ids, target


def mean_loss(logprob, target):
    return -logprob.sum() / (target != -100).sum()


def check_two_steps_are_those_of_one_process(rank, world):
    for gather, frozen in itertools.product(("hidden", "weight", "auto"), (False, True)):
        model, alone = sharded(world, frozen_head=frozen), Tiny(frozen_head=frozen)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, alone)]
        for _ in range(2):
            ids, target = batch(rank)
            logprob = fsdp_head_logprob(model(ids), model.lm_head.weight, target, gather=gather, softcap=20.0)
            mean_loss(logprob, target).backward()
            losses = []
            for r in range(world):
                ids, target = batch(r)
                losses.append(mean_loss(fastpost.linear_logprob(
                    alone(ids), alone.lm_head.weight, target, softcap=20.0), target))  # fmt: skip
                if r == rank:
                    torch.testing.assert_close(mean_loss(logprob.detach(), target), losses[r].detach())
            (sum(losses) / world).backward()  # fully_shard averages over ranks
            for (name, ours), expected in zip(model.named_parameters(), alone.parameters()):
                assert isinstance(ours, DTensor) and (ours.grad is None) == (frozen and name == "lm_head.weight")
                if ours.grad is not None:
                    assert ours.grad.placements == (Shard(0),)
                    torch.testing.assert_close(ours.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-6, msg=name)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def check_sum_and_entropy(rank, world):
    ids, target = batch(rank)
    for gather in ("hidden", "weight"):
        weight = sharded(world).lm_head.weight
        hidden = torch.randn(len(ids), D, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        logprob, entropy = fsdp_head_logprob(hidden, weight, target, gather=gather, gradient="sum", return_entropy=True)
        grads = torch.autograd.grad((logprob + 0.3 * entropy).sum(), (hidden, weight))
        whole = Tiny().lm_head.weight
        expected = 0
        for r in range(world):
            h = torch.randn(len(batch(r)[0]), D, generator=torch.Generator().manual_seed(r)).requires_grad_()
            out = fastpost.linear_logprob(h, whole, batch(r)[1], return_entropy=True)
            gh, gw = torch.autograd.grad((out[0] + 0.3 * out[1]).sum(), (h, whole))
            expected = expected + gw
            if r == rank:
                torch.testing.assert_close(logprob, out[0])
                torch.testing.assert_close(entropy, out[1])
                torch.testing.assert_close(grads[0], gh, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grads[1].full_tensor(), expected, rtol=1e-4, atol=1e-6)


def check_mixed_precision(rank, world):
    """float32 shards, bfloat16 hidden states: the gradient comes back in float32."""
    model = Tiny()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    for part in (model.mlp, model.lm_head, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (world,)), mp_policy=policy)
    ids, target = batch(rank)
    grads = []
    for gather in ("hidden", "weight"):
        hidden = model(ids)
        assert hidden.dtype == torch.bfloat16
        mean_loss(fsdp_head_logprob(hidden, model.lm_head.weight, target, gather=gather), target).backward()
        grads.append(model.lm_head.weight.grad.full_tensor())
        model.zero_grad()
    assert grads[0].dtype == torch.float32
    assert (grads[0] - grads[1]).norm() < 1e-2 * grads[1].norm() > 0


def check_the_way_of_fewer_bytes_is_taken(rank, world):
    """Never a tensor of the weight's size when hidden states are gathered, and the weight once when they are many."""
    weight, sent = sharded(world).lm_head.weight, []
    gather = dist.all_gather_into_tensor

    def spy(out, t, group=None):
        sent.append(out.numel())
        return gather(out, t, group=group)

    for rows, gathers_hidden in ((V // world - 2, True), (V // world + 2, False)):
        hidden, target = torch.randn(200, D).requires_grad_(), torch.full((200,), -100)
        target[: rows if rank else rows - 5] = 3  # the rank with most rows decides for all
        dist.all_gather_into_tensor = spy
        del sent[:]
        try:
            fsdp_head_logprob(hidden, weight, target).sum().backward()
        finally:
            dist.all_gather_into_tensor = gather
        assert (world * rows * D in sent) == gathers_hidden
        assert all(n <= max(world * rows * D, 5 * world * rows) for n in sent)


def check_what_is_refused(rank, world):
    hidden, target = torch.randn(4, D), torch.zeros(4, dtype=torch.int64)
    mesh = init_device_mesh("cpu", (world,))
    weight = torch.randn(V, D)
    for bad, message in (
        (weight, r"weight: expected a DTensor, got Tensor.*pass it to fastpost.linear_logprob"),
        (distribute_tensor(weight, mesh, [Shard(1)]), r"weight: expected Shard\(0\) over a mesh of one dimension"),
        (distribute_tensor(weight, mesh, [Replicate()]), r"weight: expected Shard\(0\).*Replicate"),
    ):
        with pytest.raises(ValueError, match=r"\[fsdp_head_logprob\] " + message):
            fsdp_head_logprob(hidden, bad, target)
    good = distribute_tensor(weight, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="gather: expected one of auto, hidden, weight, got 'both'"):
        fsdp_head_logprob(hidden, good, target, gather="both")
    with pytest.raises(ValueError, match="gradient: expected one of mean, sum, got 'max'"):
        fsdp_head_logprob(hidden, good, target, gradient="max")
    with pytest.raises(ValueError, match=r"weight: expected a plain torch.Tensor, got DTensor.*fastpost.parallel"):
        fastpost.linear_logprob(hidden, good, target)


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda world: f"{world} ranks")
def results(request, tmp_path_factory):
    return ranks.run(request.param, tmp_path_factory.mktemp("ranks") / "store", CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_fsdp_head(name, results):
    assert not results[name], results[name]


def test_traffic():
    """Llama-3-8B's head on 8 ranks: gathering hidden states wins below V / world = 16 032 rows a rank."""
    v, d = 128_256, 4096
    few, many = (fsdp.traffic(8, n, v, d, 2) for n in (8192, 16_033))
    assert few == (2 * v * d * 2, 2 * 8 * 8192 * d * 2) and few.gather_hidden < few.gather_weight
    assert many.gather_hidden > many.gather_weight
    frozen = fsdp.traffic(8, 8192, v, d, 2, weight_grad=False)
    assert frozen.gather_weight == v * d * 2 and frozen.gather_hidden > frozen.gather_weight
