# SPDX-License-Identifier: Apache-2.0
"""peft on layers in four bits: training through them, switched off, saved, merged into floats and into four bits."""

import copy
import functools
import json

import peft
import pytest
import torch
from torch import nn

import tiny
from fastpost.hf import adapter, folder, int4_lora
from fastpost.hf.int4_lora import BaseFormat, ConnectedInt4Linear, ConnectedLinear, Int4LoraLinear
from fastpost.nn import Int4Linear, ShiftedInt4Linear, quantize_linears

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tie": False}
BASES = {
    "nf4": BaseFormat("nf4", 64, True),
    "symmetric": BaseFormat("symmetric", 32),
    "asymmetric": BaseFormat("asymmetric", 64),
    "shifted": BaseFormat("nf4", 64, True, shift=True),
}
IDS = torch.arange(5, 25)[None]


@functools.cache
def quantized(base):
    model = tiny.model(**SIZES)
    BASES[base].apply(model)
    return model


def model_of(base="nf4", connections=False, random=True, **options):
    model = copy.deepcopy(quantized(base))
    made = adapter.fresh(model, rank=8, alpha=16, connections=connections, **options)
    if random:
        for name, p in made.named_parameters():
            if "lora_B" in name or "connection" in name:
                p.data.normal_(0, 0.1)
    return made.eval()


