# SPDX-License-Identifier: Apache-2.0
"""The whole mixture as one node of autograd: python/fastpost/ops/_experts.py."""

import pytest
import torch

import fastpost
from compare import FLOATS, error, overall
from drawn import draw
from fastpost.ops import _expert_loop
from fastpost.ops._experts import experts
from fastpost.reference import grouped_gemm, moe_combine, moe_dispatch

ROUTINGS = moe_dispatch.cases()


def composed(x, plan, gate, up, down, activation="swiglu"):
    """In plain torch, from the definitions of the ops."""
    a = grouped_gemm.grouped_gemm(x, up, plan.offset, order=plan.order, top_k=plan.place.shape[1],
                                  activation=activation)  # fmt: skip
    return moe_combine.moe_combine(grouped_gemm.grouped_gemm(a, down, plan.offset), plan, gate)


def inputs(case, dtype, device, inner=20):
    x, plan = case.inputs(dtype, device)
    up = draw(case.e, 2 * inner, case.h, seed=2, device=device, dtype=dtype) / case.h**0.5
    down = draw(case.e, case.h, inner, seed=3, device=device, dtype=dtype) / inner**0.5
    return plan, [x, torch.rand(plan.place.shape, device=device), up, down]


def run(f, plan, leaves, convert=torch.clone, **options):
    x, gate, up, down = leaves = [convert(t).detach().requires_grad_() for t in leaves]
    out = f(x, plan, gate, up, down, **options)
    out.backward(draw(*out.shape, seed=5, device=out.device).to(out.dtype))
    return [out.detach()] + [t.grad for t in leaves]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", ROUTINGS, ids=lambda c: c.name)
def test_matches_the_composition(case, dtype, device):
    plan, leaves = inputs(case, dtype, device)
    ours = run(experts, plan, leaves)
    truth = run(composed, plan, leaves, torch.Tensor.double)
    # The plain composition keeps float32 between a product and its activation, where ours rounds what it keeps.
    room = 1e-6 if dtype == torch.float32 else 6e-3 if dtype == torch.bfloat16 else 1e-3
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all() and overall(a, b) < room
    assert ours[2].dtype == torch.float32  # the gate's


@pytest.mark.parametrize("activation", list(grouped_gemm.GATED))
def test_every_activation(activation, device):
    plan, leaves = inputs(ROUTINGS[0], torch.float32, device)
    ours = run(experts, plan, leaves, activation=activation)
    truth = run(composed, plan, leaves, torch.Tensor.double, activation=activation)
    for a, b in zip(ours, truth, strict=True):
        assert overall(a, b) < 1e-6 and error(a.flatten(0, -2), b.flatten(0, -2)) < 2e-5


def test_recomputing_changes_no_bit_and_keeps_only_x(device):
    plan, leaves = inputs(ROUTINGS[0], torch.bfloat16, device)
    assert all(map(torch.equal, run(experts, plan, leaves), run(experts, plan, leaves, recompute=True)))
    kept = []
    for recompute in (False, True):
        x, gate, up, down = (t.detach().requires_grad_() for t in leaves)
        sizes = {}

        def pack(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            experts(x, plan, gate, up, down, recompute=recompute)
        weights = sum(t.untyped_storage().nbytes() for t in (up, down))
        kept.append(sum(sizes.values()) - weights)
    small = sum(t.nbytes for t in (*plan, leaves[1]))  # the plan and the gates
    assert kept[1] == leaves[0].nbytes + small
    assert kept[0] == kept[1] + len(plan.order) * leaves[2].shape[1] * 2  # the pre-activation


def test_frozen_weights_get_no_gradient(device):
    """Each subset of what wants a gradient gives the same bits as all of them."""
    plan, leaves = inputs(ROUTINGS[0], torch.bfloat16, device)
    whole = run(experts, plan, leaves)[1:]
    for wanted in range(1, 16):
        x, gate, up, down = here = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(leaves)]
        out = experts(x, plan, gate, up, down)
        out.backward(draw(*out.shape, seed=5, device=device).to(out.dtype))
        for i, (t, full) in enumerate(zip(here, whole, strict=True)):
            assert (t.grad is None) if not wanted >> i & 1 else torch.equal(t.grad, full)


