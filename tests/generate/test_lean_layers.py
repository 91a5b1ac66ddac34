# SPDX-License-Identifier: Apache-2.0
"""The engine's lean layers: transformers' bits, and only where they are known to hold."""

import pytest
import torch

import tiny
from fastpost.generate import Engine, Request, Sampling, takeover
from fastpost.generate.lean_layers import restore_layers, use_lean_layers
from prompts import unequal

KINDS = ["llama", "mistral", "qwen2", "qwen3"]


def spoken(model) -> list:
    """Every row of logits of some requests, sampled."""
    seen = []
    s = Sampling(
        max_new_tokens=10, temperature=1.0, ignore_eos=True, logits_callback=lambda ids, row: seen.append(row.clone())
    )
    with Engine(model, None, page=4, prefill_tokens=16) as engine:
        engine.generate([Request(p, s) for p in unequal(6)])
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_they_have_the_bits_of_transformers(kind, dtype, monkeypatch, one_thread):
    model = tiny.model(kind, **({"sliding_window": 5} if kind == "mistral" else {})).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.normal_(1, 0.3)
    lean = spoken(model)
    monkeypatch.setattr(takeover, "use_lean_layers", lambda model: [])
    theirs = spoken(model)
    assert len(lean) == 60
    assert all(torch.equal(a, b) for a, b in zip(lean, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_engines_cache_they_do_what_they_did(kind):
    model = tiny.model(kind)
    ids = torch.arange(7, 40)[None]
    want = model(ids).logits
    layers = use_lean_layers(model)
    assert len(layers) == 2 and type(layers[0]).__name__.startswith("Lean")
    assert torch.equal(model(ids).logits, want)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=True).logits, want)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    restore_layers(layers)
    assert type(layers[0]).__module__.startswith("transformers.")


@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "jetmoe"])
def test_layers_of_another_form_are_left(kind):
    assert use_lean_layers(tiny.model(kind)) == []


def test_layers_with_hooks_or_other_parts_are_left():
    model = tiny.model(layers=5)
    one, two, three, four, five = model.model.layers
    one.self_attn.register_forward_pre_hook(lambda module, args: None)
    two.mlp.forward = two.mlp.forward
    three.input_layernorm = torch.nn.LayerNorm(32)
    four.mlp.up_proj.register_forward_hook(lambda module, args, out: None)
    assert use_lean_layers(model) == [five]


def test_adapters_on_the_linear_layers_count():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    ids = torch.tensor([unequal(1)[0]])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    with Engine(model) as engine:
        ((c,),) = engine.generate([Request(ids[0].tolist(), Sampling(max_new_tokens=8))])
    assert c.token_ids == out[0, ids.shape[1] :].tolist()
