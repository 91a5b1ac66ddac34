# SPDX-License-Identifier: Apache-2.0
"""Complaint 20: a mixture of experts trains without its load-balancing loss, or with one whose softmax was taken twice.

(Qwen3 #736; TRL #1544, PR #6085; transformers #45120)"""

import importlib
import json

import pytest
import torch
import transformers as tf

import launch
import runs
from fastpost import objectives
from fastpost.cli.dry_run import dry_run
from fastpost.data.collate import Example, Sequence, collate
from fastpost.hf import attention
from fastpost.hf.model import outputs, verify
from fastpost.train import forward, loop, metrics, routers, step
from fastpost.train.evaluate import evaluate_config
from fastpost.train.loop import train
from fastpost.train.recompute import recompute

SHARED = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2, pad_token_id=0,
    bos_token_id=6, eos_token_id=2, num_experts_per_tok=2,
)  # fmt: skip
QWEN = dict(num_experts=4, num_attention_heads=4, moe_intermediate_size=16)
CONFIGS = {
    "mixtral": lambda: tf.MixtralConfig(**SHARED, num_local_experts=4, num_attention_heads=4),
    "olmoe": lambda: tf.OlmoeConfig(**SHARED, num_experts=4, num_attention_heads=4),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(**SHARED, **QWEN, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**SHARED, **QWEN, head_dim=8, mlp_only_layers=[0]),  # a dense layer, too
    "granitemoe": lambda: tf.GraniteMoeConfig(**SHARED, num_local_experts=4, num_attention_heads=4),
    "jetmoe": lambda: tf.JetMoeConfig(**SHARED, num_local_experts=4, kv_channels=8),
}
OWN = {"mixtral": 0.001, "olmoe": 0.01, "qwen2_moe": 0.001, "qwen3_moe": 0.001, "granitemoe": 0.001, "jetmoe": 0.01}
IDS = [(7 * i + 3) % 320 for i in range(40)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(kind, **options):
    attention.register()
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.update(options)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


def batch_of(*sequences):
    return collate(
        [Example(i, (Sequence(s, bytes([0]) + bytes([1]) * (len(s) - 1)),)) for i, s in enumerate(sequences)]
    )


class Keeps:
    """In the place of an optimizer: what train_step gives it."""

    def __init__(self, model):
        self.named = dict(model.named_parameters())
        self.parameters, self.device = list(self.named.values()), torch.device("cpu")

    def step(self, gradients, **_):
        found = {name: gradients.get(p) for name, p in self.named.items()}
        self.gradients = {name: torch.zeros_like(self.named[name]) if g is None else g for name, g in found.items()}


def stepped(model, *batches):
    keeps = Keeps(model)
    values = step.train_step(model, objectives.SFT(), keeps, batches, step=0, lr=0.0, max_grad_norm=None)
    return values, keeps.gradients


# ---- the same as transformers' own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_and_gradients_are_those_of_transformers(kind):
    """A whole step against the model's own forward with labels and output_router_logits, aux loss far from small."""
    model = build(kind)
    verify(model)
    weight = 0.5
    model.router_aux_loss_coef = model.aux_loss_coef = weight
    ids = torch.tensor([IDS])
    own = model(ids, labels=ids, output_router_logits=True, use_cache=False)
    if kind == "jetmoe":  # transformers has each attention router twice in its list
        assert len(own.router_logits) == 6
        distinct = tuple({id(x): x for x in own.router_logits}.values())
        assert len(distinct) == 4
        own.loss = own.loss - weight * own.aux_loss
        own.aux_loss = reference(kind)(distinct, 4, 2)
        own.loss = own.loss + weight * own.aux_loss
    own.loss.backward()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}

    routers.attach(model, weight)
    assert routers.on(model) == (4, 2, weight, 0.0, "transformers")
    values, gradients = stepped(model, batch_of(IDS))
    assert values["aux_loss"] == pytest.approx(own.aux_loss.item(), rel=1e-5)
    assert values["loss"] == pytest.approx(own.loss.item(), rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=name)

    delattr(model, routers.ATTACHED)  # the mistake: off
    values, without = stepped(model, batch_of(IDS))
    assert "aux_loss" not in values and values["loss"] < own.loss.item() - 0.5
    assert any((without[name] - expected[name]).abs().max() > 1e-3 for name in without)


