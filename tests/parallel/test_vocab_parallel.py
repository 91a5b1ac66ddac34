# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import ranks
import torch
import torch.distributed as dist

import fastpost
from compare import as_tuple, error
from fastpost.parallel import vocab, vocab_parallel_logprob
from fastpost.reference import linear_logprob as reference

V, D, RANK = 211, 16, 3
EVERYTHING = {"temperature": 1.3, "softcap": 15.0, "return_entropy": True}
OPTIONS = {
    "plain": {},
    "everything": EVERYTHING,
    "small budget": {"memory_budget": 1 << 20, "return_entropy": True},
}


def cuts(world):
    """Where the vocabulary is cut: evenly, unevenly, and with a rank that holds nothing."""
    even = [round(i * V / world) for i in range(world + 1)]
    return {"even": even, "uneven": [0, 7, *even[2:]], "empty": [0, 0, *even[2:]]}


def whole(n=40, dtype=torch.float32, ignored=0.3, v=V, seed=0):
    """target and the tensors hidden, weight, bias, a, b, the same on every rank."""
    hidden, weight, target, bias = reference.Case("x", n, D, v, scale=3, bias=True, ignored=ignored).inputs(seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    a, b = torch.randn(n, RANK, generator=g), torch.randn(v, RANK, generator=g)
    return target, [t.to(dtype) for t in (hidden, weight, bias, a, b)]


def run(op, target, tensors, options, incoming=None):
    """Outputs, then the gradients of the five tensors for the same incoming gradients everywhere."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    h, w, bias, a, b = leaves
    outputs = as_tuple(op(h, w, target, bias=bias, low_rank=(a, b), **options))
    if incoming is None:
        incoming = incoming_for(len(target))
    grads = [g.to(o.dtype) for g, o in zip(incoming, outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def incoming_for(n):
    g = torch.Generator().manual_seed(9)
    grads = [torch.randn(n, generator=g) for _ in range(2)]
    grads[0][::5] = grads[1][::5] = 0
    return grads


def shard(tensors, begin, end):
    h, w, bias, a, b = tensors
    return [h, w[begin:end], bias[begin:end], a, b[begin:end]]


def shard_results(results, begin, end):
    *outputs, h, w, bias, a, b = results
    return [*outputs, *shard((h, w, bias, a, b), begin, end)]


def check_equals_one_process(rank, world):
    for cut in cuts(world).values():
        begin, end = cut[rank], cut[rank + 1]
        for name, options in OPTIONS.items():
            n = 600 if name == "small budget" else 40
            for dtype, slack in ((torch.float32, 1.5), (torch.bfloat16, 1.5), (torch.float64, 1.0)):
                target, tensors = whole(n, dtype)
                ours = run(vocab_parallel_logprob, target, shard(tensors, begin, end), options)
                alone = shard_results(run(fastpost.linear_logprob, target, tensors, options), begin, end)
                truth = [t.double() for t in tensors]
                truth = shard_results(run(reference.linear_logprob, target, truth, options), begin, end)
                assert len(ours) == 6 + bool(options.get("return_entropy"))
                for i, (x, y, t) in enumerate(zip(ours, alone, truth)):
                    assert x.dtype == y.dtype and x.shape == y.shape
                    limit = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float64: 1e-13}[dtype]
                    assert error(x, t) <= slack * error(y, t) + limit, (name, dtype, cut, i, error(x, t), error(y, t))


def check_every_rank_holds_targets(rank, world):
    """What the check above relies on: wherever a shard has rows, some scored target is among them."""
    target, _ = whole()
    for cut in cuts(world).values():
        begin, end = cut[rank], cut[rank + 1]
        assert begin == end or ((target >= begin) & (target < end)).any()


def check_same_bits_on_all_ranks_and_runs(rank, world):
    target, tensors = whole(dtype=torch.bfloat16)
    begin, end = cuts(world)["uneven"][rank : rank + 2]
    runs = [run(vocab_parallel_logprob, target, shard(tensors, begin, end), EVERYTHING) for _ in range(2)]
    for x, y in zip(*runs):
        assert torch.equal(x, y)
    for i in (0, 1, 2, 5):  # outputs, gradients of hidden and a
        everywhere = vocab.all_gather(runs[0][i].detach()[None], None)
        assert all(torch.equal(t, runs[0][i]) for t in everywhere)


def check_what_is_exchanged(rank, world):
    """Five numbers per scored row in the forward; in the backward the gradient of hidden and nothing of V's size."""
    target, (hidden, weight, *_) = whole()
    begin, end = cuts(world)["uneven"][rank : rank + 2]
    scored, sent = int((target >= 0).sum()), []
    gather, reduce = dist.all_gather_into_tensor, dist.all_reduce
    dist.all_gather_into_tensor = lambda out, t, group: (sent.append(tuple(t.shape)), gather(out, t, group=group))
    dist.all_reduce = lambda t, group: (sent.append(tuple(t.shape)), reduce(t, group=group))
    try:
        leaves = hidden.requires_grad_(), weight[begin:end].requires_grad_()
        out = vocab_parallel_logprob(*leaves, target, vocab_start=begin)
        assert sent == [(1, 5, scored)]
        torch.autograd.grad(out.sum(), leaves)
        assert sent == [(1, 5, scored), (40, D)]
        del sent[:]
        frozen = vocab_parallel_logprob(hidden.detach(), leaves[1], target, vocab_start=begin)
        torch.autograd.grad(frozen.sum(), leaves[1])
        assert sent == [(1, 5, scored)]
    finally:
        dist.all_gather_into_tensor, dist.all_reduce = gather, reduce


def check_rows_of_their_own(rank, world):
    """Each rank its own rows, of uneven number; one has none that is scored, one has none at all."""
    for counts in ([25, 10, 5], [0, 33, 7], [12, 20, 8]):
        counts = counts[:world]
        n = sum(counts)
        target, tensors = whole(n)
        if counts[0] == 12:
            target[:12] = -100
        rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        begin, end = cuts(world)["uneven"][rank : rank + 2]
        h, w, bias, a, b = shard(tensors, begin, end)
        for options in OPTIONS.values():
            incoming = incoming_for(n)
            mine = [g[rows] for g in incoming]
            ours = run(vocab_parallel_logprob, target[rows], [h[rows], w, bias, a[rows], b],
                       options | {"hidden_sharded": True}, mine)  # fmt: skip
            *outputs, gh, gw, gbias, ga, gb = run(fastpost.linear_logprob, target, tensors, options, incoming)
            alone = [*(o[rows] for o in outputs), gh[rows], gw[begin:end], gbias[begin:end], ga[rows], gb[begin:end]]
            for x, y in zip(ours, alone):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def check_a_loss_on_top(rank, world):
    """preference_loss_from_logprob, and a step that all ranks agree on."""
    target, (hidden, weight, *_) = whole(ignored=0)
    cu_seqlens = torch.tensor([0, 9, 20, 32, 40], dtype=torch.int32)
    begin, end = cuts(world)["even"][rank : rank + 2]
    leaves = hidden.clone().requires_grad_(), weight[begin:end].clone().requires_grad_()
    out = fastpost.preference_loss_from_logprob(
        vocab_parallel_logprob(*leaves, target), target, cu_seqlens, fastpost.objectives.SimPO()
    )
    hidden.requires_grad_(), weight.requires_grad_()
    alone = fastpost.preference_loss(hidden, weight, target, cu_seqlens, fastpost.objectives.SimPO())
    torch.testing.assert_close(out.loss, alone.loss)
    grads = torch.autograd.grad(out.loss, leaves)
    expected = torch.autograd.grad(alone.loss, (hidden, weight))
    torch.testing.assert_close(grads[0], expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads[1], expected[1][begin:end], rtol=1e-4, atol=1e-6)


def check_nothing_scored(rank, world):
    target, tensors = whole(ignored=1.1)
    begin, end = cuts(world)["even"][rank : rank + 2]
    for extra in ({}, {"hidden_sharded": True}):
        for t in run(vocab_parallel_logprob, target, shard(tensors, begin, end), EVERYTHING | extra):
            assert t.numel() > 0 and t.count_nonzero() == 0


def check_bad_targets(rank, world):
    target, (hidden, weight, *_) = whole(ignored=0)
    begin, end = cuts(world)["even"][rank : rank + 2]
    for value in (V, -1, -100):
        target[3] = value
        options = {"ignore_index": 5} if value == -100 else {}
        with pytest.raises(ValueError, match=rf"expected indices in \[0, {V}\) or ignore_index.*got {value} at row 3"):
            vocab_parallel_logprob(hidden, weight[begin:end], target, **options)
        out = vocab_parallel_logprob(hidden, weight[begin:end], target, vocab_start=begin, **options)
        assert out[3].isnan() and out[:3].isfinite().all() and out[4:].isfinite().all()
    with pytest.raises(ValueError, match=r"weight: expected float32 \[any, 16\], got float32 \[9, 17\]"):
        vocab_parallel_logprob(hidden, torch.zeros(9, 17), target, vocab_start=0)


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda world: f"{world} ranks")
def results(request, tmp_path_factory):
    return ranks.run(request.param, tmp_path_factory.mktemp("ranks") / "store", CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_vocab_parallel(name, results):
    assert not results[name], results[name]


def test_combining_slices_is_exact():
    """The statistics of any cut combine to those of the whole: equal maxima, -inf logits, empty slices, p -> 1."""
    z = torch.randn(6, 90, dtype=torch.float64)
    z[0, [3, 50, 80]] = 9.0
    z[1, :40] = -torch.inf
    z[2, 70] = 60.0
    z[3] = 1.0
    target = torch.tensor([50, 60, 70, 0, 89, 12])

    def stats_of(begin, end):
        stats = torch.zeros(5, 6, dtype=torch.float64)
        stats[0], stats[4] = -torch.inf, torch.nan
        if end > begin:
            reference.linear_logprob_tile(z[:, begin:end], None, target, begin, 1.0, 0.0, True, stats)
        return stats

    for cut in ([0, 90], [0, 30, 90], [0, 0, 41, 41, 90], [0, 1, 2, 3, 89, 90]):
        stats = reference.combine(torch.stack([stats_of(*c) for c in itertools.pairwise(cut)]))
        logprob, lse, entropy = torch.empty(3, 6, dtype=torch.float64)
        reference.linear_logprob_finish(stats, logprob, lse, entropy)
        p = z.softmax(1)
        torch.testing.assert_close(lse, z.logsumexp(1))
        torch.testing.assert_close(logprob, z.log_softmax(1).gather(1, target[:, None])[:, 0])
        torch.testing.assert_close(entropy, -torch.special.xlogy(p, p).sum(1))
        rest = z[2, z[2] != 60].sub(60).exp().sum()
        torch.testing.assert_close(logprob[2], -rest.log1p(), rtol=1e-12, atol=0)
