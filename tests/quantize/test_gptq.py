# SPDX-License-Identifier: Apache-2.0
"""GPTQ against closed forms and against a plain float64 version with explicit inverses."""

import pytest
import torch
from drawn_matrices import draw, moments

from fastpost.quantize.compensation import inverse_factor
from fastpost.quantize.gptq import gptq
from fastpost.quantize.grid import Grid
from fastpost.quantize.moments import proxy_loss
from fastpost.quantize.rtn import rtn


def plain_gptq(weight, hessian, grid, group_size, damping=0.01):
    """Optimal brain surgery, one column at a time, with the inverse of what is left worked out anew each time."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    n, k = weight.shape
    group_size = k if group_size == -1 else group_size
    hessian += damping * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    codes = torch.empty(n, k, dtype=torch.float64)
    for j in range(k):
        if j % group_size == 0:
            scales, zeros = grid.parameters(weight[:, j : j + group_size])
        codes[:, j] = grid.codes(weight[:, j], scales, zeros)
        error = weight[:, j] - (codes[:, j] - zeros) * scales
        inverse = torch.linalg.inv(hessian[j:, j:])
        weight[:, j:] -= error[:, None] / inverse[0, 0] * inverse[0]
    return codes


@pytest.mark.parametrize("bits,group_size,symmetric", [(4, 64, False), (4, 32, True), (3, -1, False), (2, 96, False)])
def test_same_codes_as_plain_float64(bits, group_size, symmetric):
    weight, hessian = draw(8, 192, dtype=torch.float64)
    grid = Grid(bits, symmetric)
    made = gptq(weight, hessian, grid, group_size)
    codes = plain_gptq(weight, hessian, grid, group_size)
    size = 192 if group_size == -1 else group_size
    want = torch.empty_like(weight)
    # The values, group by group, from the codes: the same grid points mean the same scales, too.
    for lo in range(0, 192, size):
        a, b = made.weight[:, lo : lo + size], codes[:, lo : lo + size]
        slope = (a.amax(1) - a.amin(1)) / (b.amax(1) - b.amin(1))
        want[:, lo : lo + size] = a.amin(1, keepdim=True) + slope[:, None] * (b - b.amin(1, keepdim=True))
    assert torch.allclose(made.weight, want, atol=1e-9)


def test_float32_is_as_good_as_float64():
    weight, hessian = draw(16, 256, correlation=0.99, dtype=torch.float64)
    grid = Grid(4)
    wide = proxy_loss(gptq(weight, hessian, grid, 64).weight - weight, hessian)
    narrow = proxy_loss(gptq(weight.float(), hessian.float(), grid, 64).weight - weight, hessian)
    assert narrow == pytest.approx(wide, rel=0.02)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_with_unit_hessian_it_is_rtn(group_size, act_order):
    weight, _ = draw()
    grid = Grid(4)
    made = gptq(weight, torch.eye(256), grid, group_size, act_order=act_order)
    want = rtn(weight, grid, group_size)
    assert torch.equal(made.weight, want.weight) and torch.equal(made.int4.dequantize(), want.int4.dequantize())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_loss_is_below_that_of_rtn_on_average(bits, act_order):
    grid, ours, theirs = Grid(bits), 0.0, 0.0
    for seed in range(6):
        weight, hessian = draw(seed=seed)
        ours += proxy_loss(gptq(weight, hessian, grid, 64, act_order=act_order).weight - weight, hessian)
        theirs += proxy_loss(rtn(weight, grid, 64).weight - weight, hessian)
    assert ours < 0.7 * theirs


def test_act_order_is_kept_in_the_container():
    weight, hessian = draw()
    made = gptq(weight, hessian, Grid(4), 64, act_order=True)
    assert torch.equal(made.int4.order, torch.argsort(hessian.diagonal(), descending=True, stable=True))
    assert torch.equal(made.int4.dequantize(), made.weight)
    plain = gptq(weight[:, made.int4.order], hessian[made.int4.order][:, made.int4.order], Grid(4), 64)
    assert torch.equal(plain.weight, made.weight[:, made.int4.order])


def test_dead_columns():
    """An input that is always 0 gets weight 0 and has no say in anything else."""
    weight, hessian = draw()
    dead = torch.tensor([5, 70, 255])
    hessian[dead], hessian[:, dead] = 0, 0
    made = gptq(weight, hessian, Grid(4), -1)
    assert not made.weight[:, dead].any() and torch.isfinite(made.weight).all()
    for scale in (1e-6, 1e6):  # the same whatever the unit of the inputs
        assert torch.allclose(gptq(weight, hessian * scale, Grid(4), -1).weight, made.weight, atol=1e-4)
    assert not gptq(weight, torch.zeros_like(hessian), Grid(4), 64).weight.any()


def test_factor_of_the_inverse():
    _, hessian = draw(dtype=torch.float64)
    factor = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-8, atol=1e-10)


def test_moments_are_running_means():
    x = torch.randn(50, 6, dtype=torch.float64).float()
    made = moments(x[:7].view(1, 7, 6))
    for part in (x[7:7], x[7:8], x[8:40], x[40:]):
        made.add(part)
    assert made.rows == 50
    assert torch.allclose(made.hessian, 2 * x.T @ x / 50, atol=1e-5)
    assert torch.allclose(made.mean_abs, x.abs().mean(0)) and torch.equal(made.max_abs, x.abs().amax(0))
    with pytest.raises(ValueError, match="NaN or infinity"):
        made.add(torch.full((1, 6), torch.nan))


def test_few_rows_need_damping():
    weight, hessian = draw(8, 128, rows=4)
    gptq(weight, hessian, Grid(4), 64)
    with pytest.raises(ValueError, match="more damping"):
        gptq(weight, -torch.eye(128), Grid(4), 64)
    with pytest.raises(ValueError, match=r"expected a finite matrix \[128, 128\]"):
        gptq(weight, hessian[:64, :64], Grid(4), 64)