def reference(kind):
    return importlib.import_module(f"transformers.models.{kind}.modeling_{kind}").load_balancing_loss_func


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_weight_is_the_models_own(kind):
    assert routers.of(build(kind).config, None) == (4, 2, OWN[kind], 0.0, "transformers")
    assert routers.of(build(kind).config, 0.0).weight == 0.0
    assert routers.of(build(kind).config, 0.25).weight == 0.25


def test_every_computed_token_counts_once():
    """Of a pair with a shared prompt: the prompt's tokens once, both replies', and nothing else."""
    model = build("mixtral")
    prompt, chosen, rejected = IDS[:20], IDS[20:30], IDS[30:]
    pair = [Sequence(prompt + reply, bytes(20) + b"\1" * 10) for reply in (chosen, rejected)]
    batch = collate([Example(0, tuple(pair))], share_prompt=True)
    with torch.no_grad():
        ours = routers.losses(outputs(model, batch, output_router_logits=True).router_logits, 2).load_balance
        rows = [model(torch.tensor([prompt + r]), output_router_logits=True).router_logits for r in (chosen, rejected)]
    shared = batch.tokens - 2 * 11  # the prompt's last token is there twice: the replies' first are scored at it
    assert shared == 19
    kept = tuple(torch.cat([a, b[shared:]]) for a, b in zip(*rows, strict=True))
    assert ours.item() == pytest.approx(reference("mixtral")(kept, 4, 2).item(), rel=1e-5)


# ---- closed forms ----------------------------------------------------------------------------------------------------


def load_balance(logits, top_k):
    return routers.losses(logits, top_k).load_balance


def test_closed_forms():
    """JetMoE's numbers have f sum to 1 instead of k = 2, so they are halves of these."""
    alike = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(6, 4)
    assert load_balance([alike, alike.clone()], 2).item() / 2 == pytest.approx(1.761594, abs=1e-6)
    balanced = torch.stack([torch.tensor([2.0, 1.0, 0.0, -1.0]).roll(i) for i in range(4)])
    assert load_balance([balanced], 2).item() / 2 == pytest.approx(1.0, abs=1e-6)
    assert load_balance([torch.zeros(8, 4)], 1).item() == pytest.approx(1.0, abs=1e-6)  # whatever is chosen
    one = torch.tensor([[50.0, 0.0, 0.0, 0.0]])
    assert load_balance([one], 1).item() == pytest.approx(4.0)  # all to one of four: the most there can be
    # The mistake: a second softmax. All tokens to the same two experts then look nearly balanced.
    assert load_balance([alike.softmax(-1)], 2).item() / 2 == pytest.approx(1.197849, abs=1e-6)


def test_closed_forms_of_jetmoe():
    """METHODS 20: all tokens alike, and perfect balance; each router counts for itself, and once."""
    alike = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(6, 4)
    balanced = torch.stack([torch.tensor([2.0, 1.0, 0.0, -1.0]).roll(i) for i in range(4)])
    one = routers.losses([alike], 2, "jetmoe")
    assert (one.load_balance.item(), one.z.item()) == pytest.approx((1.761594, 5.954526), abs=1e-6)
    assert routers.losses([balanced], 2, "jetmoe").load_balance.item() == pytest.approx(1.0, abs=1e-6)
    both = routers.losses([alike, balanced, alike], 2, "jetmoe")  # the first one twice: the same tensor
    assert both.load_balance.item() == pytest.approx(2.761594, abs=1e-6)
    assert both.z.item() == pytest.approx(2 * 5.954526, abs=1e-5)
    assert both.chosen.tolist() == [[6, 6, 0, 0], [2, 2, 2, 2]]
    assert routers.losses([alike, balanced], 2).z.item() == pytest.approx(5.954526, abs=1e-6)  # a mean, over all tokens
    large = routers.losses([torch.tensor([[300.0, 0.0]])], 1, "jetmoe")  # exp(300) is infinite in float32
    assert large.z.item() == 90000.0


