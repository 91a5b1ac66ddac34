# SPDX-License-Identifier: Apache-2.0
"""Mixtures whose experts are in four bits: fastpost.nn.MoE and MoA after quantize_, and Int4Experts itself."""

import copy

import pytest
import torch
from torch import nn

import fastpost
from compare import overall
from fastpost import _core
from fastpost.nn import Int4Experts, MoA, MoE
from fastpost.nn.int4_packed import stands_for

FORMATS = {
    "symmetric": {"group_size": 32},
    "asymmetric": {"group_size": 64, "scheme": "asymmetric", "scales_dtype": torch.float32},
    "nf4": {"group_size": 32, "scheme": "nf4", "double_quant": True},
}


def layer(kind, device="cpu", dtype=None, **options):
    torch.manual_seed(0)
    return kind(64, 96, 5, 2, bias=True, device=device, dtype=dtype, **options)


def call(module, x):
    out = module(x, lambda q: q.tanh()) if isinstance(module, MoA) else module(x)
    return out[0]


def gradients(module, x):
    x = x.clone().requires_grad_()
    out = call(module, x)
    out.square().sum().backward()
    return [out.detach(), x.grad, module.router.weight.grad, module.bias.grad]


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", [MoE, MoA], ids=["MoE", "MoA"])
def test_computes_what_the_dequantised_layer_does(kind, options, device):
    made = layer(kind, device)
    before = [getattr(made, name).detach().clone() for name in kind.expert_names]
    report = made.quantize_(**options)
    held = [getattr(made, name) for name in kind.expert_names]
    assert all(isinstance(h, Int4Experts) and not any(p.requires_grad for p in h.parameters()) for h in held)
    assert [h.shape for h in held] == [w.shape for w in before]
    assert report.bytes_before == sum(w.nbytes for w in before)
    assert report.bytes_after == sum(p.nbytes for h in held for p in h.parameters()) < report.bytes_before / 4
    wrong = sum(float((h.dequantize() - w).norm()) ** 2 for h, w in zip(held, before, strict=True))
    assert report.error == pytest.approx((wrong / sum(float(w.norm()) ** 2 for w in before)) ** 0.5, rel=1e-4)
    assert 0.02 < report.error < 0.2 and f"error of the weights {report.error:.4f}" in report.line()
    plain = copy.deepcopy(made)
    plain.dequantize_(torch.float32)
    assert all(isinstance(getattr(plain, name), nn.Parameter) for name in kind.expert_names)
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1)).to(device)
    for a, b in zip(gradients(made, x), gradients(plain, x), strict=True):
        assert b.abs().max() > 0 and overall(a, b) < 2e-6


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", [MoE, MoA], ids=["MoE", "MoA"])
def test_state_dict_round_trip(kind, options, device):
    made = layer(kind, device)
    made.quantize_(**options)
    state = made.state_dict()
    assert f"{kind.expert_names[0]}.codes" in state and kind.expert_names[0] not in state
    ghost = layer(kind, "meta")
    report = ghost.quantize_(**options)
    assert report.error is None and "error" not in report.line()
    fresh = ghost.to_empty(device=device)
    fresh.load_state_dict(state)
    x = torch.randn(6, 64, device=device)[None]
    assert torch.equal(call(fresh, x), call(made, x))
    other = layer(kind, device)
    other.quantize_(group_size=32, scales_dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"another four-bit format|Missing|Unexpected"):
        other.load_state_dict(state)