@pytest.mark.parametrize("connections", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_it_trains_through_the_codes(base, connections):
    """Gradients of A, B and the connections are those of the dequantised model; step 0 changes nothing."""
    model = model_of(base, connections, random=False)
    layers = [m for m in model.modules() if isinstance(m, Int4LoraLinear)]
    assert len(layers) == 14 and all(isinstance(m, ConnectedInt4Linear) == connections for m in layers)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    with adapter.off(model):
        off = model(IDS).logits
    assert torch.equal(model(IDS).logits, off)
    model = model_of(base, connections)
    exact = int4_lora.dequantized(copy.deepcopy(model))
    for m in (model, exact):
        m(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(model(IDS).logits, exact(IDS).logits, rtol=1e-4, atol=1e-4)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 14 * (4 if connections else 2)
    for name, p in exact.named_parameters():
        if p.requires_grad:
            assert (trained[name].grad - p.grad).norm() < 1e-3 * p.grad.norm() + 1e-7, name
    with adapter.off(model):
        torch.testing.assert_close(model(IDS).logits, off, rtol=0, atol=0)


@pytest.mark.parametrize("connections", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_saved_and_continued(base, connections, tmp_path):
    model, path = model_of(base, connections), tiny.folder(tmp_path / "model", **SIZES)
    out = adapter.save(model, path, tmp_path / "adapter")
    assert json.loads((out / "fastpost.json").read_text())["connections"] == connections
    again = adapter.load(out)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert int4_lora.base_format(again) == BASES[base]
    narrow = adapter.load(out, torch.bfloat16)
    for a, b in zip(*(([m.codes for m in x.modules() if isinstance(m, Int4Linear)]) for x in (again, narrow))):
        assert a.dtype == torch.uint8 and b.dtype == torch.uint8
    moved = adapter.moved(model, tiny.model(**SIZES)).eval()
    assert torch.equal(moved(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("connections", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_merged_into_floats_it_computes_the_same(base, connections):
    model = model_of(base, connections)
    before = model(IDS).logits
    merged = adapter.merged(model)
    assert not any(isinstance(m, Int4Linear) or hasattr(m, "lora_A") for m in merged.modules())
    torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_merged_into_four_bits_and_back(base):
    model = model_of(base)
    layer = next(m for m in model.modules() if isinstance(m, Int4LoraLinear))
    codes, before, wanted = layer.base_layer.codes.clone(), model(IDS).logits, layer.base_layer.dequantize()
    wanted = wanted + layer.get_delta_weight("default")
    model.merge_adapter(safe_merge=True)
    assert type(layer.base_layer) is (ShiftedInt4Linear if base == "shifted" else Int4Linear)
    assert 0.01 < layer.rounding < 0.2
    error = (layer.base_layer.dequantize() - wanted).norm() / wanted.norm()
    assert float(error) == pytest.approx(layer.rounding, rel=1e-4)
    assert not torch.equal(layer.base_layer.codes, codes)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.codes, codes) and torch.equal(model(IDS).logits, before)
    whole = model.merge_and_unload()
    assert sum(isinstance(m, Int4Linear) for m in whole.modules()) == 14
    off = (whole(IDS).logits - before).norm() / before.norm()
    assert 1e-4 < off < 0.8


def test_act_order_survives_a_merge():
    linear = Int4Linear.from_linear(nn.Linear(64, 16), 32)
    ordered = Int4Linear.from_int4(int4_lora._ordered(linear.packed, torch.randperm(64)))
    weight = ordered.dequantize()
    made, error = int4_lora.requantized_layer(weight, ordered)
    assert torch.equal(made.order, ordered.order) and error < 0.1
    assert (made.dequantize() - weight).norm() < 0.1 * weight.norm()


@pytest.mark.parametrize("connections", [False, True])
def test_the_formats_come_back(connections):
    """Merged into floats and then into the formats that the layers had."""
    model = model_of("asymmetric", connections)
    like, before = int4_lora.formats(model), model(IDS).logits
    merged = adapter.merged(model)
    error = int4_lora.requantized(merged, like)
    assert len(like) == 14 and 0.01 < error < 0.2
    assert all(m.scheme == "asymmetric" for m in merged.modules() if isinstance(m, Int4Linear))
    assert (merged(IDS).logits - before).norm() < 0.5 * before.norm()


def test_peft_alone_trains_it_too():
    """Without register: peft takes it for the linear layer that it is."""
    model = tiny.model(**SIZES)
    quantize_linears(model, group_size=32)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    made(IDS, labels=IDS).loss.backward()
    assert sum(p.grad is not None and p.grad.norm() > 0 for n, p in made.named_parameters() if "lora_B" in n) == 14


def test_connections_by_their_formula():
    """h = A x + b1 mean-pool(x), y = W x + (B h + b2 repeat(h)) alpha / r, spelt out with sums."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    int4_lora.register(config, connections=True)
    linear = nn.Linear(12, 8)
    model = peft.get_peft_model(nn.Sequential(linear), config)
    layer = next(m for m in model.modules() if isinstance(m, ConnectedLinear))
    layer.lora_connection_in["default"].data.fill_(0.3)
    layer.lora_connection_out["default"].data.fill_(-0.7)
    x = torch.randn(5, 12)
    before = linear(x)
    h = x @ layer.lora_A["default"].weight.t()
    h = h + 0.3 * torch.stack([x[:, 3 * i : 3 * i + 3].sum(1) / 3 for i in range(4)], 1)
    y = h @ layer.lora_B["default"].weight.t() - 0.7 * torch.stack([h[:, i // 2] for i in range(8)], 1)
    torch.testing.assert_close(model(x), linear(x) + 2 * y)
    assert torch.equal(layer.base_layer(x), linear(x))
    torch.testing.assert_close(model.merge_and_unload()(x), linear(x))  # now merged, in place
    torch.testing.assert_close(linear(x), before + 2 * y)


REFUSED = {
    "dora": (lambda: peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear"), False, "dora"),
    "rank": (lambda: peft.LoraConfig(r=5, target_modules="all-linear"), True, "a rank that divides inputs of 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused(name):
    make, connections, message = REFUSED[name]
    model, config = tiny.model(**SIZES), make()
    quantize_linears(model, group_size=32)
    int4_lora.register(config, connections=connections)
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, config)


def test_a_spoilt_file_is_named(tmp_path):
    path = tiny.folder(tmp_path / "model", **SIZES)
    out = adapter.save(model_of(), path, tmp_path / "adapter")
    (out / "fastpost.json").write_text('{"base": {"bits": 3}}')
    with pytest.raises(ValueError, match=r"fastpost\.json: expected what fastpost writes beside an adapter"):
        adapter.load(out)
    plain_adapter = adapter.fresh(folder.load_model(path), rank=4, alpha=8)
    assert not (adapter.save(plain_adapter, path, tmp_path / "plain") / "fastpost.json").exists()