@pytest.mark.parametrize("convention", ["transformers", "jetmoe"])
def test_the_z_loss_in_a_step(convention):
    """A whole step of JetMoE against both losses written down once more, from hooks on its routers."""
    model, seen = build("jetmoe"), []
    gates = [m for name, m in model.named_modules() if name.endswith("router")]
    assert (
        len(gates) == 4
        and sum("self_attention" in name for name, _ in model.named_modules() if name.endswith("router")) == 2
    )
    hooks = [m.register_forward_hook(lambda module, inputs, output: seen.append(output[4])) for m in gates]
    ids = torch.tensor([IDS])
    loss = model(ids, labels=ids, use_cache=False).loss
    balance, z = [], []
    for x in seen:
        p, f = x.softmax(-1), torch.zeros(4)
        for token in x.topk(2).indices:
            f[token] += 1 / 80
        balance.append(4 * (f * p.mean(0)).sum())
        z.append((x.exp().sum(-1).log() ** 2).mean())
    if convention == "jetmoe":
        aux, z = sum(balance), sum(z)
    else:
        aux, z = reference("jetmoe")(tuple(seen), 4, 2), sum(z) / 4
    loss = loss + 0.5 * aux + 0.25 * z
    loss.backward()
    for hook in hooks:
        hook.remove()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    routers.attach(model, 0.5, 0.25, convention)
    values, gradients = stepped(model, batch_of(IDS))
    assert (values["loss"], values["aux_loss"], values["z_loss"]) == pytest.approx(
        (loss.item(), aux.item(), z.item()), rel=1e-5
    )
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    # The mistakes: one kind of router forgotten, and the z loss left out.
    assert abs(values["aux_loss"] - aux.item() / 2) > 0.5
    routers.attach(model, 0.5, 0.0, convention)
    assert abs(stepped(model, batch_of(IDS))[0]["loss"] - loss.item()) > 0.1


def test_the_z_loss_alone():
    model = build("mixtral")
    routers.attach(model, 0.0, 0.25)
    values, _ = stepped(model, batch_of(IDS))
    delattr(model, routers.ATTACHED)
    without, _ = stepped(model, batch_of(IDS))
    assert values["loss"] == pytest.approx(without["loss"] + 0.25 * values["z_loss"], rel=1e-6)
    assert values["z_loss"] > 0.1


def test_loads_are_those_of_the_step():
    """Over micro-batches as over the whole: counts are added up before the largest and smallest are taken."""
    model = build("jetmoe")
    routers.attach(model, 0.01, 0.0, "jetmoe")
    parts = [IDS[:30], IDS[30:], IDS[5:12]]
    logits = outputs(model, batch_of(*parts), output_router_logits=True).router_logits
    distinct = list({id(x): x for x in logits}.values())
    counts = torch.stack([torch.bincount(x.topk(2).indices.flatten(), minlength=4) for x in distinct])
    loads = counts / (2 * 47) * 4
    for batches in ([batch_of(*parts)], [batch_of(part) for part in parts]):
        values, _ = stepped(model, *batches)
        assert values["router/load_max"] == pytest.approx(loads.max().item(), rel=1e-6)
        assert values["router/load_min"] == pytest.approx(loads.min().item(), rel=1e-6)
    each = [stepped(model, batch_of(part))[0]["router/load_max"] for part in parts]
    assert max(each) > loads.max() + 0.05  # the mistake: the extremes of micro-batches


def test_a_router_that_is_not_recorded_is_refused():
    """Half of JetMoE's routers: those of its MLPs, put in by modules of another class."""
    model = build("jetmoe")
    for layer in model.model.layers:
        layer.mlp = SomethingElse(layer.mlp)
    with pytest.raises(ValueError, match="got those of 2 routers, not of the 4 in attention and MLPs"):
        routers.attach(model, 0.01)


class SomethingElse(torch.nn.Module):
    """An MLP without a router that transformers knows."""

    def __init__(self, mlp):
        super().__init__()
        self.weight = mlp.output_linear.weight

    def forward(self, x):
        return x @ (self.weight[0] @ self.weight[0].T)


def test_weights_that_are_no_numbers_are_named_by_their_rows():
    """The router's NaN is not what is complained about: the loss is, with the rows."""
    model = build("mixtral")
    routers.attach(model, 0.01)
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS[3]] = torch.nan
    with pytest.raises(step.NotFinite, match="Data rows: 0"):
        stepped(model, batch_of(IDS))


