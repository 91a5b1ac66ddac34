# SPDX-License-Identifier: Apache-2.0
"""Adapters on experts, one pair of matrices for each: the same merged weights, by our reader and by peft's."""

import json
import re

import mixtures
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpost.hf
import tiny
from fastpost.hf import adapter, expert_lora, folder

NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
         "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
         "deepseek_v3": ("mlp", "gate_proj", "up_proj", "down_proj")}  # fmt: skip


def trained(kind, tmp_path, parameters=("experts.gate_up_proj", "experts.down_proj"), **more):
    """(model with an adapter whose B is not 0, folder of its base)."""
    base = tmp_path / "base"
    if not base.exists():
        mixtures.build(kind).save_pretrained(base)
        tiny.tokenizer().save_pretrained(base)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"] if kind != "deepseek_v3" else ["o_proj"],
        target_parameters=list(parameters), **more,
    )  # fmt: skip
    torch.manual_seed(2)
    model = peft.get_peft_model(mixtures.build(kind), config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.1)
    fastpost.hf.use_experts(model, quiet=True)
    return model, base


def merged(model):
    return {n: p.detach() for n, p in model.merge_and_unload().named_parameters()}


def expect_equal(ours, expected, base):
    assert list(ours) == list(expected)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
    plain = dict(mixtures.build(base).named_parameters())
    changed = [n for n in expected if not torch.equal(expected[n], plain[n])]
    assert any(n.endswith("gate_up_proj") for n in changed) and any(n.endswith("experts.down_proj") for n in changed)


@pytest.mark.parametrize("kind", NAMES)
def test_there_and_back(kind, tmp_path):
    model, base = trained(kind, tmp_path)
    before = {k: v.clone() for k, v in adapter.tensors_of(model).items()}
    out = expert_lora.save_unfused(model, base, tmp_path / "out")
    again = expert_lora.load_unfused(mixtures.build(kind), out)
    after = adapter.tensors_of(again)
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert again.peft_config["default"].r == 3 and expert_lora.is_unfused(out)
    expect_equal(merged(again), merged(model), kind)


@pytest.mark.parametrize("kind", NAMES)
def test_what_servers_look_for(kind, tmp_path):
    """Every expert has the product that peft merges, under the checkpoint's names."""
    model, base = trained(kind, tmp_path)
    out = expert_lora.save_unfused(model, base, tmp_path / "out", dtype=torch.float64)
    tensors, tree = load_file(out / "adapter_model.safetensors"), json.loads((out / "adapter_config.json").read_text())
    parent, gate, up, down = NAMES[kind]
    assert {gate, up, down} < set(tree["target_modules"]) and not tree["target_parameters"]
    assert tree["base_model_name_or_path"] == str(base) and (out / "tokenizer.json").is_file()
    plain, whole, checked = dict(mixtures.build(kind).named_parameters()), merged(model), 0
    for name in [n for n in plain if n.endswith("experts.gate_up_proj")]:
        layer = name.removesuffix(".experts.gate_up_proj")
        place = f"base_model.model.{layer.rpartition('.')[0]}.{parent}.experts"
        for e in range(len(plain[name])):
            delta = {}
            for leaf in (gate, up, down):
                a, b = (tensors.pop(f"{place}.{e}.{leaf}.lora_{side}.weight") for side in "AB")
                assert a.shape[0] == b.shape[1] == 3
                delta[leaf] = 2.0 * b @ a
            for parameter, change in (
                ("gate_up_proj", torch.cat([delta[gate], delta[up]])), ("down_proj", delta[down])
            ):  # fmt: skip
                full = f"{layer}.experts.{parameter}"
                torch.testing.assert_close(plain[full][e] + change.float(), whole[full][e], rtol=1e-5, atol=1e-6)
                checked += 1
    assert checked and all(re.search(r"\.(q|o)_proj\.lora_[AB]\.weight$", k) for k in tensors), "nothing else is left"


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_peft_reads_it(kind, tmp_path):
    """By its own conversion, which knows nothing of the shared A: twice the rank, the same weights."""
    model, base = trained(kind, tmp_path)
    out = expert_lora.save_unfused(model, base, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(mixtures.build(kind), out)
    expect_equal(merged(theirs), merged(model), kind)


def test_an_adapter_by_others(tmp_path):
    """Gate and up with an A each: twice the rank; an expert without matrices: 0. It can be written again, too."""
    model, base = trained("mixtral", tmp_path)
    out = expert_lora.save_unfused(model, base, tmp_path / "out")
    tensors = load_file(out / "adapter_model.safetensors")
    for key in tensors:
        if ".w3.lora_A" in key:
            tensors[key] = torch.randn_like(tensors[key])
    tensors = {k: v for k, v in tensors.items() if ".experts.2.w2." not in k}
    save_file(tensors, out / "adapter_model.safetensors")
    read = expert_lora.load_unfused(mixtures.build("mixtral"), out)
    twice = expert_lora.save_unfused(read, base, tmp_path / "again")
    ours, again = merged(read), merged(expert_lora.load_unfused(mixtures.build("mixtral"), twice))
    plain = dict(mixtures.build("mixtral").named_parameters())
    for layer in range(2):
        names = [f"model.layers.{layer}.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")]
        place = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts"
        for e in range(4):
            parts = [
                2.0 * tensors[f"{place}.{e}.{w}.lora_B.weight"] @ tensors[f"{place}.{e}.{w}.lora_A.weight"]
                for w in ("w1", "w3")
            ]
            for found in (ours, again):
                torch.testing.assert_close(found[names[0]][e], plain[names[0]][e] + torch.cat(parts))
        assert torch.equal(ours[names[1]][2], plain[names[1]][2])
        assert not torch.equal(ours[names[1]][1], plain[names[1]][1])