def test_moving_to_another_dtype_keeps_the_bytes(device):
    made = layer(MoE, device)
    made.quantize_(scheme="nf4", group_size=32)
    before = {k: v.clone() for k, v in made.up.state_dict().items()}
    made.to(torch.bfloat16)
    assert made.bias.dtype == torch.bfloat16
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in made.up.state_dict().items())
    assert call(made, torch.randn(4, 64, device=device, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_and_compiling(device):
    made = layer(MoE, device)
    made.quantize_(group_size=32)
    x = torch.randn(9, 64, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = call(made, x)
    assert out.dtype == torch.bfloat16 and overall(out, call(made, x)) < 0.02
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert torch.equal(call(compiled, x), call(made, x))


def test_reset_leaves_four_bits_alone(device):
    made = layer(MoE, device)
    made.quantize_(group_size=32)
    codes, router = made.up.codes.clone(), made.router.weight.detach().clone()
    made.reset_parameters()
    assert torch.equal(made.up.codes, codes) and not torch.equal(made.router.weight, router)


def test_training_keeps_no_copy_of_weights(device):
    """What autograd holds is x, what goes into the activation, the routing, and the very bytes of the weights."""
    made = layer(MoE, device, torch.bfloat16)
    made.quantize_(group_size=32)
    own = {p.data_ptr() for p in made.parameters()}
    x = torch.randn(40, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t) is None or t, lambda t: t):
        call(made, x)
    most = max(t.nbytes for address, t in kept.items() if address not in own)
    assert most == 80 * 192 * 2  # rows of the first product


def test_counted_as_what_they_stand_for():
    made = layer(MoE)
    count = made.up.numel()
    made.quantize_(group_size=32)
    assert stands_for(made)[id(made.up.codes)] == count


def test_from_experts_is_int4_quantize(device):
    weight = torch.randn(3, 40, 70, device=device)
    made = Int4Experts.from_experts(weight, 32, "asymmetric")
    plain = fastpost.int4_quantize(weight.flatten(0, 1), group_size=32, scheme="asymmetric")
    assert torch.equal(made.codes, plain.codes) and torch.equal(made.scales, plain.scales)
    assert torch.equal(made.dequantize()[1], plain.dequantize()[40:80])
    assert repr(made) == "Int4Experts(experts=3, rows=40, columns=70, asymmetric, group_size=32, scales bfloat16)"
    offset = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=device)
    x = torch.randn(5, 70, device=device)
    assert torch.equal(made(x, offset), fastpost.grouped_gemm(x, plain, offset))


@pytest.mark.parametrize("double_quant", [False, True])
def test_quantising_in_pieces_changes_no_bit(double_quant, monkeypatch):
    weight = torch.randn(37, 70)
    options = {"group_size": 32, "scheme": "nf4", "double_quant": double_quant}
    whole = fastpost.int4_quantize(weight, **options)
    monkeypatch.setattr("fastpost.int4.QUANTIZE_AT_A_TIME", 5 * 70)
    pieces = fastpost.int4_quantize(weight, **options)
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.scales, pieces.scales)


def nan_layer():
    made = layer(MoE)
    made.down.data[2, 3, 4] = float("nan")
    return made


def twice():
    made = layer(MoA)
    made.quantize_()
    return made


@pytest.mark.parametrize(("act", "message"), [
    (lambda: layer(MoE).quantize_(scheme="fp4"), r"\[MoE\] up: .*scheme: expected one of .* got 'fp4'"),
    (lambda: layer(MoE).quantize_(group_size=48), r"group_size: expected 32, 64, 128 or -1"),
    (lambda: nan_layer().quantize_(), r"\[MoE\] down: .*row 131 holds NaN"),
    (lambda: twice().quantize_(), r"\[MoA\] query: expected a parameter, got Int4Experts"),
    (lambda: Int4Experts(0, 4, 4), "expected at least one expert"),
    (lambda: Int4Experts(2, 4, 8, double_quant=True), r"\[Int4Experts\] double_quant: expected the scheme nf4"),
    (lambda: Int4Experts.from_experts(torch.zeros(4, 4)), r"weight: expected floats \[E, N, K\], got .* \[4, 4\]"),
    (lambda: Int4Experts.from_int4(fastpost.int4_quantize(torch.ones(7, 32)), 2), "as many rows for each of 2 experts"),
])  # fmt: skip
def test_bad_input_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_the_core_is_asked_for_one_expert_at_a_time(monkeypatch):
    """No product with all experts' rows, and none for experts that nobody chose."""
    made = layer(MoE)
    made.quantize_(group_size=32)
    rows, product = [], _core.int4_gemm
    monkeypatch.setattr(_core, "int4_gemm", lambda x, codes, *args: rows.append(len(codes)) or product(x, codes, *args))
    with torch.no_grad():
        call(made, torch.randn(1, 64))
    assert rows == [192, 192, 64, 64]
