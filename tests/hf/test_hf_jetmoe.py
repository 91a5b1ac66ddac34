# SPDX-License-Identifier: Apache-2.0
"""JetMoE, whose mixtures have no door in transformers: classes of ours on the instances, and nothing else changes."""

import copy
from functools import partial

import mixtures
import peft
import pytest
import torch
import transformers as tf
from torch.utils.checkpoint import checkpoint
from transformers.models.jetmoe import modeling_jetmoe as theirs

import fastpost.hf
from fastpost.data.collate import Example, Sequence, collate
from fastpost.hf import folder, jetmoe
from fastpost.hf.model import outputs
from fastpost.nn import MoA, MoE
from fastpost.train import routers


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    return one_thread


def taken(dtype=torch.float32, **options):
    model = mixtures.build("jetmoe", dtype, **options)
    found = fastpost.hf.use_experts(model, quiet=True)
    assert len(found.fused) == 4 and not found.general and not found.left
    return model


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_new", "relu"])
def test_a_step_is_as_exact_as_transformers(activation):
    """Logits, router logits, aux loss and the gradient of every parameter against float64."""
    options = {"activation_function": activation}
    truth = mixtures.step(mixtures.build("jetmoe", torch.float64, **options))
    eager, ours = mixtures.step(mixtures.build("jetmoe", **options)), mixtures.step(taken(**options))
    parameters = dict(mixtures.build("jetmoe").named_parameters())
    assert len(parameters) == 24 and len(truth) == 2 + 6 + 1 + len(parameters)
    mixtures.expect_as_exact(ours, eager, truth, torch.float32)


def test_a_step_in_bfloat16():
    truth = mixtures.step(mixtures.build("jetmoe", torch.float64), mixtures.SHORT)
    eager = mixtures.step(mixtures.build("jetmoe", torch.bfloat16), mixtures.SHORT)
    ours = mixtures.step(taken(torch.bfloat16), mixtures.SHORT)
    assert ours["logits"].dtype == torch.bfloat16 and ours["router 0"].dtype == torch.float32
    mixtures.expect_as_exact(ours, eager, truth, torch.bfloat16)