def test_a_trained_router_goes_along(tmp_path):
    """Mixtral's checkpoint calls the parent of experts and router block_sparse_moe, the model mlp."""
    model, base = trained("mixtral", tmp_path, modules_to_save=["gate"])
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and "gate.modules_to_save" in n:
                p.add_(0.5)
    out = expert_lora.save_unfused(model, base, tmp_path / "out")
    keys = set(load_file(out / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.block_sparse_moe.gate.weight" in keys and not any(
        ".mlp." in k for k in keys
    )
    ours, expected = merged(expert_lora.load_unfused(mixtures.build("mixtral"), out)), merged(model)
    assert all(torch.equal(ours[n], expected[n]) for n in expected)


def test_down_alone(tmp_path):
    model, base = trained("olmoe", tmp_path, ["experts.down_proj"])
    out = expert_lora.save_unfused(model, base, tmp_path / "out")
    again = expert_lora.load_unfused(mixtures.build("olmoe"), out)
    assert list(again.peft_config["default"].target_parameters) == ["experts.down_proj"]
    ours, expected = merged(again), merged(model)
    assert all(torch.equal(ours[n], expected[n]) for n in expected)


# ---- adapters of fastpost.hf.adapter ---------------------------------------------------------------------------------


def test_fresh_ones_on_experts(tmp_path):
    """Names of stacked matrices among the targets; the folder is peft's, and either form is read."""
    _, base = trained("mixtral", tmp_path)
    targets = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
    model = adapter.fresh(folder.load_model(base), rank=3, alpha=6, targets=targets)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 3 * 2
    plain = folder.load_model(base)(mixtures.IDS).logits
    assert torch.equal(model(mixtures.IDS).logits, plain), "a fresh adapter changes nothing"
    optim = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # B first, then A
        optim.zero_grad()
        model(mixtures.IDS, labels=mixtures.IDS).loss.backward()
        optim.step()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    fused = adapter.save(model, base, tmp_path / "fused")
    unfused = expert_lora.save_unfused(model, base, tmp_path / "unfused")
    expected = merged(model)
    for path in (fused, unfused):
        loaded = adapter.load(path)
        assert len(fastpost.hf.use_experts(loaded, quiet=True).fused) == 2
        ours = merged(loaded)
        assert all(torch.equal(ours[n], expected[n]) for n in expected)
    only = adapter.fresh(folder.load_model(base), rank=2, alpha=2, targets=["experts.down_proj"])
    assert {n.split(".lora_")[0].rpartition(".")[2] for n, p in only.named_parameters() if p.requires_grad} == {
        "experts"
    }


def test_fresh_ones_say_what_is_wrong(tmp_path):
    _, base = trained("mixtral", tmp_path)
    for targets, more, message in (
        (["experts.down_proj"], {"dropout": 0.1}, r"dropout: expected 0 on experts \(experts.down_proj\), got 0.1"),
        (["experts.w1"], {}, r"targets: expected names of linear layers, got 'experts.w1'.* It has: .*down_proj"),
    ):
        with pytest.raises(ValueError, match=r"\[lora\] " + message):
            adapter.fresh(folder.load_model(base), rank=2, alpha=2, targets=targets, **more)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_unfused_is_refused(tmp_path):
    model, base = trained("gpt_oss", tmp_path)
    with pytest.raises(ValueError, match=r"expected matrices of single experts in the base model's checkpoint, found"):
        expert_lora.save_unfused(model, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    dense = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"\[lora\] experts: expected an adapter on experts .* found none"):
        expert_lora.save_unfused(dense, base, tmp_path / "out")


def test_what_does_not_fit_is_refused(tmp_path):
    model, base = trained("olmoe", tmp_path)
    out = expert_lora.save_unfused(model, base, tmp_path / "out")
    with pytest.raises(ValueError, match="already exists"):
        expert_lora.save_unfused(model, base, out)
    with pytest.raises(ValueError, match=r"expected both matrices of experts 0 to 1"):
        expert_lora.load_unfused(mixtures.build("olmoe", num_experts=2), out)
    with pytest.raises(ValueError, match=r"expected A and B of all experts together to be .* got .* another model"):
        expert_lora.load_unfused(mixtures.build("olmoe", intermediate_size=40), out)
    with pytest.raises(ValueError, match=r"expected a layer of experts in the model, found none there"):
        expert_lora.load_unfused(tiny.model(), out)
    plain = adapter.save(peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["q_proj"])), base,
                         tmp_path / "plain")  # fmt: skip
    assert not expert_lora.is_unfused(plain)
    with pytest.raises(ValueError, match="expected matrices of single experts, found none"):
        expert_lora.load_unfused(tiny.model(), plain)