def test_a_second_softmax_is_refused(monkeypatch):
    """The mistake of some versions of transformers: probabilities under the name of router logits."""
    model = build("mixtral")

    def softmaxed(module, inputs, output):
        return (output[0].softmax(-1), *output[1:])

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(softmaxed)
    with pytest.raises(
        ValueError, match=r"expected logits \[tokens, 4\] of each router of MixtralForCausalLM, got prob"
    ):
        routers.attach(model, None)
    assert routers.on(model) is None
    routers.attach(model, 0.0)  # off: nothing to get wrong


# ---- denominators ----------------------------------------------------------------------------------------------------


def test_a_step_is_the_mean_over_micro_batches_weighted_by_tokens():
    model = build("mixtral")
    routers.attach(model, 0.5)
    parts = [IDS[:30], IDS[30:], IDS[5:12]]
    whole, _ = stepped(model, batch_of(*parts))
    split, gradients = stepped(model, *map(batch_of, parts))
    each = [stepped(model, batch_of(part)) for part in parts]
    tokens = [len(part) for part in parts]
    expected = sum(v["aux_loss"] * n for (v, _), n in zip(each, tokens, strict=True)) / sum(tokens)
    assert split["aux_loss"] == pytest.approx(expected, rel=1e-6)
    scored = [n - 1 for n in tokens]
    own = sum((v["loss"] - 0.5 * v["aux_loss"]) * n for (v, _), n in zip(each, scored, strict=True)) / sum(scored)
    assert split["loss"] == pytest.approx(own + 0.5 * expected, rel=1e-6)
    # What is left between splits is the covariance of f and P, nothing like a factor of 3.
    assert 0 < split["aux_loss"] - whole["aux_loss"] < 0.5

    # The gradient, too: that of the mean, with one number of tokens for the step.
    for p in model.parameters():
        p.grad = None
    for part, n in zip(parts, tokens, strict=True):
        out = step.forward(model, batch_of(part), objectives.SFT())
        (out.losses.sum() / sum(scored) + 0.5 * out.aux_loss * n / sum(tokens)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-6, msg=name)


SPLITS = {"1 x 8": "8", "8 x 1": "1", "3 + 3 + 2": "3"}


def recipe(tmp, out, *overrides, **train_keys):
    """DPO, two epochs of 8 + 8 + 6 rows, or as many steps as asked for; weight 0.01."""
    cfg = runs.recipe(
        tmp,
        *("--model.router_aux_loss", "0.01", *overrides),
        model={"kind": "mixtral"},
        optim={"lr": 1e-3, "precision": "fp32"},
        train={"output_dir": tmp / out, "save_every": 0, "eval_every": 0, **train_keys},
    )
    cfg.data.eval = None
    return cfg


def column(run, name):
    rows = [row for row in metrics.read(run / "metrics.jsonl") if "loss" in row]
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def curves(tmp):
    """{split: loss at each step}; checks on the way that the objective's own loss begins at ln 2."""
    found = {}
    for split, size in SPLITS.items():
        run = train(recipe(tmp, split, "--train.micro_batch_size", size))
        loss, aux = column(run, "loss"), column(run, "aux_loss")
        assert loss[0] - 0.01 * aux[0] == pytest.approx(0.693147, abs=1e-6)
        found[split] = loss
    return found


def spread(found):
    return max((loss - found["1 x 8"]).abs().max().item() for loss in found.values())


BOUND = 0.01 * 0.05
"""The weight times twice the largest covariance term: E cov(f, P) was up to 0.024 over single pairs of 40 tokens, and
that moved the loss by up to 2.4e-4."""


def test_splits_give_one_curve(tmp_path, capsys):
    found = curves(tmp_path)
    assert len(found["8 x 1"]) == 6 and found["8 x 1"][-1] < 0.5 * found["8 x 1"][0]
    assert spread(found) < BOUND
    said = capsys.readouterr().out
    assert said.count("router  4 experts, top 2, aux loss 0.01 x load balance\n") == 3
    assert said.count("(expected 0.693147, difference") == said.count("   ok\n") == 3


