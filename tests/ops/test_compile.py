# SPDX-License-Identifier: Apache-2.0
"""torch.compile: one graph without breaks, and the same graph whatever the number of rows."""

import pytest
import torch
import torch._dynamo.testing
from torch._dynamo.utils import counters

import fastpost
from fastpost.ops._experts import experts
from fastpost.reference import kv_reconstruct, kv_select
from fastpost.reference import linear_logprob as reference

D, V, RANK = 8, 60, 3


def tensors(n, device):
    hidden, weight, target, bias = reference.Case("x", n, D, V, bias=True, ignored=0.2).inputs(device=device, seed=n)
    a, b = torch.randn(n, RANK, device=device), torch.randn(V, RANK, device=device)
    return target, [t.requires_grad_() for t in (hidden, weight, bias, a, b)]


def logprob_loss(target, hidden, weight, bias, a, b):
    logprob, entropy = fastpost.linear_logprob(
        hidden.tanh(), weight, target, bias=bias, low_rank=(a, b), softcap=10.0, return_entropy=True
    )
    return (logprob * logprob - 0.1 * entropy).sum()


def packed_loss(target, cu_seqlens, hidden, weight, bias, a, b):
    out = fastpost.preference_loss(
        hidden.tanh(), weight, target, cu_seqlens, fastpost.objectives.SimPO(), bias=bias, low_rank=(a, b)
    )
    return out.loss + out.logprob.mean()


def expert_loss(logits, x, w):
    """A layer of experts that are one row each, its losses included."""
    out = fastpost.moe_route(2 * logits, 2)
    rows = fastpost.moe_dispatch(x.tanh(), out.plan)
    slots = fastpost.moe_dispatch(x[:, None] * out.gate[..., None], fastpost.moe_plan(out.expert, 5))
    y = fastpost.moe_combine(rows * w, out.plan, out.gate) + fastpost.moe_combine(slots, out.plan)
    terms = fastpost.moe_combine(rows.square(), out.plan, reduce=False)
    return y.square().sum() + terms.sum() + out.load_balance + out.z + out.probability.square().sum()


def expect_one_graph(loss, calls, dynamic, rows=(0, 3)):
    """Gradients equal those of eager for every call, and only the first call compiles.
    `rows`: the leaves that have any number of them."""
    torch._dynamo.reset()
    counters.clear()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True if dynamic == "dynamic=True" else None, backend=frames)
    first = None
    for plain, leaves in calls:
        expected = torch.autograd.grad(loss(*plain, *leaves), leaves)
        if dynamic == "mark_dynamic":
            for t in (*plain, *(leaves[i] for i in rows)):
                torch._dynamo.mark_dynamic(t, 0)
        for ours, eager in zip(torch.autograd.grad(compiled(*plain, *leaves), leaves), expected):
            torch.testing.assert_close(ours, eager)
        # dynamic=True takes the temperature for a variable at first and starts over by itself: the count begins at 2.
        first = first or frames.frame_count
        assert frames.frame_count == first
        assert counters["stats"]["unique_graphs"] == counters["aot_autograd"]["ok"] == 1


@pytest.mark.parametrize("dynamic", ["dynamic=True", "mark_dynamic"])
def test_linear_logprob_with_any_number_of_rows(dynamic, device):
    calls = [([target], leaves) for target, leaves in (tensors(n, device) for n in (9, 33, 17, 200))]
    expect_one_graph(logprob_loss, calls, dynamic)


@pytest.mark.parametrize("dynamic", ["dynamic=True", "mark_dynamic"])
def test_preference_loss_with_any_number_of_rows_and_sequences(dynamic, device):
    calls = []
    for n, sequences in ((24, 4), (60, 6), (41, 8)):
        target, leaves = tensors(n, device)
        cu_seqlens = torch.linspace(0, n, sequences + 1).int().to(device)
        calls.append(([target.clamp(min=0), cu_seqlens], leaves))
    expect_one_graph(packed_loss, calls, dynamic)


@pytest.mark.parametrize("dynamic", ["dynamic=True", "mark_dynamic"])
def test_experts_with_any_number_of_tokens(dynamic, device):
    w = torch.randn(6, device=device, requires_grad=True)
    calls = []
    for t in (9, 33, 17, 200):
        calls.append(([], [torch.randn(t, n, device=device, requires_grad=True) for n in (5, 6)] + [w]))
    expect_one_graph(expert_loss, calls, dynamic, rows=(0, 1))


def test_inductor(device):
    """The default backend, with the tied use that autograd sums."""
    target, (hidden, weight, *_) = tensors(12, device)
    ids = torch.arange(12, device=device)

    def loss(hidden, weight):
        return fastpost.linear_logprob(hidden * weight[ids], weight, target).sum()

    torch._dynamo.reset()
    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden, weight), (hidden, weight))
    for ours, eager in zip(got, expected):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("dynamic", ["dynamic=True", "mark_dynamic"])
