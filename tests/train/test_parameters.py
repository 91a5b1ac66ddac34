# SPDX-License-Identifier: Apache-2.0
"""What a pattern means, groups of parameters with their own rates, and layer freezing."""

import pytest
import torch
from safetensors.torch import load_file

import runs
import tiny
from fastpost.data.collate import Example, Sequence, collate
from fastpost.hf import adapter
from fastpost.objectives import SFT
from fastpost.ops import _fused
from fastpost.train import checkpoint, loop, metrics
from fastpost.train.config import GroupConfig
from fastpost.train.forward import forward, schedule
from fastpost.train.freezing import freeze, summary
from fastpost.train.gradients import Gradients
from fastpost.train.loop import train
from fastpost.train.optim import AdamW
from fastpost.train.parameters import Parameters
from fastpost.train.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")


def model(layers=6, **options):
    return tiny.model(layers=layers, **options)


def trained_layers(net):
    return sorted({int(n.split(".")[2]) for n, p in net.named_parameters() if p.requires_grad and ".layers." in n})


# ---- patterns ------------------------------------------------------------------------------------------------------


def test_first_and_last_are_layers():
    parameters = Parameters(model(layers=12))
    names = parameters.select("last:3", "model.train")
    assert {n.split(".")[2] for n in names} == {"9", "10", "11"} and len(names) == 3 * 9
    assert {n.split(".")[2] for n in parameters.select("first:2", "model.train")} == {"0", "1"}
    # A regular expression for one layer would also match its namesakes: layers.1 in layers.10 and layers.11.
    assert {n.split(".")[2] for n in parameters.select(r"layers\.1\.", "model.train")} == {"1"}


def test_a_tied_head_answers_to_both_names():
    parameters = Parameters(model(tie=True))
    assert parameters.select("lm_head", "x") == parameters.select("embed_tokens", "x") == ["model.embed_tokens.weight"]
    assert Parameters(model(tie=False)).select("lm_head", "x") == ["lm_head.weight"]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("embed_token$", "[train] f: no parameter matches 'embed_token$'. Did you mean 'embed_tokens'?"),
        ("vision", "[train] f: no parameter matches 'vision'. Known: down_proj, embed_tokens, gate_proj, "),
        ("last:7", "[train] f: expected 1 to 6 layers of this model, got 'last:7'."),
        ("first:0", "[train] f: expected 1 to 6 layers of this model, got 'first:0'."),
        ("mlp(", "[train] f: expected first:N, last:N or a regular expression, got 'mlp(' (missing ), "),
        (
            "norm",
            "[train] f: 'norm' matches model.layers.0.input_layernorm.weight (13 in all), but what it matches is ",
        ),
    ],
)
def test_a_pattern_that_means_nothing(pattern, expected):
    net = model()
    for name, p in net.named_parameters():
        p.requires_grad_("norm" not in name)
    with pytest.raises(ValueError) as error:
        Parameters(net).select(pattern, "f")
    assert str(error.value).startswith(expected)


# ---- groups --------------------------------------------------------------------------------------------------------


def steps(net, optimizer, count=4, decay_only=False):
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        with Gradients(optimizer.parameters) as gradients:
            for p in net.parameters():
                p.grad = torch.zeros_like(p) if decay_only else torch.randn(p.shape, generator=generator)
            optimizer.step(gradients, step=step, lr=1e-2 * (step + 1))


def test_groups_are_torchs_parameter_groups_to_the_bit():
    ours, theirs = model(2), model(2)
    groups = {"embed_tokens|lm_head": GroupConfig(0.1, 0.0), "mlp": GroupConfig(weight_decay=0.5)}
    steps(ours, AdamW(ours, precision="fp32", weight_decay=0.2, groups=groups))

    def kind(name, p):
        if "embed" in name:
            return 0.1, 0.0
        return 1.0, 0.0 if p.ndim < 2 else 0.5 if "mlp" in name else 0.2

    named = [(kind(n, p), p) for n, p in theirs.named_parameters()]
    kinds = sorted({k for k, _ in named})
    reference = torch.optim.AdamW(
        [{"params": [p for k, p in named if k == this], "weight_decay": this[1]} for this in kinds], fused=True
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for p in theirs.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        for group, (ratio, _) in zip(reference.param_groups, kinds, strict=True):
            group["lr"] = 1e-2 * (step + 1) * ratio
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_no_weight_decay_on_norms_and_biases_whatever_group_they_are_in():
    """With zero gradients only decay moves a weight."""
    net = model(2, attention_bias=True)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim < 2:
                p.normal_()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    steps(
        net, AdamW(net, precision="fp32", weight_decay=0.1, groups={"layers": GroupConfig(1.0, 0.3)}), decay_only=True
    )
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) == (p.ndim < 2), name
    assert any("bias" in name for name in before) and any("norm" in name for name in before)


