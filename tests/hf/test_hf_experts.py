# SPDX-License-Identifier: Apache-2.0
"""transformers' mixtures of experts computed by fastpost: the same numbers, gradients, tokens and files."""

import mixtures
import peft
import pytest
import torch
import transformers as tf
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import fastpost.hf
import tiny
from fastpost.hf import experts, folder
from fastpost.nn import quantize_linears

KINDS = [k for k in mixtures.CONFIGS if k != "jetmoe"]
FUSED = {"mixtral": 2, "olmoe": 2, "qwen3_moe": 2, "deepseek_v3": 1, "glm4_moe": 1}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    return one_thread


def taken(kind, dtype=torch.float32, **options):
    model = mixtures.build(kind, dtype, **options)
    fastpost.hf.use_experts(model, quiet=True)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_as_exact_as_eager(kind):
    """Logits, router logits, aux loss and the gradient of every parameter against float64."""
    truth = mixtures.step(mixtures.build(kind, torch.float64))
    assert len(truth) == 2 + (3 if kind in mixtures.AUX else 0) + len(list(mixtures.build(kind).parameters()))
    eager, ours = mixtures.step(mixtures.build(kind)), mixtures.step(taken(kind))
    mixtures.expect_as_exact(ours, eager, truth, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_bfloat16(kind):
    truth = mixtures.step(mixtures.build(kind, torch.float64), mixtures.SHORT)
    eager = mixtures.step(mixtures.build(kind, torch.bfloat16), mixtures.SHORT)
    ours = mixtures.step(taken(kind, torch.bfloat16), mixtures.SHORT)
    assert ours["logits"].dtype == torch.bfloat16
    mixtures.expect_as_exact(ours, eager, truth, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache(kind):
    prompt = mixtures.IDS[:, :6]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    eager = mixtures.build(kind).generate(prompt, **options)
    assert torch.equal(taken(kind).generate(prompt, **options), eager)
    assert len(set(eager[0, 6:].tolist())) > 2, "a model that repeats one token shows nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_again(kind):
    model = taken(kind)
    first, again = ({n: t.clone() for n, t in mixtures.step(model).items()} for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


# ---- switching on and off --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_it_took_over(kind, capsys):
    model = mixtures.build(kind)
    found = fastpost.hf.use_experts(model)
    said = capsys.readouterr().out
    assert said == found.line() + "\n" and found and not found.left
    assert len(found.fused) == FUSED.get(kind, 0) and len(found.general) == (2 if kind == "gpt_oss" else 0)
    if kind == "mixtral":
        assert said == "experts by fastpost: 2 MixtralExperts\n"
        assert list(found.fused) == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    if kind == "gpt_oss":
        assert said == "experts by fastpost: 2 GptOssExperts around the model's own gate\n"
    assert model.get_experts_implementation()[""] == experts.NAME
    assert fastpost.hf.use_experts(model, quiet=True) == found
    assert capsys.readouterr().out == ""


def test_ours_is_what_runs(monkeypatch):
    calls = []

    def counted(module, *args):
        calls.append(type(module).__name__)
        return experts.experts_forward(module, *args)

    model = mixtures.build("mixtral")
    model(mixtures.IDS)
    fastpost.hf.use_experts(model, quiet=True)
    monkeypatch.setitem(type(ALL_EXPERTS_FUNCTIONS)._global_mapping, experts.NAME, counted)
    model(mixtures.IDS)
    assert calls == ["MixtralExperts"] * 2
    model.set_experts_implementation("eager")
    model(mixtures.IDS)
    assert calls == ["MixtralExperts"] * 2


def test_a_dense_model_has_none(capsys):
    found = fastpost.hf.use_experts(tiny.model())
    assert not found and "none, the model has no experts" in capsys.readouterr().out


def test_what_is_no_float_is_left():
    model = mixtures.build("mixtral")
    mixed = model.model.layers[1].mlp.experts
    mixed.gate_up_proj = torch.nn.Parameter(mixed.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    found = fastpost.hf.use_experts(model, quiet=True)
    assert found.left == {"model.layers.1.mlp.experts": "MixtralExperts (float8_e4m3fn)"} and len(found.fused) == 1
    assert found.line().endswith("left to transformers: 1 MixtralExperts (float8_e4m3fn)")


def test_inside_a_model_of_several():
    """The config of the text model is told, where the experts are in that."""
    text = dict(mixtures.SHARED, num_experts=4, moe_intermediate_size=16, head_dim=8, rope_scaling=None)
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
              "deepstack_visual_indexes": []}  # fmt: skip
    config = tf.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = tf.Qwen3VLMoeForConditionalGeneration(config).eval()
    model.set_experts_implementation("eager")
    eager = model(mixtures.IDS).logits
    assert len(fastpost.hf.use_experts(model, quiet=True).fused) == 2
    assert model.config.text_config._experts_implementation == experts.NAME
    torch.testing.assert_close(model(mixtures.IDS).logits, eager, rtol=1e-4, atol=1e-5)


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_folders_are_the_same(kind, tmp_path):
    mixtures.build(kind).save_pretrained(tmp_path / "eager")
    model = taken(kind)
    model.save_pretrained(tmp_path / "ours")
    before, after = mixtures.tensors(tmp_path / "eager"), mixtures.tensors(tmp_path / "ours")
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert (tmp_path / "eager/config.json").read_text() == (tmp_path / "ours/config.json").read_text()
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", experts_implementation=experts.NAME).eval()
    assert again.get_experts_implementation()[""] == experts.NAME
    assert torch.equal(again(mixtures.IDS).logits, model(mixtures.IDS).logits)


def test_fastposts_loader_uses_it(tmp_path):
    path = tiny.folder(tmp_path / "model", "mixtral")
    model = folder.load_model(path)
    assert model.get_experts_implementation()[""] == experts.NAME
    folder.save_folder(model, path, tmp_path / "out")
    before, after = mixtures.tensors(path), mixtures.tensors(tmp_path / "out")
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)


def test_a_four_bit_folder_too(tmp_path):
    """Its linear layers are in four bits, its experts are not."""
    model = folder.load_model(tiny.folder(tmp_path / "model", "mixtral"))
    assert len(quantize_linears(model, group_size=32).names) == 8
    again = folder.load_model(fastpost.hf.save_int4(model, tmp_path / "int4"))
    assert again.get_experts_implementation()[""] == experts.NAME
    torch.testing.assert_close(again(mixtures.IDS).logits, model(mixtures.IDS).logits, rtol=1e-4, atol=1e-4)


# ---- under wrappers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_gradient_checkpointing(kind):
    model = taken(kind).train()
    first = {n: t.clone() for n, t in mixtures.step(model).items()}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = mixtures.step(model)
    assert all(torch.equal(again[name], first[name]) for name in first)
    hidden = torch.randn(30, 32, requires_grad=True)
    mixture = model.model.layers[0].mlp.experts
    index, gate = torch.rand(30, 4).topk(2).indices, torch.rand(30, 2, requires_grad=True)
    plain, again = (
        torch.autograd.grad(call(hidden, index, gate).square().sum(), [hidden, gate, *mixture.parameters()])
        for call in (mixture, lambda *a: checkpoint(mixture, *a, use_reentrant=False))
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_autocast_and_other_dtypes(kind):
    """float32 weights under autocast, and bfloat16 weights with float32 hidden states: out comes what came in."""
    mixture = taken(kind).model.layers[0].mlp.experts
    hidden, index, gate = torch.randn(30, 32), torch.rand(30, 4).topk(2).indices, torch.rand(30, 2)
    exact = mixture(hidden, index, gate)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mixture(hidden, index, gate)
    narrow = mixture.to(torch.bfloat16)(hidden, index, gate)
    for got in (cast, narrow):
        assert got.dtype == torch.float32 and 0 < mixtures.distance(got, exact) < 0.02
    assert mixture(hidden.bfloat16(), index, gate.bfloat16()).dtype == torch.bfloat16


def test_experts_on_other_ranks():
    """Expert parallelism: two halves of the experts, each with the others' choices marked, add up to the whole."""
    mixture = taken("mixtral").model.layers[0].mlp.experts
    hidden, gate = torch.randn(30, 32), torch.rand(30, 2)
    index = torch.rand(30, 4).topk(2).indices
    whole, up, down = mixture(hidden, index, gate), mixture.gate_up_proj.data, mixture.down_proj.data
    total = 0
    mixture.num_experts, mixture._is_expert_parallel = 2, True
    for first in (0, 2):
        mixture.gate_up_proj, mixture.down_proj = (torch.nn.Parameter(w[first : first + 2]) for w in (up, down))
        here = (index >= first) & (index < first + 2)
        weights = gate.where(here, 0.0).requires_grad_()
        out = mixture(hidden, torch.where(here, index - first, 2 + first), weights)
        (grad,) = torch.autograd.grad(out.sum(), weights)
        assert not grad[~here].any() and grad[here].all()
        total = total + out.detach()
    torch.testing.assert_close(total, whole.detach())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_no_tokens(kind):
    mixture = taken(kind).model.layers[0].mlp.experts
    out = mixture(torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert out.shape == (0, 32)
    out.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in mixture.parameters())


MISTAKES = {
    "no such expert": (lambda x, i, g: (x, i + 9, g), r"expert: expected numbers in \[0, 4\], .* got"),
    "below 0": (lambda x, i, g: (x, i - 3, g), r"expert: expected numbers in \[0, 4\], .* got -"),
    "float choices": (lambda x, i, g: (x, i.float(), g), r"expert: expected int64 or int32"),
    "columns": (lambda x, i, g: (x[:, :31], i, g), r"x: expected float32 \[\w+, 32\], got float32 \[30, 31\]"),
    "gates": (lambda x, i, g: (x, i, g[:, :1]), r"gate: expected float32 \[30, 2\], got float32 \[30, 1\]"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    change, message = MISTAKES[name]
    given = change(torch.randn(30, 32), torch.rand(30, 4).topk(2).indices, torch.rand(30, 2))
    with pytest.raises(ValueError, match=message):
        taken("mixtral").model.layers[0].mlp.experts(*given)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_it_compiles_whole(kind):
    model = taken(kind)
    torch._dynamo.reset()
    mixture = model.model.layers[0].mlp.experts
    compiled = torch.compile(mixture, backend="aot_eager", fullgraph=True)
    hidden = torch.randn(30, 32, requires_grad=True)
    index, gate = torch.rand(30, 4).topk(2).indices, torch.rand(30, 2, requires_grad=True)
    ours, eager = (
        torch.autograd.grad(f(hidden, index, gate).square().sum(), [hidden, gate, *mixture.parameters()])
        for f in (compiled, mixture)
    )
    torch.testing.assert_close(ours, eager)


@pytest.mark.slow
def test_a_model_compiles_whole():
    model = taken("mixtral")
    torch._dynamo.reset()
    with torch.no_grad():
        ours = torch.compile(model, backend="aot_eager", fullgraph=True)(mixtures.IDS, use_cache=False).logits
        assert mixtures.distance(ours, model(mixtures.IDS).logits) < 1e-5


# ---- peft's adapters on parameters -----------------------------------------------------------------------------------


def adapted(kind, experts_name):
    model = mixtures.build(kind)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    torch.manual_seed(2)
    model = peft.get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.1)
    if experts_name == experts.NAME:
        found = fastpost.hf.use_experts(model, quiet=True)
        assert len(found.fused) + len(found.general) == 2
    return model


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_adapters_on_parameters(kind):
    ours, eager = adapted(kind, experts.NAME), adapted(kind, "eager")
    assert len([n for n, p in ours.named_parameters() if p.requires_grad]) == 2 * (2 + 2 + 2)
    found = []
    for model in (ours, eager):
        out = model(mixtures.IDS, labels=mixtures.IDS, use_cache=False)
        out.loss.backward()
        found.append([out.logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        assert mixtures.distance(a, b) < 3e-5 and b.abs().max() > 0
    with ours.disable_adapter():
        base = ours(mixtures.IDS).logits
    torch.testing.assert_close(base, taken(kind)(mixtures.IDS).logits)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(mixtures.IDS).logits, found[0][0], rtol=1e-4, atol=1e-5)
    assert merged.get_experts_implementation()[""] == experts.NAME