def test_the_same_bits_again():
    model = taken()
    first, again = ({n: t.clone() for n, t in mixtures.step(model).items()} for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_every_choice_is_as_transformers_makes_it():
    """All experts of every token, too, and one."""
    for top_k in (1, 4):
        options = {"num_experts_per_tok": top_k, "num_attention_heads": 2 * top_k}
        eager, ours = mixtures.build("jetmoe", **options), taken(**options)
        torch.testing.assert_close(ours(mixtures.IDS).logits, eager(mixtures.IDS).logits, rtol=1e-4, atol=1e-5)


def test_modules_of_fastpost_with_its_weights():
    """nn.MoE and nn.MoA are JetMoE's two mixtures."""
    layer, x = mixtures.build("jetmoe").model.layers[0], torch.randn(2, 9, 32)
    moe, moa = MoE(32, 48, 4, 2, bias=True), MoA(32, 16, 4, 2, bias=True)
    for ours, its, names in (
        (moe, layer.mlp, ("up", "down")),
        (moa, layer.self_attention.experts, ("query", "output")),
    ):
        state = its.state_dict()
        given = dict(zip((*names, "router.weight"), ("input_linear", "output_linear", "router.layer"), strict=True))
        given = {name: state[f"{theirs_name}.weight"] for name, theirs_name in given.items()}
        ours.load_state_dict(given | {"bias": state["bias"]})
    torch.testing.assert_close(moe(x)[0], layer.mlp(x), rtol=1e-4, atol=1e-5)
    queries, routing = moa.map(x)
    expected, logits, info = layer.self_attention.experts.map(x)
    torch.testing.assert_close(queries, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routing.probability, logits.softmax(-1).mean(0))
    values = queries.tanh()
    torch.testing.assert_close(
        moa.reduce(values, routing), layer.self_attention.experts.reduce(values, info), rtol=1e-4, atol=1e-5
    )


# ---- what transformers records, generates and saves ------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["hooks first", "hooks later"])
def test_routers_are_recorded(before):
    """transformers puts hooks on classes, at the first call that asks for something."""
    eager, model = mixtures.build("jetmoe"), mixtures.build("jetmoe")
    expected = eager(mixtures.IDS, output_router_logits=True)
    if before:
        model(mixtures.IDS, output_router_logits=True)
    fastpost.hf.use_experts(model, quiet=True)
    found = model(mixtures.IDS, output_router_logits=True, output_attentions=True, output_hidden_states=True)
    assert len(found.router_logits) == 6 and len({id(x) for x in found.router_logits}) == 4
    assert torch.equal(found.router_logits[0], expected.router_logits[0])
    for a, b in zip(found.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    assert len(found.hidden_states) == 3 and model(mixtures.IDS).router_logits is None


def test_fastposts_router_loss_finds_them():
    model = taken()
    routers.attach(model, 0.5)
    assert routers.on(model)[:2] == (4, 2)
    ids = mixtures.IDS[0].tolist()
    batch = collate([Example(0, (Sequence(ids, bytes([0]) + b"\1" * (len(ids) - 1)),))])
    found = outputs(model, batch, output_router_logits=True).router_logits
    loss = routers.load_balance(found, 2)
    loss.backward()
    assert loss > 0 and model.model.layers[0].self_attention.experts.router.layer.weight.grad.any()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache(cache):
    prompt = mixtures.IDS[:, :6].clone()
    prompt[1, :2] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": (prompt > 0).long()}
    options |= {"cache_implementation": cache, "disable_compile": True}
    eager = mixtures.build("jetmoe").generate(prompt, **options)
    model = taken()
    assert torch.equal(model.generate(prompt, **options), eager)
    assert len(set(eager[0, 6:].tolist())) > 2, "a model that repeats one token shows nothing"
    torch.testing.assert_close(  # with the cache or without: a row of one token or of all
        model(eager).logits[:, -1:], model(eager[:, -1:], past_key_values=model(eager[:, :-1]).past_key_values).logits,
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_folders_are_the_same(tmp_path):
    mixtures.build("jetmoe").save_pretrained(tmp_path / "eager")
    model = taken()
    model.save_pretrained(tmp_path / "ours")
    before, after = mixtures.tensors(tmp_path / "eager"), mixtures.tensors(tmp_path / "ours")
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    own = "model.layers.0.mlp.input_linear.weight", "model.layers.1.self_attention.experts.router.layer.weight"
    assert set(own) < set(before)
    assert (tmp_path / "eager/config.json").read_text() == (tmp_path / "ours/config.json").read_text()
    again = folder.load_model(tmp_path / "ours")  # which takes over, too
    assert type(again.model.layers[0].mlp) is jetmoe.MoE
    assert torch.equal(again(mixtures.IDS).logits, folder.load_model(tmp_path / "eager")(mixtures.IDS).logits)
    folder.save_folder(again, tmp_path / "ours", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "ours/model.safetensors").read_bytes()


# ---- taking over -----------------------------------------------------------------------------------------------------


def test_only_instances_change(capsys):
    model = mixtures.build("jetmoe")
    state, names = model.state_dict(), [n for n, _ in model.named_modules()]
    found = fastpost.hf.use_experts(model)
    assert capsys.readouterr().out == "experts by fastpost: 2 JetMoeMoE, 2 JetMoeMoA\n"
    assert set(found.fused) == {f"model.layers.{i}.{m}" for i in (0, 1) for m in ("mlp", "self_attention.experts")}
    assert [n for n, _ in model.named_modules()] == names
    after = model.state_dict()
    assert list(after) == list(state) and all(after[n].data_ptr() == state[n].data_ptr() for n in state)
    assert fastpost.hf.use_experts(model, quiet=True) == found, "again changes nothing"
    fresh = mixtures.build("jetmoe")
    assert type(fresh.model.layers[0].mlp) is theirs.JetMoeMoE and type(model.model.layers[0].mlp) is jetmoe.MoE
    twin = copy.deepcopy(model)
    assert torch.equal(twin(mixtures.IDS).logits, model(mixtures.IDS).logits)


def test_what_cannot_be_taken_over_is_left():
    model = mixtures.build("jetmoe", activation_function="tanh")
    model.model.layers[0].self_attention.experts.router.forward = lambda x: None
    found = fastpost.hf.use_experts(model, quiet=True)
    assert set(found.fused) == {"model.layers.1.self_attention.experts"}
    assert found.left["model.layers.0.mlp"] == "JetMoeMoE (Tanh)"
    assert found.left["model.layers.0.self_attention.experts"] == "JetMoeMoA (its forward has been replaced)"
    assert type(model.model.layers[0].mlp.router) is theirs.JetMoeTopKGating
    assert "left to transformers: 2 JetMoeMoE (Tanh), 1 JetMoeMoA (its forward has been replaced)" in found.line()


# ---- under wrappers --------------------------------------------------------------------------------------------------


def test_gradient_checkpointing():
    """transformers refuses it for JetMoE as a whole, but its layers can do it."""
    model = taken().train()
    first = {n: t.clone() for n, t in mixtures.step(model).items()}
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    again = mixtures.step(model)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_autocast():
    eager, model = mixtures.build("jetmoe"), taken()
    exact = model(mixtures.SHORT).logits
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = model(mixtures.SHORT, labels=mixtures.SHORT), eager(mixtures.SHORT)
        mixture = model.model.layers[0].mlp
        assert mixture(torch.randn(1, 3, 32)).dtype == torch.float32
    assert ours.logits.dtype == plain.logits.dtype
    assert mixtures.distance(ours.logits, exact) <= 1.5 * mixtures.distance(plain.logits, exact) + 4e-3
    ours.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_no_tokens():
    layer = taken().model.layers[0]
    for shape in ((0, 3, 32), (2, 0, 32)):
        assert layer.mlp(torch.zeros(shape)).shape == shape
        queries, _, info = layer.self_attention.experts.map(torch.zeros(shape))
        assert (
            queries.shape == (*shape[:2], 2, 16) and layer.self_attention.experts.reduce(queries, info).shape == shape
        )


@pytest.mark.slow
def test_it_compiles_whole():
    """The model in one graph; transformers' own breaks at a list of counts."""
    model = taken()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for run in (compiled, model):
        model.zero_grad()
        out = run(mixtures.IDS, labels=mixtures.IDS, use_cache=False)
        out.loss.backward()
        found.append([out.logits, *(p.grad for p in model.parameters())])
    assert all(mixtures.distance(ours, eager) < 1e-5 for ours, eager in zip(*found, strict=True))


# ---- peft ------------------------------------------------------------------------------------------------------------

PLACES = {
    "linear layers": {"target_modules": "all-linear"},
    "matrices": {"target_modules": ["kv_proj"], "target_parameters": ["input_linear.weight", "output_linear.weight"]},
    "trained whole": {"target_modules": ["kv_proj"], "modules_to_save": ["router"]},
}


def adapted(where, when):
    model = mixtures.build("jetmoe")
    if when == "before":
        fastpost.hf.use_experts(model, quiet=True)
    torch.manual_seed(2)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, **PLACES[where]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.1)
    if when == "after":
        assert len(fastpost.hf.use_experts(model, quiet=True).fused) == 4
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", PLACES)
def test_adapters(where, when):
    ours, eager, found = adapted(where, when), adapted(where, "never"), []
    for model in (ours, eager):
        out = model(mixtures.IDS, labels=mixtures.IDS, output_router_logits=True)
        out.loss.backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append([out.logits, *out.router_logits, *trained.values()])
    assert list(trained) == [n for n, p in ours.named_parameters() if p.requires_grad]
    assert any("lora_" in n and ("mlp" in n or "router" in n) for n in trained) or where == "trained whole"
    for a, b in zip(*found, strict=True):
        assert mixtures.distance(a, b) < 3e-5 and b.abs().max() > 0
    merged = ours.merge_and_unload()
    assert type(merged.model.layers[0].mlp) is jetmoe.MoE
    torch.testing.assert_close(merged(mixtures.IDS).logits, found[0][0], rtol=1e-4, atol=1e-5)


# ---- JetMoE-8B's shape -----------------------------------------------------------------------------------------------

SHAPE = dict(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_key_value_heads=16,
    kv_channels=128, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip


def test_the_8b_model_by_its_numbers():
    """On the meta device: 8.5 billion parameters, 48 mixtures, all ours."""
    with torch.device("meta"):
        model = tf.JetMoeForCausalLM(tf.JetMoeConfig(**SHAPE)).to(torch.bfloat16)
    found = fastpost.hf.use_experts(model, quiet=True)
    assert found.line() == "experts by fastpost: 24 JetMoeMoE, 24 JetMoeMoA"
    assert sum(p.numel() for p in model.parameters()) == 8_522_237_952
    shapes = {n: list(p.shape) for n, p in model.model.layers[23].named_parameters()}
    assert shapes["self_attention.experts.input_linear.weight"] == [8, 2048, 2048]
    assert shapes["mlp.input_linear.weight"] == [8, 11264, 2048]
    assert shapes["mlp.output_linear.weight"] == [8, 2048, 5632]


def test_the_8b_model_at_a_tenth_of_the_width():
    narrow = SHAPE | {"hidden_size": 208, "intermediate_size": 560, "num_hidden_layers": 2, "kv_channels": 16}
    model = tf.JetMoeForCausalLM(tf.JetMoeConfig(**narrow | {"vocab_size": 3200})).to(torch.bfloat16)
    fastpost.hf.use_experts(model, quiet=True)
    ids = torch.arange(3, 19)[None]
    out = model(ids, labels=ids, output_router_logits=True)
    out.loss.backward()
    assert abs(out.loss.item() - 8.07) < 0.3, "ln 3200 for a fresh model, and a little aux loss"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