def test_a_sum_over_micro_batches_would_be_seen(tmp_path, monkeypatch):
    """The mistake: each micro-batch adds its aux loss with the full weight, so accumulation multiplies it."""
    right = loop.train_step

    def wrong(model, objective, optimizer, batches, **keywords):
        right_forward, tokens = step.forward, sum(b.tokens for b in batches)

        def scaled(model, batch, *rest):
            output = right_forward(model, batch, *rest)
            return output._replace(aux_loss=output.aux_loss * (tokens / batch.tokens))

        monkeypatch.setattr(step, "forward", scaled)
        try:
            return right(model, objective, optimizer, batches, **keywords)
        finally:
            monkeypatch.setattr(step, "forward", right_forward)

    monkeypatch.setattr(loop, "train_step", wrong)
    sizes = {size: train(recipe(tmp_path, size, "--train.micro_batch_size", size, max_steps=1)) for size in ("8", "1")}
    assert column(sizes["1"], "loss")[0] - column(sizes["8"], "loss")[0] > 10 * BOUND


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_do_not_change_it(tmp_path, parallel):
    """Micro-batches of 4 + 4 rows and other numbers of tokens, one for each of two ranks."""
    for ranks, kind in ((1, "auto"), (2, parallel)):
        cfg = recipe(tmp_path, kind, "--train.micro_batch_size", "4", max_steps=2, parallel=kind)
        assert launch.Forked(lambda cfg=cfg: train(cfg), ranks).wait() == [0] * ranks
    for name in ("loss", "aux_loss", "z_loss", "router/load_max", "router/load_min", "grad_norm"):
        alone, ours = column(tmp_path / "auto", name), column(tmp_path / parallel, name)
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6, msg=name)


# ---- recomputation, adapters, evaluation -----------------------------------------------------------------------------


def test_recomputing_neither_drops_nor_repeats_a_router():
    found = {}
    for how in ("none", "selective", "full"):
        model = build("mixtral").train()
        recompute(model, how, torch.device("cpu"))
        routers.attach(model, 0.5)
        logits = outputs(model, batch_of(IDS), output_router_logits=True).router_logits
        assert [x.shape for x in logits] == [(40, 4)] * 2 and all(x.requires_grad for x in logits)
        found[how] = stepped(model, batch_of(IDS), batch_of(IDS[:9]))
    for values, gradients in found.values():
        assert values == found["none"][0]
        assert all(torch.equal(g, found["none"][1][name]) for name, g in gradients.items())
        assert gradients["model.layers.0.mlp.gate.weight"].abs().max() > 0


@pytest.mark.parametrize("targets, on_routers", [("[q_proj, v_proj]", False), ("[all-linear]", True)])
def test_lora(tmp_path, targets, on_routers):
    """Adapters are trained by it, also those below a frozen router; all-linear puts some on the routers themselves."""
    cfg = recipe(tmp_path, "run", "--model.lora.rank", "4", "--model.lora.targets", targets)
    model = forward.load_policy(cfg, torch.device("cpu"))
    with torch.no_grad():  # B is 0 at first, and with it the gradient of A
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    found = {}
    for weight in (0.0, 5.0):
        setattr(model, routers.ATTACHED, routers.of(model.config, weight))
        values, found[weight] = stepped(model, batch_of(IDS))
        assert values["aux_loss"] > 1
    changed = {name for name, g in found[5.0].items() if (g - found[0.0][name]).abs().max() > 1e-4}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed <= trained and all("lora_" in name for name in trained)
    assert any("mlp.gate" in name for name in trained) == on_routers
    first = "base_model.model.model.layers.0."
    assert {f"{first}self_attn.{w}_proj.lora_{ab}.default.weight" for w in "v" for ab in "AB"} <= changed
    if on_routers:
        assert {f"{first}mlp.gate.lora_{ab}.default.weight" for ab in "AB"} <= changed


