# SPDX-License-Identifier: Apache-2.0
"""The experts of transformers' models in four bits: the model is the one with the dequantised weights."""

import copy

import pytest
import torch
from mixtures import CONFIGS, IDS, build, step

from compare import overall
from fastpost.hf import dequantize_experts, load_int4, quantize_experts, save_int4
from fastpost.hf.int4_experts import stacks
from fastpost.hf.int4_lora import BaseFormat
from fastpost.nn import Int4Experts

KINDS = [kind for kind in CONFIGS if kind != "gpt_oss"]  # whose matrices lie transposed
FORMATS = {
    "symmetric": {"group_size": 32},
    "asymmetric": {"group_size": 32, "scheme": "asymmetric"},
    "nf4": {"group_size": 32, "scheme": "nf4", "double_quant": True},
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Sums in one order."""


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_dequantised_weights(kind, options):
    model = build(kind)
    before = {n: p for n, p in model.named_parameters() if p.ndim == 3}
    done = quantize_experts(model, **options)
    assert len(done.names) == len(before) == len(stacks(model)) >= 2
    assert all(any(n in b for b in before) for n in done.names)
    assert done.bytes_before == sum(p.nbytes for p in before.values())
    assert done.bytes_after == sum(p.nbytes for s in stacks(model).values() for p in s.parameters())
    if kind == "mixtral":  # others have rows of fewer columns than a block, which is 128
        assert done.bytes_after < done.bytes_before / 1.8
    assert 0.02 < done.error < 0.2
    plain = dequantize_experts(copy.deepcopy(model), torch.float32)
    assert not stacks(plain) and {n: p.shape for n, p in plain.named_parameters() if p.ndim == 3} == {
        n: p.shape for n, p in before.items()
    }
    ours, truth = step(model), step(plain)
    assert set(ours) == set(truth) and any("embed" in n for n in ours)
    for name in ours:
        assert overall(ours[name], truth[name]) < 2e-5, name


@pytest.mark.parametrize("kind", ["mixtral", "jetmoe"])
def test_generation_and_bfloat16(kind):
    model = build(kind, torch.bfloat16)
    quantize_experts(model, group_size=32)
    out = model.generate(IDS[:, :8], max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 12)
    assert torch.equal(out, model.generate(IDS[:, :8], max_new_tokens=4, do_sample=False, use_cache=False))


@pytest.mark.parametrize("kind", ["mixtral", "jetmoe"])
def test_the_state_dict_goes_round(kind):
    model = build(kind)
    quantize_experts(model, group_size=32, scheme="nf4")
    with torch.device("meta"):
        ghost = type(model)(copy.deepcopy(model.config))
    assert quantize_experts(ghost, group_size=32, scheme="nf4").error is None
    fresh = build(kind)
    quantize_experts(fresh, group_size=32, scheme="nf4")
    for p in fresh.parameters():
        p.data.zero_()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_in_training_nothing_is_dequantised(monkeypatch):
    model = build("mixtral")
    quantize_experts(model, group_size=32)
    monkeypatch.setattr(Int4Experts, "dequantize", None)
    monkeypatch.setattr("fastpost.int4.Int4Weight.dequantize", None)
    step(model)


def test_routers_and_others_are_left():
    model = build("mixtral")
    before = {n: p.clone() for n, p in model.named_parameters() if "experts" not in n}
    quantize_experts(model)
    after = dict(model.named_parameters())
    assert before and all(torch.equal(p, after[n]) for n, p in before.items())
    assert quantize_experts(model) is None  # nothing is left to do
    assert quantize_experts(build("gpt_oss")) is None


def test_bad_input_is_named():
    model = build("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts.down_proj: .*row 64 holds NaN"):
        quantize_experts(model)


def test_a_folder_of_four_bit_experts_is_refused(tmp_path):
    model = build("mixtral")
    BaseFormat("nf4", 32).apply(model)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.gate_up_proj: expected experts in floats"):
        save_int4(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    dequantize_experts(model)
    save_int4(model, tmp_path / "out")
    assert overall(load_int4(tmp_path / "out", torch.float32)(IDS).logits, model.float()(IDS).logits) < 1e-5
