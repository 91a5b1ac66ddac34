# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm's CUDA kernels on the CPU: plain ones, those of mma.sync with the instruction replaced by exchanges that
follow the same fragments, and what Hopper's do before and after WGMMA. Outputs are poisoned with NaN."""

import itertools
import shutil
from dataclasses import dataclass, replace

import on_host
import pytest
import torch

from compare import FLOATS, error
from fastpost.reference import grouped_gemm as reference
from fastpost.reference import moe_dispatch

pytestmark = pytest.mark.skipif(shutil.which(on_host.COMPILER) is None, reason=f"needs {on_host.COMPILER}")
NAN = torch.nan
HALVES = [torch.bfloat16, torch.float16]
CASES = {c.name: c for c in reference.cases() if c.routing.t * c.n < 50_000}  # fibres are slow


def routed(name, t, k, e, h, n, *args, **kwargs):
    special = {key: kwargs.pop(key) for key in ("one_expert", "absent") if key in kwargs}
    return reference.Case(name, moe_dispatch.Case(name, t, k, e, h, **special), n, *args, **kwargs)


# Columns that fill neither tiles nor halves, K that ends within a step, several row tiles of an expert.
WIDE = [
    routed("wide", 150, 2, 3, 72, 272, "swiglu", bias=True),
    routed("wide-plain", 150, 2, 3, 72, 264, bias=True, absent=0.2),
    routed("wide-transposed", 150, 2, 3, 40, 272, "geglu", transposed=True),
    routed("wide-transposed-plain", 150, 2, 3, 40, 136, transposed=True, gather=False),
    routed("wide-rows", 110, 2, 2, 200, 40, one_expert=True),
    routed("deep", 70, 1, 2, 520, 48, "reglu"),
]
FEW = [
    routed("few", 20, 2, 4, 264, 80, "swiglu", bias=True),
    routed("few-transposed", 20, 2, 4, 136, 48, "swiglu", transposed=True),
    routed("few-one-expert", 41, 1, 8, 136, 40, one_expert=True, gather=False),
]


@pytest.fixture(params=[8, 9], ids=["sm_80", "sm_90"])
def capability(request, core):
    core.set_capability(request.param)
    yield request.param
    core.set_capability(8)


def number(activation):
    return reference.ACTIVATIONS.index(activation)


def nans(*shape, like):
    return torch.full(shape, NAN, dtype=like.dtype)


