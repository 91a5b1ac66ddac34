# SPDX-License-Identifier: Apache-2.0
"""LoRA on experts in four bits: outputs and gradients of peft's adapters on the dequantised parameters, and the same
files."""

import json

import mixtures
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from compare import overall
from fastpost.hf import adapter, dequantize_experts, expert_lora, quantize_experts, use_experts
from fastpost.hf.int4_expert_lora import Int4ExpertsLora
from fastpost.hf.int4_experts import routers, stacks
from fastpost.hf.int4_lora import BaseFormat
from fastpost.nn import Int4Linear

KINDS = {
    "mixtral": ["experts.gate_up_proj", "experts.down_proj"],
    "olmoe": ["experts.down_proj"],
    "jetmoe": ["input_linear.weight", "output_linear.weight"],
}
FORMAT = {"group_size": 32, "scheme": "nf4"}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Sums in one order."""


def config(kind, **more):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["kv_proj" if kind == "jetmoe" else "q_proj"],
                              "target_parameters": KINDS[kind]} | more)  # fmt: skip


def packed(kind):
    model = mixtures.build(kind)
    quantize_experts(model, **FORMAT)
    return model


def floats(kind):
    """The model with the dequantised weights."""
    model = dequantize_experts(packed(kind), torch.float32)
    use_experts(model, quiet=True)
    return model


def filled(model):
    """Numbers in A and B that depend on the name that a file has for them."""
    tensors = {}
    for i, (key, t) in enumerate(sorted(adapter.tensors_of(model).items())):
        tensors[key] = torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) * 0.1
    return adapter.fill(model, tensors)


def pair(kind, **more):
    return [filled(adapter.put_on(build(kind), config(kind, **more))) for build in (packed, floats)]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_adapters_on_parameters(kind):
    ours, theirs = pair(kind)
    count = sum(isinstance(m, Int4ExpertsLora) for m in ours.modules())
    assert count == sum("ParamWrapper" in type(m).__name__ for m in theirs.modules()) >= 2
    found = []
    for model in (ours, theirs):
        use_experts(model, quiet=True)
        out = model(mixtures.IDS, labels=mixtures.IDS)
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all("lora_" in n for n in grads)
        found.append((out.logits.detach(), adapter.tensors_of(model), grads))
    assert list(found[0][1]) and set(found[0][1]) == set(found[1][1])
    assert overall(found[0][0], found[1][0]) < 1e-5
    by_name = [{t.data_ptr(): k for k, t in tensors.items()} for _, tensors, _ in found]
    models = [dict(m.named_parameters()) for m in (ours, theirs)]
    grads = [{names[ps[n].data_ptr()]: g for n, g in gs.items()}
             for names, ps, (_, _, gs) in zip(by_name, models, found, strict=True)]  # fmt: skip
    assert set(grads[0]) == set(grads[1]) == set(found[0][1])
    for name, grad in grads[1].items():
        assert grad.abs().max() > 0 and overall(grads[0][name], grad) < 2e-5, name
    with adapter.off(ours):
        assert overall(ours(mixtures.IDS).logits, floats(kind)(mixtures.IDS).logits) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_merged_dense_weights_give_the_same_output(kind):
    ours, theirs = pair(kind, use_rslora=True)
    before = ours(mixtures.IDS).logits
    whole = adapter.merged(ours)
    assert not stacks(whole) and not any("lora" in n for n, _ in whole.named_parameters())
    use_experts(whole, quiet=True)
    assert overall(whole(mixtures.IDS).logits, before) < 1e-5
    expected = dict(adapter.merged(theirs).named_parameters())
    assert list(expected) == [n for n, _ in whole.named_parameters()]
    for name, p in whole.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-6)


def base_of(kind, tmp_path):
    mixtures.build(kind).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", KINDS)
def test_folders_are_those_of_adapters_on_parameters(kind, tmp_path):
    """Byte for byte but for what says how the base is quantised; read upon four bits and upon floats."""
    (ours, theirs), base = pair(kind), base_of(kind, tmp_path)
    saved = [adapter.save(m, base, tmp_path / name) for m, name in ((ours, "ours"), (theirs, "theirs"))]
    tensors = [load_file(path / "adapter_model.safetensors") for path in saved]
    assert set(tensors[0]) == set(tensors[1]) and all(torch.equal(t, tensors[1][k]) for k, t in tensors[0].items())
    trees = [json.loads((path / "adapter_config.json").read_text()) for path in saved]
    for tree in trees:
        assert sorted(tree.pop("target_parameters")) == sorted(KINDS[kind])
    assert trees[0] == trees[1]
    peft.PeftModel.from_pretrained(floats(kind), saved[0])  # as anyone would
    for build in (packed, floats):
        again = adapter.continued(build(kind), saved[0])
        use_experts(again, quiet=True)
        assert overall(again(mixtures.IDS).logits, ours(mixtures.IDS).logits) < 1e-5
    moved = adapter.moved(ours, floats(kind), quantize=False)
    use_experts(moved, quiet=True)
    assert overall(moved(mixtures.IDS).logits, ours(mixtures.IDS).logits) < 1e-5


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_unfused(kind, tmp_path):
    """A pair for each expert, as servers read; gate and up share A, and B is cut in halves."""
    (ours, theirs), base = pair(kind), base_of(kind, tmp_path)
    out, same = (expert_lora.save_unfused(m, base, tmp_path / n) for m, n in ((ours, "a"), (theirs, "b")))
    tensors, expected = (load_file(path / "adapter_model.safetensors") for path in (out, same))
    assert set(tensors) == set(expected) and all(torch.equal(t, expected[k]) for k, t in tensors.items())
    assert (out / "adapter_config.json").read_text() == (same / "adapter_config.json").read_text()
    assert sum(".experts.3." in k for k in tensors) == 2 * 2 * (3 if kind == "mixtral" else 1)
    again = adapter.continued(packed(kind), out)
    assert any(isinstance(m, Int4ExpertsLora) for m in again.modules())
    after, before = adapter.tensors_of(again), adapter.tensors_of(ours)
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(again(mixtures.IDS).logits, ours(mixtures.IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_and_trains(kind):
    torch.manual_seed(0)
    base = packed(kind)
    before = base(mixtures.IDS).logits.detach()
    model = adapter.fresh(base, rank=4, alpha=8, targets=[t.removesuffix(".weight") for t in KINDS[kind]])
    assert torch.equal(model(mixtures.IDS).logits, before)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n for n in trained)
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=0.01), []
    for _ in range(4):
        loss = model(mixtures.IDS, labels=mixtures.IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("kind", ["mixtral", "jetmoe"])
def test_bfloat16_and_autocast(kind):
    ours, _ = pair(kind)
    exact = ours(mixtures.IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert overall(ours(mixtures.IDS).logits, exact) < 0.3  # some tokens choose other experts
    adapter.narrow(ours, torch.bfloat16)
    out = ours(mixtures.IDS).logits
    assert out.dtype == torch.bfloat16 and overall(out, exact) < 0.3


@pytest.mark.parametrize("kind", ["mixtral", "jetmoe"])
def test_a_recipes_quantize_takes_experts_and_leaves_routers(kind):
    model = mixtures.build(kind)
    done = BaseFormat("nf4", 32, double_quant=True).apply(model)
    assert len(done.experts.names) == len(stacks(model)) >= 4 and "stacks of experts" in done.line()
    assert not any(isinstance(m, Int4Linear) for n, m in model.named_modules() if "router" in n or n.endswith("gate"))
    assert any(isinstance(m, Int4Linear) for m in model.modules())
    assert bool(routers(model)) == (kind == "jetmoe")  # Mixtral's is no linear layer
    assert type(model.lm_head) is torch.nn.Linear
    assert torch.isfinite(model(mixtures.IDS).logits).all()
    assert BaseFormat("nf4", 32).apply(tiny.model()).experts is None


@pytest.mark.parametrize(("more", "message"), [
    ({"lora_dropout": 0.1}, "experts in four bits: expected .* no dropout"),
    ({"use_dora": True}, "variant"),
])  # fmt: skip
def test_what_is_not_computed_is_named(more, message):
    with pytest.raises(ValueError, match=message):
        adapter.put_on(packed("mixtral"), config("mixtral", **more))


def test_merging_in_place_is_refused():
    ours, _ = pair("mixtral")
    with pytest.raises(ValueError, match=r"\[lora\] experts in four bits hold no sum with an adapter"):
        ours.merge_adapter()


def test_an_adapter_for_another_model_is_refused(tmp_path):
    (ours, _), base = pair("mixtral"), base_of("mixtral", tmp_path)
    out = adapter.save(ours, base, tmp_path / "out")
    tensors = load_file(out / "adapter_model.safetensors")
    key = next(k for k in tensors if "experts.lora_A" in k)
    save_file(tensors | {key: tensors[key][:-1].clone()}, out / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has in another shape .*experts\.lora_A"):
        adapter.continued(packed("mixtral"), out)
