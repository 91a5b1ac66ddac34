# SPDX-License-Identifier: Apache-2.0
"""Int4Linear is nn.Linear with the dequantised weight, in every dtype, under every wrapper, and its bytes stay."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tiny
from fastpost.nn import Int4Linear, ShiftedInt4Linear, quantize_linears
from fastpost.nn.int4_packed import PACKED

FORMATS = {
    "symmetric": {"group_size": 32},
    "asymmetric": {"group_size": 64, "scheme": "asymmetric", "scales_dtype": torch.float16},
    "a scale a row": {"group_size": -1},
    "nf4": {"group_size": 64, "scheme": "nf4"},
    "nested": {"group_size": 32, "scheme": "nf4", "double_quant": True},
    "act_order": {"group_size": 32, "act_order": True},
}


def layer(name="symmetric", bias=True, n=40, k=200):
    options = dict(FORMATS[name])
    act_order = options.pop("act_order", False)
    made = Int4Linear.from_linear(nn.Linear(k, n, bias=bias), **options)
    if act_order:
        made = Int4Linear.from_int4(replace(made.packed, order=torch.randperm(k)), made.bias)
    return made


def bits(module):
    return {n: (p.dtype, p.view(-1).view(torch.uint8).tolist()) for n, p in module.named_parameters() if n != "bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_it_is_the_linear_layer_of_the_dequantised_weight(name, dtype):
    ours = layer(name).to(dtype)
    theirs = ours.to_linear(torch.float32).double()
    x = torch.randn(3, 5, 200).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    out, truth = ours(x), theirs(wide)
    assert out.dtype == dtype and out.shape == (3, 5, 40)
    grad = torch.randn_like(truth)
    out.backward(grad.to(dtype))
    truth.backward(grad.to(dtype).double())
    eps = 4 * torch.finfo(dtype).eps
    for a, b in ((out, truth), (x.grad, wide.grad), (ours.bias.grad, theirs.bias.grad)):
        assert (a.double() - b).norm() <= eps * b.norm()
    assert all(p.grad is None and not p.requires_grad for n, p in ours.named_parameters() if n != "bias")


@pytest.mark.parametrize("name", FORMATS)
def test_no_conversion_touches_the_bytes(name):
    made = layer(name)
    before = bits(made)
    model = nn.Sequential(made)
    for convert in (model.half, model.bfloat16, model.double, model.float, lambda: model.to(torch.bfloat16)):
        convert()
        assert bits(made) == before
    assert made.bias.dtype == torch.bfloat16
    assert {n for n, _ in made.named_parameters()} <= {*PACKED, "bias"}


@pytest.mark.parametrize("name", FORMATS)
def test_state_dict_there_and_back(name):
    made, stream = layer(name), io.BytesIO()
    torch.save(made.state_dict(), stream)
    stream.seek(0)
    options = FORMATS[name]
    for device, assign in (("cpu", False), ("meta", True)):
        empty = Int4Linear(200, 40, device=device, **options)
        stream.seek(0)
        assert str(empty.load_state_dict(torch.load(stream), assign=assign)) == "<All keys matched successfully>"
        assert bits(empty) == bits(made)
        x = torch.randn(2, 200)
        assert torch.equal(empty(x), made(x)) and not any(p.requires_grad for p in _packed(empty))
    assert bits(copy.deepcopy(made)) == bits(made)


def _packed(module):
    return [p for n, p in module.named_parameters() if n != "bias"]


def test_another_format_is_not_converted():
    state = layer("symmetric").state_dict()
    with pytest.raises(RuntimeError, match=r"scales: expected torch.float32, got torch.bfloat16: another four-bit"):
        Int4Linear(200, 40, group_size=32, scales_dtype=torch.float32).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for scales"):
        Int4Linear(200, 40, group_size=64).load_state_dict(state)


@pytest.mark.parametrize("name", FORMATS)
def test_a_new_one_is_zero_and_takes_no_memory_on_meta(name):
    fresh = Int4Linear(200, 40, **FORMATS[name])
    assert torch.equal(fresh(torch.randn(3, 200)), torch.zeros(3, 40)) and not fresh.dequantize().any()
    fresh.packed.check()
    with torch.device("meta"):
        ghost = Int4Linear(200, 40, **FORMATS[name])
    assert all(p.is_meta for p in ghost.parameters())
    assert {n: (p.shape, p.dtype) for n, p in ghost.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in fresh.named_parameters()
    }
    assert all(not p.is_meta for p in ghost.to_empty(device="cpu").parameters())


def test_from_a_linear_layer_on_meta():
    with torch.device("meta"):
        linear = nn.Linear(200, 40)
    made = Int4Linear.from_linear(linear, 64, "nf4", double_quant=True)
    assert made.codes.is_meta and made.bias is linear.bias and made.scales.dtype == torch.uint8


@pytest.mark.parametrize("name", ["symmetric", "nested", "act_order"])
def test_autocast_and_checkpointing(name):
    made, x = layer(name), torch.randn(6, 200, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, made(x.bfloat16()), rtol=2e-2, atol=2e-2)
    plain = torch.autograd.grad(made(x).square().sum(), x)[0]
    again = torch.autograd.grad(checkpoint(made, x, use_reentrant=False).square().sum(), x)[0]
    assert torch.equal(plain, again)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["symmetric", "nested", "act_order"])
def test_it_compiles_whole(name):
    made = layer(name)
    model = nn.Sequential(made, nn.ReLU(), layer("nf4", n=8, k=40))
    x = torch.randn(6, 200, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, model)]
    torch.testing.assert_close(*grads)


def test_what_it_says_of_itself():
    assert repr(layer("nested")) == (
        "Int4Linear(in_features=200, out_features=40, bias=True, nf4, group_size=32, scales nested)"
    )
    assert "symmetric, group_size=32, scales bfloat16, act_order" in repr(layer("act_order", bias=False))
    assert layer().weight is None


REFUSED = [
    (lambda: Int4Linear(0, 4), "expected at least one column and row"),
    (lambda: Int4Linear(8, 4, scheme="fp4"), "scheme: expected one of symmetric, asymmetric, nf4, got 'fp4'"),
    (lambda: Int4Linear(8, 4, group_size=48), "group_size: expected 32, 64, 128 or -1"),
    (lambda: Int4Linear(8, 4, double_quant=True), "double_quant: expected the scheme nf4"),
    (lambda: Int4Linear.from_linear(nn.ReLU()), "linear: expected a torch.nn.Linear, got ReLU"),
    (lambda: Int4Linear.from_linear(layer()), "linear: expected a torch.nn.Linear, got Int4Linear"),
    (lambda: Int4Linear.from_int4(layer().packed, torch.ones(3)), r"bias: expected floats \[40\], got .* \[3\]"),
    (lambda: layer().replace_weight(layer(n=8).packed), r"weight: expected \[40, 200\], got \[8, 200\]"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=r"\[Int4Linear\] " + message):
        make()


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_a_model_keeps_its_head_and_changes_little(tie):
    model, ids = tiny.model(tie=tie), torch.arange(5, 25)[None]
    before = model(ids).logits
    report = quantize_linears(model, group_size=32)
    assert len(report.names) == 14 and "lm_head" not in report.names
    assert type(model.lm_head) is nn.Linear and report.bytes_after < report.bytes_before / 2
    assert 0.02 < report.error < 0.2 and "14 linear layers in four bits" in report.line()
    after = model(ids).logits
    assert 0 < (after - before).norm() < 0.5 * before.norm()
    exact = copy.deepcopy(model)
    for name in report.names:
        parent, _, last = name.rpartition(".")
        setattr(exact.get_submodule(parent), last, model.get_submodule(name).to_linear(torch.float32))
    torch.testing.assert_close(exact(ids).logits, after, rtol=1e-4, atol=1e-4)


def test_layers_can_be_left_out():
    model = tiny.model(tie=False)
    report = quantize_linears(model, group_size=32, skip=["q_proj", "model.layers.0.mlp.up_proj"])
    assert type(model.model.layers[1].self_attn.q_proj) is nn.Linear is type(model.model.layers[0].mlp.up_proj)
    assert "lm_head" in report.names and "model.layers.1.mlp.up_proj" in report.names
    with pytest.raises(ValueError, match="skip: expected names of linear layers, got 'w_proj'"):
        quantize_linears(model, skip=["w_proj"])
    with pytest.raises(ValueError, match="expected linear layers, found none in ReLU"):
        quantize_linears(nn.ReLU())
    bad = nn.Sequential(nn.Linear(32, 4))
    bad[0].weight.data[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"\[quantize_linears\] 0: .*row 2 holds NaN"):
        quantize_linears(bad)


def test_on_meta_it_has_the_shapes():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4))
    report = quantize_linears(model, group_size=32, scheme="nf4", double_quant=True)
    assert report.error is None and all(p.is_meta for p in model.parameters())


# ---- shifted groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shifted_layer_is_the_linear_layer_of_its_weight(dtype):
    linear = nn.Linear(192, 40)
    linear.weight.data += 0.05  # a mean that the codes alone would have to carry
    ours = ShiftedInt4Linear.from_linear(linear, 64)
    plain = Int4Linear.from_linear(linear, 64, "nf4", double_quant=True)
    errors = [(m.dequantize() - linear.weight).norm() for m in (ours, plain)]
    assert errors[0] < errors[1] and "nf4, group_size=64, scales nested, shifted" in repr(ours)
    before = bits(ours)
    ours = ours.to(dtype)
    assert bits(ours) == before and ours.shift.dtype == torch.bfloat16
    x = torch.randn(7, 192).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    out, truth = ours(x), nn.functional.linear(wide, ours.dequantize().double(), ours.bias.double())
    grad = torch.randn_like(truth)
    out.backward(grad.to(dtype))
    truth.backward(grad.to(dtype).double())
    eps = 8 * torch.finfo(dtype).eps
    for a, b in ((out, truth), (x.grad, wide.grad)):
        assert (a.double() - b).norm() <= eps * b.norm()


def test_what_a_shifted_layer_refuses():
    with pytest.raises(ValueError, match="group_size: expected a divisor of the 96 columns, got 64"):
        ShiftedInt4Linear.from_linear(nn.Linear(96, 8))
    with pytest.raises(ValueError, match="scheme: expected nf4"):
        ShiftedInt4Linear.from_linear(nn.Linear(64, 8), 64, "symmetric")
    with torch.device("meta"):
        ghost = ShiftedInt4Linear.from_linear(nn.Linear(64, 8))
    assert ghost.shift.is_meta and ghost.shift.shape == (8, 1)