def test_the_first_group_counts():
    net = model(2)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    steps(net, AdamW(net, precision="fp32", groups={"mlp": GroupConfig(0.0), "last:1": GroupConfig(2.0)}))
    still = {n for n, p in net.named_parameters() if torch.equal(p, before[n])}
    assert still == {n for n in before if "mlp" in n}


@pytest.mark.parametrize(
    "groups, expected",
    [
        ({"lm_heat": GroupConfig()}, "[train] optim.groups: no parameter matches 'lm_heat'. Did you mean 'lm_head'?"),
        (
            {"layers": GroupConfig(), "mlp": GroupConfig()},
            "[optim] optim.groups: everything that 'mlp' matches (model.layers.0.mlp.gate_proj.weight, 18 in all) is "
            "in an earlier group, and the first one counts. Put it before them, or leave it out.",
        ),
        (
            {"norm": GroupConfig(weight_decay=0.1)},
            "[optim] optim.groups: 'norm' matches norms and biases alone (model.layers.0.input_layernorm.weight, 13 in "
            "all), which get no weight decay. Leave weight_decay out there.",
        ),
    ],
)
def test_a_group_that_does_nothing(groups, expected):
    with pytest.raises(ValueError) as error:
        AdamW(model(), groups=groups)
    assert str(error.value) == expected


GROUPS = ["--optim.groups", "{embed_tokens|lm_head: {lr_ratio: 0.1, weight_decay: 0}, mlp: {lr_ratio: 3}}"]


def test_groups_survive_a_resume(tmp_path):
    train(runs.recipe(tmp_path, *GROUPS))
    cut = runs.recipe(tmp_path, *GROUPS, "--train.output_dir", str(tmp_path / "cut"))
    assert runs.in_child(runs.killed_at(cut, loop, "train_step", 4)) != 0
    # The rates are settings, not state: started again without them, the run is refused instead of going on at another.
    with pytest.raises(ValueError, match=r"other settings: optim.groups.*lr_ratio is .* there, .* now"):
        train(runs.recipe(tmp_path, "--train.output_dir", str(tmp_path / "cut")))
    train(cut)
    assert runs.outcome(tmp_path / "cut") == runs.outcome(tmp_path / "run")
    plain = runs.recipe(tmp_path, "--train.output_dir", str(tmp_path / "plain"))
    train(plain)
    moved = {}
    for name in ("run", "plain"):
        w = load_file(tmp_path / name / "model/model.safetensors")["model.embed_tokens.weight"]
        moved[name] = (w - load_file(tmp_path / "model/model.safetensors")["model.embed_tokens.weight"]).norm()
    assert moved["run"] < 0.3 * moved["plain"]


# ---- freezing ------------------------------------------------------------------------------------------------------


def test_what_freezing_leaves():
    net = model()
    freeze(net, ["last:4"], [])
    assert trained_layers(net) == [2, 3, 4, 5] and not net.model.embed_tokens.weight.requires_grad
    net = model()
    freeze(net, [], ["first:2", "last:2"])
    assert trained_layers(net) == [2, 3] and net.model.embed_tokens.weight.requires_grad
    net = model()
    freeze(net, ["last:2", "lm_head"], ["layernorm"])
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    assert "model.embed_tokens.weight" in trained and not any("norm" in n for n in trained) and len(trained) == 15


@pytest.mark.parametrize(
    "options, left", [((["last:2"], []), (4, 5)), (([], ["first:4"]), (4, 5)), (([], []), range(6))]
)
def test_freezing_never_thaws(options, left):
    """Under an adapter the base weights are frozen; "last:2" then means the adapter's weights in these layers."""
    net = model()
    for name, p in net.named_parameters():
        p.requires_grad_("q_proj" in name)
    freeze(net, *options)
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    assert trained == [f"model.layers.{i}.self_attn.q_proj.weight" for i in left]


def test_freezing_everything_is_an_error():
    with pytest.raises(ValueError, match=r"model.freeze: ., layers leaves nothing to train. Freeze less"):
        freeze(model(), [], [".", "layers"])