def test_mixture_with_any_number_of_tokens(dynamic, device):
    """Router, its losses, and experts with every gradient."""
    up, down = torch.randn(4, 12, D, device=device), torch.randn(4, D, 6, device=device)

    def loss(_, x, up, down, logits):
        routing = fastpost.moe_route(logits, 2)
        out = experts(x.tanh(), routing.plan, routing.gate, up, down)
        return out.square().sum() + routing.load_balance + routing.z

    calls = []
    for n in (9, 33, 17, 200):
        x, logits = torch.randn(n, D, device=device), torch.randn(n, 4, device=device)
        calls.append(([torch.zeros(n, device=device)], [t.requires_grad_() for t in (x, up, down, logits)]))
    expect_one_graph(loss, calls, dynamic)


def test_grouped_gemm_with_any_number_of_tokens(device):
    weight = torch.randn(4, 6, D, device=device)

    def loss(expert, x, weight):
        plan = fastpost.moe_plan(expert, 4)
        rows = fastpost.grouped_gemm(fastpost.moe_dispatch(x.tanh(), plan), weight, plan.offset)
        return fastpost.moe_combine(rows, plan, reduce=False).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 33, 17):
        expert = torch.randint(0, 4, (n, 2), device=device)
        leaves = [t.requires_grad_() for t in (torch.randn(n, D, device=device), weight)]
        expected = torch.autograd.grad(loss(expert, *leaves), leaves)
        for ours, eager in zip(torch.autograd.grad(compiled(expert, *leaves), leaves), expected):
            torch.testing.assert_close(ours, eager)


def test_step_of_a_shadow_cache_with_any_number_of_rows(device):
    """kv_select and kv_reconstruct, which change `resident` and `keys` in place."""

    def step(query, landmark, scale, count, resident, u, u_scale, basis, keys):
        found = fastpost.kv_select(2 * query, landmark, count, resident, scale=scale)
        fastpost.kv_reconstruct(u, basis, found.chunks, keys, scale=u_scale, slots=found.slots, fresh=found.fresh)
        return found.chunks + resident, keys * 2

    def arguments(b):
        (query, landmark, count, resident), one = kv_select.Case("", b, 4, 2, 9, 16, 5).inputs(device=device)
        (u, basis, _, _), two = kv_reconstruct.Case("", b, 2, 72, 16, 6, 5).inputs(device=device)
        keys = torch.zeros(b, 2, 5, 8, 16, device=device)
        return [query, landmark, one["scale"], count, resident, u, two["scale"], basis, keys]

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, first = torch.compile(step, fullgraph=True, dynamic=True, backend=frames), None
    for b in (7, 3, 11):  # none of them the size of something else
        eager, ours = arguments(b), arguments(b)
        for got, wanted in zip((*compiled(*ours), *ours), (*step(*eager), *eager)):
            assert torch.equal(got, wanted)
        assert ours[-1].ne(0).any() and ours[4].ge(0).all()
        first = first or frames.frame_count
        assert frames.frame_count == first


def test_caches_with_any_number_of_tokens(device):
    """kv_factorize, kv_project and kv_landmarks: one graph, the bits of eager."""

    def build(keys, later, length):
        factors = fastpost.kv_factorize(keys.flatten(2), 5, length=length)
        u, scale = fastpost.kv_project(later.flatten(2), factors.directions)
        landmarks = fastpost.kv_landmarks(keys.transpose(1, 2), chunk=4, length=length)
        return *factors, u, scale, *landmarks

    torch._dynamo.reset()
    compiled = torch.compile(build, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 33, 17):
        keys, later = torch.randn(2, n, 3, 8, device=device), torch.randn(2, n // 2, 3, 8, device=device)
        length = torch.tensor([n, n - 4], dtype=torch.int32, device=device)
        for ours, eager in zip(compiled(keys, later, length), build(keys, later, length), strict=True):
            assert torch.equal(ours, eager)


def test_paged_attention_with_any_number_of_tokens(device):
    """One graph, which writes into the pools as the op alone does."""
    pools = [torch.zeros(1, 2, 30, 4, 16, device=device) for _ in range(2)]
    table = torch.arange(30, dtype=torch.int32, device=device)[None, None]

    def layer(query, key, value, keys, values, length, cu_seqlens):
        begun = fastpost.paged_attention(query, keys, values, table, length, cu_seqlens=cu_seqlens, return_lse=True,
                                         out_dtype=torch.float32)  # fmt: skip
        out = fastpost.paged_attention(query.tanh(), keys, values, table, length, cu_seqlens=cu_seqlens,
                                       new_keys=key.sin(), new_values=value, begun=begun)  # fmt: skip
        return out + keys.sum()

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=frames)
    for n in (9, 33, 17, 100):
        new = [torch.randn(n, heads, 16, device=device) for heads in (6, 2, 2)]
        length, cu_seqlens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([n + 7], [0, n]))
        results = []
        for f in (layer, compiled):
            own = [x.clone() for x in pools]
            results.append((f(*new, *own, length, cu_seqlens), *own))
        for ours, eager in zip(results[1], results[0]):
            torch.testing.assert_close(ours, eager)
        assert results[1][1].any() and frames.frame_count == 1