def workspace(core, weight, rows):
    size = torch.zeros(1, dtype=torch.int64)
    core.grouped_bytes(weight, rows, size)
    return torch.full((int(size) // 4,), NAN).view(torch.uint8)


def forward(core, x, weight, offset, *, order=None, top_k=1, bias=None, activation=None, keep=True):
    rows, n = len(x) if order is None else len(order), weight.shape[1]
    out = nans(rows, n // 2 if activation else n, like=x)
    pre = nans(rows, n, like=x) if activation and keep else None
    core.grouped_gemm(
        x, order, top_k, weight, offset, bias, number(activation), workspace(core, weight, rows), pre, out
    )
    return out, pre


def rounding(dtype):
    return {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]


def check_forward(case, dtype, core):
    args, options = case.inputs(dtype)
    out, pre = forward(core, *args, **options)
    wide = {k: v.double() if k == "bias" else v for k, v in options.items()}
    truth = reference.grouped_gemm(args[0].double(), args[1].double(), args[2], **wide)
    plain = reference.grouped_gemm(*args, **options)
    assert error(out, truth) <= 1.2 * error(plain, truth) + 2e-6
    assert torch.all(out[int(args[2][-1]) :] == 0)
    if pre is not None:
        before = reference.grouped_gemm(args[0].double(), args[1].double(), args[2], **wide | {"activation": None})
        assert error(pre, before) <= rounding(dtype)
        assert torch.all(pre[int(args[2][-1]) :] == 0)
        assert torch.equal(forward(core, *args, **options, keep=False)[0], out)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_forward(case, dtype, core):
    check_forward(case, dtype, core)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", WIDE + FEW, ids=lambda c: c.name)
def test_forward_of_tensor_cores(case, dtype, core, capability):
    if capability == 9 and case in FEW:
        pytest.skip("runs what runs on sm_80")
    check_forward(case, dtype, core)


@pytest.mark.parametrize("before,after", [(0, 8), (8, 16), (1, 0), (0, 3), (4, 4)])  # aligned for 16 bytes or not
@pytest.mark.parametrize("transposed", [False, True])
def test_views(before, after, transposed, core, capability):
    case = routed("views", 90, 1, 2, 40, 48, "swiglu", transposed=transposed, gather=before == 0)
    (x, weight, offset), options = case.inputs(torch.bfloat16)

    def apart(t):
        room = torch.full((*t.shape[:-1], before + t.shape[-1] + after), NAN).to(t)
        room[..., before : before + t.shape[-1]] = t
        return room[..., before : before + t.shape[-1]]

    expected, _ = forward(core, x, weight, offset, **options)
    out = apart(torch.full_like(expected, NAN))
    apart_weight = apart(weight.mT.contiguous()).mT if transposed else apart(weight)
    space, order = workspace(core, weight, len(out)), options.get("order")
    core.grouped_gemm(apart(x), order, 1, apart_weight, offset, None, number("swiglu"), space, None, out)
    truth = reference.grouped_gemm(x.double(), weight.double(), offset, **options)
    assert error(out, truth) <= 1.2 * error(expected, truth) + 1e-6


def test_one_matrix_for_all_experts(core, capability):
    """A stride of 0, which the copy engine would refuse."""
    (x, weight, offset), options = routed("shared", 110, 1, 3, 40, 48).inputs(torch.bfloat16)
    weight = weight[:1].expand(3, -1, -1)
    out, _ = forward(core, x, weight, offset, **options)
    truth = reference.grouped_gemm(x.double(), weight.double(), offset, **options)
    assert error(out, truth) <= rounding(torch.bfloat16)


# ---- the backward through an activation ----


@dataclass
class Backward:
    """The second product of an MoE, backwards: weight [E, H, I] is passed transposed."""

    t: int
    k: int
    e: int
    h: int
    i: int
    activation: str = "swiglu"
    transposed: bool = True  # its memory is [E, H, I], as it is where it is used
    gated: bool = True
    absent: float = 0.0

    def inputs(self, dtype):
        g = torch.Generator().manual_seed(7)
        routing = moe_dispatch.Case("", self.t, self.k, self.e, self.h, absent=self.absent)
        grad, plan = routing.inputs(dtype)
        weight = (torch.randn(self.e, self.h, self.i, generator=g) / self.h**0.5).to(dtype).mT
        if not self.transposed:
            weight = weight.contiguous()
        pre = torch.randn(self.t * self.k, 2 * self.i, generator=g).to(dtype)
        gate = torch.rand(self.t * self.k, generator=g) + 0.1
        if not self.gated:
            return moe_dispatch.moe_dispatch(grad, plan), None, 1, weight, plan.offset, pre, None, plan
        return grad, plan.order, self.k, weight, plan.offset, pre, gate, plan


BACKWARD = {
    "swiglu": Backward(50, 2, 4, 48, 40),
    "geglu": Backward(50, 2, 4, 48, 40, "geglu"),
    "tanh": Backward(50, 2, 4, 48, 40, "geglu_tanh", transposed=False),
    "reglu": Backward(50, 2, 4, 48, 40, "reglu", gated=False),
    "odd": Backward(37, 3, 5, 23, 19),
    "absent": Backward(45, 2, 6, 32, 72, absent=0.3),
    "several-tiles": Backward(150, 2, 3, 40, 296),
    "several-tiles-k": Backward(150, 2, 3, 72, 152, transposed=False, absent=0.2),
    "no-tokens": Backward(0, 2, 3, 40, 16),
    "nobody": Backward(9, 2, 3, 40, 16, absent=1.1),
}


def backward_truth(case, dtype, grad, order, top_k, weight, offset, pre, gate, plan):
    """(grad_pre, activated, grad_gate) in float64, or with sums in float32 rounded as plain torch would."""
    wide = [t.double() for t in (grad, weight, pre)]
    d = reference.grouped_gemm(wide[0], wide[1], offset, order=order, top_k=top_k)
    if dtype is not None:
        d = d.to(dtype).double()
    leaf = wide[2].requires_grad_()
    a = reference.activate(leaf, case.activation)
    scale = 1 if gate is None else gate.double()[plan.order.long()][:, None]
    present = (torch.arange(len(pre)) < offset[-1])[:, None]
    (grad_pre,) = torch.autograd.grad(a, leaf, torch.where(present, scale * d, 0))
    a = a.detach()
    dot = torch.where(present[:, 0], (d * a).sum(1), 0)
    grad_gate = torch.zeros(len(pre), dtype=torch.float64).index_copy(0, plan.order.long(), dot)
    results = grad_pre, torch.where(present, scale * a, 0), grad_gate
    return results if dtype is None else (*(r.to(dtype) for r in results[:2]), grad_gate)


def run_backward(core, case, grad, order, top_k, weight, offset, pre, gate, plan):
    pre = pre.clone()
    pre[int(offset[-1]) :] = NAN  # is not looked at
    rows, i = len(pre), case.i
    grad_pre, activated = nans(rows, 2 * i, like=pre), nans(rows, i, like=pre)
    grad_gate = None if gate is None else torch.full((rows,), NAN)
    core.grouped_gemm_activation_backward(grad, order, top_k, weight, offset, pre, number(case.activation), gate,
                                          workspace(core, weight, rows), grad_pre, activated, grad_gate)  # fmt: skip
    return grad_pre, activated, grad_gate


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", BACKWARD)
def test_activation_backward(name, dtype, core, capability):
    if capability == 9 and dtype == torch.float32:
        pytest.skip("runs what runs on sm_80")
    case = BACKWARD[name]
    inputs = case.inputs(dtype)
    ours = run_backward(core, case, *inputs)
    truth, plain = backward_truth(case, None, *inputs), backward_truth(case, dtype, *inputs)
    for a, p, t in zip(ours, plain, truth):
        if a is None:
            continue
        assert error(a, t) <= 1.2 * error(p, t) + 5e-6
        if a.ndim == 2:
            assert torch.all(a[int(inputs[4][-1]) :] == 0)
    if ours[2] is not None:
        absent = inputs[1].long()[int(inputs[4][-1]) :]
        assert torch.all(ours[2][absent] == 0)


# ---- the weights' gradient ----


@dataclass
class Gradient:
    t: int
    k: int
    e: int
    n: int
    h: int
    absent: float = 0.0
    one_expert: bool = False
    transposed: bool = False
    grouped: bool = False  # both lie in grouped order

    def inputs(self, dtype):
        g = torch.Generator().manual_seed(5)
        routing = moe_dispatch.Case("", self.t, self.k, self.e, self.h, self.one_expert, self.absent)
        x, plan = routing.inputs(dtype)
        grad = torch.randn(self.t * self.k, self.n, generator=g).to(dtype)
        return grad, x, plan


GRADIENT = {
    "plain": Gradient(50, 2, 4, 48, 40),
    "grouped": Gradient(50, 2, 4, 48, 40, grouped=True),
    "transposed": Gradient(50, 2, 4, 136, 40, transposed=True),
    "odd": Gradient(37, 3, 5, 23, 19),
    "odd-transposed": Gradient(37, 3, 5, 23, 19, transposed=True),
    "several-tiles": Gradient(70, 2, 2, 200, 144),
    "many-tiles": Gradient(6, 1, 2, 2200, 264),  # more of them than pass over the columns together
    "absent": Gradient(45, 2, 6, 32, 72, absent=0.3),
    "one-has-all": Gradient(150, 1, 3, 24, 16, one_expert=True),
    "no-tokens": Gradient(0, 2, 3, 24, 16),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", GRADIENT)
def test_weight_gradient(name, dtype, core, capability):
    if capability == 9 and dtype == torch.float32:
        pytest.skip("runs what runs on sm_80")
    case = GRADIENT[name]
    grad, x, plan = case.inputs(dtype)
    grad_rows, x_rows = grad[plan.order.long()], x[plan.order.long() // case.k]
    grad_rows[int(plan.offset[-1]) :] = NAN  # nobody's
    out = nans(case.e, case.n, case.h, like=x)
    if case.transposed:
        out = out.mT.contiguous().mT
    bias = nans(case.e, case.n, like=x)
    space = workspace(core, out, len(plan.order))
    if case.grouped:
        core.grouped_gemm_weight_gradient(grad_rows, None, 1, x_rows, None, 1, plan.offset, space, out, bias)
    else:
        core.grouped_gemm_weight_gradient(grad, plan.order, 1, x, plan.order, case.k, plan.offset, space, out, bias)
    for e, (begin, end) in enumerate(itertools.pairwise(plan.offset.tolist())):
        g, r = grad_rows[begin:end].double(), x_rows[begin:end].double()
        assert error(out[e], g.T @ r) <= rounding(dtype)
        assert error(bias[e], g.sum(0)) <= rounding(dtype)
        if begin == end:
            assert torch.all(out[e] == 0) and torch.all(bias[e] == 0)


def test_gradient_of_a_bias_alone(core, capability):
    """No columns of x: how the bias's gradient is asked for where the weight needs none."""
    grad, x, plan = GRADIENT["plain"].inputs(torch.bfloat16)
    bias, nothing = nans(4, 48, like=x), x.new_empty(4, 48, 0)
    core.grouped_gemm_weight_gradient(grad, plan.order, 1, x[:, :0], plan.order, 2, plan.offset, None, nothing, bias)
    for e, (begin, end) in enumerate(itertools.pairwise(plan.offset.tolist())):
        assert error(bias[e], grad[plan.order.long()[begin:end]].double().sum(0)) <= rounding(torch.bfloat16)


# ---- elementwise ----


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", list(reference.GATED))
@pytest.mark.parametrize("rows,i,extra", [(5, 40, 0), (9, 19, 3), (1, 8, 8), (0, 8, 0), (300, 17, 0)])
def test_activate(rows, i, extra, activation, dtype, core):
    room = (3 * torch.randn(rows, 2 * i + extra)).to(dtype)
    pre, grad_out = room[:, : 2 * i], torch.randn(rows, i).to(dtype)
    out, grad_pre = nans(rows, i, like=pre), nans(rows, 2 * i, like=pre)
    core.grouped_gemm_activate(pre, number(activation), grad_out, out, grad_pre)
    leaf = pre.double().requires_grad_()
    truth = reference.activate(leaf, activation)
    (true_grad,) = torch.autograd.grad(truth, leaf, grad_out.double())
    assert error(out, truth) <= rounding(dtype) and error(grad_pre, true_grad) <= rounding(dtype)
    alone = nans(rows, i, like=pre)
    core.grouped_gemm_activate(pre, number(activation), None, alone, None)
    assert torch.equal(alone, out)


# ---- tiles ----


@pytest.mark.parametrize("experts", [1, 2, 7, 31, 32, 33, 100, 1024])
@pytest.mark.parametrize("tile_rows,column_tiles", [(32, 5), (128, 1), (64, 3)])
def test_tiles_cover_each_place_once(experts, tile_rows, column_tiles, core):
    g = torch.Generator().manual_seed(experts)
    for most in (0, 1, 40, 3000 // experts + 1):
        counts = torch.randint(0, most + 1, (experts,), generator=g)
        counts[torch.rand(experts, generator=g) < 0.3] = 0
        if most == 40:
            counts[-1] = 33 * tile_rows  # more than pass over the columns together
        offset = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        rows = int(offset[-1]) + most // 2
        room = (rows // tile_rows + min(rows, experts + 1)) * column_tiles
        tiles = torch.full((room, 4), -1, dtype=torch.int32)
        core.grouped_tiles(offset, rows, tile_rows, column_tiles, tiles)
        bounds = [*offset.tolist(), rows]
        expected = {
            (e, first, min(first + tile_rows, bounds[e + 1]), column)
            for e in range(experts + 1)
            for first in range(bounds[e], bounds[e + 1], tile_rows)
            for column in range(column_tiles)
        }
        found = [tuple(t) for t in tiles.tolist() if t[0] >= 0]
        assert len(found) == len(expected) and set(found) == expected


def test_values_out_of_range_stay_inside(core):
    """Offsets and orders that make no sense: results are wrong, but nothing else is touched."""
    case = replace(CASES["mixtral"], activation=None)
    (x, weight, _), options = case.inputs(torch.bfloat16)
    room = torch.full((len(options["order"]) + 2, case.n), 7.0).bfloat16()
    order = torch.randint(-(2**31), 2**31 - 1, (len(options["order"]),), dtype=torch.int64).int()
    for bad in ([-5, 2, 900, 3, 10**9, -(10**9), 4, 50, 2**31 - 1], [0] * 9, [2**31 - 1] * 9):
        offset = torch.tensor(bad, dtype=torch.int32)
        core.grouped_gemm(x, order, 2, weight, offset, None, 0, workspace(core, weight, 2), None, room[1:-1])
        assert torch.all(room[[0, -1]] == 7)


def test_bits_do_not_change(core, capability):
    for case in (WIDE[0], FEW[0]):
        args, options = case.inputs(torch.bfloat16)
        first, again = (forward(core, *args, **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again))