def test_summary():
    net = model(2, tie=True)
    total = sum(p.numel() for p in net.parameters())
    assert summary(net) == f"model  trains {total:,} of {total:,} parameters (100 %)"
    freeze(net, ["last:1"], [])
    layer = sum(p.numel() for p in net.model.layers[1].parameters())
    assert summary(net) == f"model  trains {layer:,} of {total:,} parameters ({100 * layer / total:.3g} %), " + (
        "11 of 20 tensors are frozen"
    )


def test_a_frozen_head_costs_two_products_in_three():
    """Forward and the gradient of the hidden states, 4 NVD; the weight's own gradient, 2 NVD more, is not made."""
    net = model(2)
    row = Sequence(list(range(7, 40)), bytes(8) + bytes([1]) * 25)
    batch = collate([Example(i, (row, row)) for i in range(4)])
    assert schedule(net, batch, SFT()).operations == 6.0
    freeze(net, ["last:1"], [])
    assert schedule(net, batch, SFT()).operations == 4.0
    loss = forward(net, batch, SFT()).loss
    loss.backward()
    assert net.lm_head.weight.grad is None and net.model.layers[0].mlp.up_proj.weight.grad is None
    assert net.model.layers[1].mlp.up_proj.weight.grad.norm() > 0


def test_the_schedule_of_a_lora_head_is_the_one_it_takes(monkeypatch):
    """The core's own GEMM has no low_rank; asking draws no dropout, so a run goes on as if nobody had asked."""
    monkeypatch.setattr(_fused, "FORCED", "fused")
    row = Sequence(list(range(7, 40)), bytes(8) + bytes([1]) * 25)
    batch = collate([Example(i, (row, row)) for i in range(4)])
    assert schedule(model(2), batch, SFT()).gemm == "core"
    net = adapter.fresh(model(2, tie=False), rank=4, alpha=8, dropout=0.5, targets=["lm_head"]).train()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert schedule(net, batch, SFT()).gemm == "torch"
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "pure-bf16"])
def test_a_run_that_trains_the_last_layer(tmp_path, precision, capsys):
    options = ("--model.train", "last:1", "--optim.weight_decay", "0.1", "--optim.precision", precision)
    train(runs.recipe(tmp_path, *options))
    out = capsys.readouterr().out
    assert "tensors are frozen" in out and "head   " in out
    before, after = (load_file(tmp_path / p / "model.safetensors") for p in ("model", "run/model"))
    for name, w in before.items():  # frozen float32 weights keep their bits although the model computed in bf16
        assert torch.equal(w, after[name]) == (".layers.1." not in name), name
    saved = runs.stored(checkpoint.latest(tmp_path / "run/checkpoints"), "optimizer")
    assert {n.split(".layers.")[1][0] for n in saved if ".layers." in n} == {"1"}
    assert not any("embed" in n for n in saved)
    rows = [r["loss"] for r in metrics.read(tmp_path / "run/metrics.jsonl") if "loss" in r]
    assert rows[-1] < rows[0]

    cut = runs.recipe(tmp_path, *options, "--train.output_dir", str(tmp_path / "cut"))
    assert runs.in_child(runs.killed_at(cut, loop, "train_step", 4)) != 0
    train(cut)
    assert runs.outcome(tmp_path / "cut") == runs.outcome(tmp_path / "run")


def test_another_choice_of_layers_does_not_resume(tmp_path):
    cfg = runs.recipe(tmp_path, "--model.train", "last:1")
    assert runs.in_child(runs.killed_at(cfg, loop, "train_step", 4)) != 0
    with pytest.raises(ValueError, match=r"model.train is \['last:1'\] there, \['last:2'\] now"):
        RunFolder(runs.recipe(tmp_path, "--model.train", "last:2"))


def test_bad_patterns_stop_a_run_before_it_starts(tmp_path):
    with pytest.raises(ValueError, match=r"model.train: expected 1 to 2 layers of this model, got 'last:4'"):
        train(runs.recipe(tmp_path, "--model.train", "last:4"))
    with pytest.raises(ValueError, match=r"optim.groups: no parameter matches 'embd'"):
        train(runs.recipe(tmp_path, "--optim.groups", "{embd: {lr_ratio: 0.1}}"))
    assert not (tmp_path / "run/reference.safetensors").exists()