def test_tokens_may_be_in_any_order(device):
    """A permutation of tokens leaves each token's result as it is."""
    x, logits = draw(90, 32, device=device), draw(90, 8, seed=1, device=device)
    up, down = draw(8, 40, 32, seed=2, device=device), draw(8, 32, 20, seed=3, device=device)

    def layer(x, logits):
        routing = fastpost.moe_route(logits, 2)
        return experts(x, routing.plan, routing.gate, up, down)

    turned = torch.randperm(90, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(layer(x[turned], logits[turned]), layer(x, logits)[turned])


def test_biases_and_transposed_weights_go_through_the_ops(device):
    plan, leaves = inputs(ROUTINGS[0], torch.float32, device)
    up_bias, down_bias = draw(8, 40, seed=7, device=device), draw(8, 64, seed=8, device=device)
    x, gate, up, down = leaves
    ours = experts(x, plan, gate, up, down, up_bias=up_bias, down_bias=down_bias)
    wide = [t.double() for t in (x, up, down, up_bias, down_bias, gate)]
    a = grouped_gemm.grouped_gemm(wide[0], wide[1], plan.offset, order=plan.order, top_k=2, bias=wide[3],
                                  activation="swiglu")  # fmt: skip
    y = grouped_gemm.grouped_gemm(a, wide[2], plan.offset, bias=wide[4])
    assert error(ours, moe_combine.moe_combine(y, plan, wide[5])) < 3e-6
    turned = [x, gate, up.mT.contiguous().mT, down.mT.contiguous().mT]
    for a, b in zip(run(experts, plan, turned), run(experts, plan, leaves), strict=True):
        assert error(a.flatten(0, -2), b.flatten(0, -2)) < 3e-6


def test_gradcheck(device):
    """Through router, gates and experts in float64."""
    x, logits = draw(6, 5, device=device).double(), draw(6, 4, seed=1, device=device).double()
    up, down = draw(4, 6, 5, seed=2, device=device).double(), draw(4, 5, 3, seed=3, device=device).double()

    def layer(x, logits, up, down):
        r = fastpost.moe_route(logits, 2)
        return experts(x, r.plan, r.gate, up, down), r.load_balance, r.z

    assert torch.autograd.gradcheck(layer, [t.requires_grad_() for t in (x, logits, up, down)])


def test_opcheck_and_compile(device):
    plan, (x, gate, up, down) = inputs(ROUTINGS[0], torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, gate, up, down)]
    args = leaves[0], leaves[1], *plan, leaves[2], leaves[3], 1, True
    torch.library.opcheck(torch.ops.fastpost.moe_experts.default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_gradient_gives_the_same_bits(dtype, device):
    plan, (x, gate, up, down) = inputs(ROUTINGS[0], dtype, device)
    with torch.no_grad():
        quiet = experts(x, plan, gate, up, down)
    assert torch.equal(quiet, experts(x.requires_grad_(), plan, gate, up, down).detach())


@pytest.mark.parametrize("case", ROUTINGS, ids=lambda c: c.name)
def test_products_by_torch(case, device, monkeypatch):
    """What CPUs with matrix units take, on any CPU."""
    if device != "cpu":
        pytest.skip("a way of the CPU")
    plan, leaves = inputs(case, torch.float32, device)
    ours = run(experts, plan, leaves)
    used = []
    monkeypatch.setattr(_expert_loop, "preferred", lambda weight, rows: used.append(rows) or True)
    for a, b in zip(run(experts, plan, leaves), ours, strict=True):
        assert overall(a, b) < 1e-6
    assert len(used) >= 6  # without tokens the pre-activation looks like one that was not kept


def test_an_activation_that_is_not_gated_is_refused():
    plan, (x, gate, up, down) = inputs(ROUTINGS[0], torch.float32, "cpu")
    for activation in (None, "silu"):
        with pytest.raises(ValueError, match="activation: expected"):
            experts(x, plan, gate, up, down, activation=activation)