def test_evaluation_has_it_too(tmp_path):
    cfg = recipe(tmp_path, "run", max_steps=2)
    cfg.data.eval = str(tmp_path / "eval.jsonl")
    last = metrics.read(train(cfg) / "metrics.jsonl")[-1]
    again = evaluate_config(cfg, tmp_path / "run")
    assert last["eval_aux_loss"] == pytest.approx(again["aux_loss"], rel=1e-5)
    assert last["eval_loss"] == pytest.approx(again["loss"], rel=1e-5)
    off = recipe(tmp_path, "off", "--model.router_aux_loss", "0")
    off.data.eval = cfg.data.eval
    without = evaluate_config(off, tmp_path / "run")
    assert "aux_loss" not in without
    assert again["loss"] == pytest.approx(without["loss"] + 0.01 * again["aux_loss"], rel=1e-6)


# ---- messages --------------------------------------------------------------------------------------------------------


def test_a_weight_for_a_dense_model_is_refused_before_its_weights_are_read(tmp_path):
    cfg = runs.recipe(tmp_path, "--model.router_aux_loss", "0.01")
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        train(cfg)
    assert str(error.value) == (
        "[train] model.router_aux_loss: expected a mixture of experts to balance with weight 0.01, got "
        "LlamaForCausalLM: it has no routers. Leave it out, or set it to 0."
    )
    assert routers.of(tf.LlamaConfig(), 0.0) is None and routers.of(tf.LlamaConfig(), None) is None
    for settings, said in (
        ((None, 0.001), "router_z_loss: expected a mixture of experts for 0.001, got LlamaForCausalLM: it has no "),
        ((None, 0.0, "jetmoe"), "router_loss: expected a mixture of experts for jetmoe, got LlamaForCausalLM: it has"),
    ):
        with pytest.raises(ValueError, match=f"model.{said}.*Leave it out, or set it to "):
            routers.of(tf.LlamaConfig(), *settings)


def test_a_negative_weight_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.router_aux_loss: expected at least 0, got -0.1"):
        runs.recipe(tmp_path, "--model.router_aux_loss", "-0.1")
    with pytest.raises(ValueError, match=r"model.router_z_loss: expected at least 0, got -1.0"):
        runs.recipe(tmp_path, "--model.router_z_loss", "-1")
    with pytest.raises(ValueError, match=r"model.router_loss: expected one of transformers, jetmoe; got 'jet'"):
        runs.recipe(tmp_path, "--model.router_loss", "jet")


def test_a_mixture_without_such_a_loss_says_so():
    """DeepSeek-V3 balances by a bias that pre-training sets; its config has experts and no coefficient."""
    found = routers.of(tf.DeepseekV3Config(), None)
    assert found.line() == "router  256 experts, top 8, no aux loss (the model defines none)"
    with pytest.raises(ValueError, match=r"got DeepseekV3ForCausalLM: transformers defines none for it\. Leave it out"):
        routers.of(tf.DeepseekV3Config(), 0.1)
    assert routers.of(CONFIGS["mixtral"](), 0.0).line() == "router  4 experts, top 2, aux loss off"
    assert routers.of(CONFIGS["jetmoe"](), None, 0.001, "jetmoe").line() == (
        "router  4 experts, top 2, aux loss 0.01 x load balance, z loss 0.001 x logsumexp^2, summed over routers"
    )


def test_routers_that_are_not_returned_are_refused(monkeypatch):
    model = build("qwen3_moe", mlp_only_layers=[0, 1])
    with pytest.raises(ValueError, match=r"of Qwen3MoeForCausalLM, got none. Take another version .* set it to 0"):
        routers.attach(model, None)


def test_the_setting_is_written_down(tmp_path):
    run = train(recipe(tmp_path, "run", max_steps=1))
    assert "router_aux_loss: 0.01" in (run / "config.yaml").read_text()
    own = json.loads((tmp_path / "model/config.json").read_text())["router_aux_loss_coef"]
    default = recipe(tmp_path, "own", max_steps=1)
    default.model.router_aux_loss = None
    for name, weight in (("run", 0.01), ("own", own)):
        path = tmp_path / name if name == "run" else train(default)
        assert column(path, "loss")[0] - weight * column(path, "aux_loss")[0] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_dry_run_says_it(tmp_path, capsys, precision):
    dry_run(recipe(tmp_path, "run", "--optim.precision", precision), [])
    said = capsys.readouterr().out
    assert "\nrouter  4 experts, top 2, aux loss 0.01 x load balance\n" in said and "   ok\n" in said
