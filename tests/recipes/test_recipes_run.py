# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe runs as it is and begins where its formula says."""

import json
import math
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file

import tiny
from fastpost import cli
from fastpost.cli.recipes import GPU, recipes
from fastpost.data.collate import IGNORE
from fastpost.data.mixture import Mixture
from fastpost.hf import int4_lora, smollm2
from fastpost.nn import Int4Linear, ShiftedInt4Linear
from fastpost.train.forward import forward, load_policy
from fastpost.train.plan import Plan
from shipped import LONG, Run, logprob, plain_model, scored, token_logprobs

SMALL = [name for name in recipes() if not name.endswith(GPU)]
ONE = ("--train.batch_size", "1")  # then logged means are those of one pair, and the formula can be read off them
LN2 = math.log(2)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The tiny model and one cache for all recipes of this file."""
    place = tmp_path_factory.mktemp("recipes")
    tiny.folder(place / "model")
    tiny.folder(place / "other", seed=3)
    tiny.folder(place / "jetmoe", "jetmoe")
    return place


@pytest.fixture
def run(shared, tmp_path, monkeypatch, capfd):
    """run(name, *overrides): `recipes cp`, then `train`; returns the Run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
    monkeypatch.setattr(smollm2, "fetch", lambda: shared / "model")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)

    def go(name: str, *overrides: str) -> Run:
        short = ["--train.max_steps", "3", "--data.eval_limit", "4", "--optim.precision", "fp32", "--log.plot", "false"]
        text = recipes()[name].read_text()
        if "pack:" not in text:
            short += [*LONG[: 2 if "max_prompt_length" not in text else 4], "--data.limit", "24"]
        assert cli.main(["recipes", "cp", name]) == 0
        status = cli.main(["train", f"{name}.yaml", *short, *overrides])
        seen = capfd.readouterr()
        assert status == 0, seen.err
        return Run(name, tmp_path / "runs" / name, seen.out)

    return go


# ---- what each recipe must show --------------------------------------------------------------------------------------


def at_its_closed_form(value):
    def check(r: Run):
        assert r.first["loss"] == pytest.approx(value, rel=1e-6)
        assert r.objective.initial_loss() == pytest.approx(value)
        assert "   ok" in r.out
        assert r.steps[-1]["loss"] != pytest.approx(value, rel=1e-6)  # it moves

    return check


def kto(r: Run):
    at_its_closed_form(0.5)(r)
    assert r.first["kl"] == 0 and all("kl" in step for step in r.steps)  # nothing has moved yet


def simpo(r: Run):
    o, (chosen, rejected) = r.objective, means(r)
    z = o.beta * (chosen - rejected - o.gamma_beta_ratio)
    assert r.first["loss"] == pytest.approx(math.log1p(math.exp(-z)) - o.sft_weight * chosen, rel=1e-5)
    assert r.first["rewards/margins"] == pytest.approx(o.beta * (chosen - rejected), abs=1e-5)


def orpo(r: Run):
    (w, l) = means(r)
    odds = (w - l) - (math.log1p(-math.exp(w)) - math.log1p(-math.exp(l)))
    assert r.first["loss"] == pytest.approx(-w + r.objective.beta * math.log1p(math.exp(-odds)), rel=1e-5)


def cpo(r: Run):
    z = r.objective.beta * (r.first["logps/chosen"] - r.first["logps/rejected"])
    assert r.first["loss"] == pytest.approx(math.log1p(math.exp(-z)) - r.objective.cpo_alpha * means(r)[0], rel=1e-5)


def means(r: Run) -> list[float]:
    """Mean log-probs of the one pair of the first step: the logged sums over the lengths; plain transformers agrees."""
    logged = [r.first[f"logps/{which}"] / s.trained.count(1) for which, s in zip(("chosen", "rejected"), r.sequences)]
    assert logged == pytest.approx([scored(r.start, s).mean().item() for s in r.sequences], rel=1e-5)
    return logged


def refuel(r: Run):
    differences = [row["chosen_reward"] - row["rejected_reward"] for row in r.rows]
    expected = r.objective.eta**2 * sum(d**2 for d in differences) / len(differences)
    assert min(differences) >= 1 and r.first["loss"] == pytest.approx(expected, rel=1e-5)
    tokenizer = tiny.tokenizer()
    for row, example in zip(r.rows, r.examples):
        for side, s in zip((row["chosen"], row["rejected"]), example.sequences):
            answers = [m["content"] for m in side if m["role"] == "assistant"]
            trained = tokenizer.decode([t for t, on in zip(s.ids, s.trained) if on])
            assert trained == answers[row["turn"]] + "<|im_end|>"


def sft(r: Run):
    """The mean over reply tokens, found by rendering with and without the reply."""
    total, count, tokenizer = 0.0, 0, tiny.tokenizer()
    for row in r.rows:
        text = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=g)
                for m, g in ((row["messages"][:-1], True), (row["messages"], False))]  # fmt: skip
        prompt, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in text)
        reply = token_logprobs(r.start, whole[:-1])[len(prompt) - 1 :]  # without the template's last line break
        total, count = total - reply.sum().item(), count + len(reply)
    assert r.first["loss"] == pytest.approx(total / count, rel=1e-5)
    assert prompt_label_counts(r) is False


def full_text(r: Run):
    each = [token_logprobs(r.start, s.ids) for s in r.sequences]
    assert r.first["loss"] == pytest.approx(-torch.cat(each).mean().item(), rel=1e-5)
    assert prompt_label_counts(r) is True


def prompt_label_counts(r: Run) -> bool:
    """Whether a label inside the question is there to be changed, and changes the loss."""
    batch = r.data.batch([r.plan.rows(0)[0]])
    if batch.target[8] == IGNORE:
        return False
    model = load_policy(r.cfg, torch.device("cpu")).eval()
    before = forward(model, batch, r.objective).loss.item()
    batch.target[8] = (batch.target[8] + 1) % 300
    return abs(forward(model, batch, r.objective).loss.item() - before) > 1e-4


def two_part(r: Run):
    alpha, losses = r.objective.alpha, []
    for s in r.sequences:
        first = int(sum(s.trained[: s.split]))
        lp = scored(r.start, s)
        losses.append(-(1 - alpha) * lp[:first].mean().item() - alpha * lp[first:].mean().item())
    assert r.first["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def anita_dpo(r: Run):
    at_its_closed_form(LN2)(r)
    assert "check  reference = base" in r.out
    config = json.loads((r.path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (64, 16, True)
    model = load_policy(r.cfg, torch.device("cpu"))
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scales == {16 / math.sqrt(64)}
    assert {m.scheme for m in model.modules() if isinstance(m, Int4Linear)} == {"nf4"}


def ir_qlora(r: Run):
    """The loss of the dequantised base, by plain transformers: the adapter changes nothing yet, its connections too."""
    policy = load_policy(r.cfg, torch.device("cpu"))
    shifted = [m for m in policy.modules() if isinstance(m, ShiftedInt4Linear)]
    assert len(shifted) == 14 and all(m.shift.abs().max() > 0 for m in shifted)
    base = int4_lora.dequantized(policy.unload()).eval()
    base.set_attn_implementation("eager")
    each = torch.cat([scored(base, s) for s in r.sequences])
    assert r.first["loss"] == pytest.approx(-each.mean().item(), rel=1e-4)
    assert prompt_label_counts(r) is False
    trained = load_file(r.path / "adapter" / "adapter_model.safetensors")
    assert sum(t.abs().max() > 0 for name, t in trained.items() if "connection_out" in name) == 14


def shares(*expected):
    """Each source has its share of every epoch to within half a block, and blocks are whole."""

    def check(r: Run):
        mixture = r.plan.mixture
        assert mixture.ratios == pytest.approx(expected)
        assert set(r.data.examples.tokens.tolist()) == {r.cfg.data.max_length}
        for epoch in range(4):
            rows = mixture.epoch(epoch)
            total = r.cfg.data.epoch_tokens
            for part, share in zip(r.data.parts, expected):
                got = r.data.examples.tokens[rows[(rows >= part.start) & (rows < part.stop)]].sum()
                assert abs(int(got) - share * total) <= r.cfg.data.max_length / 2

    return check


def syne(r: Run):
    shares(0.1, 0.7, 0.2)(r)
    part, rows = r.data.parts[2], r.plan.mixture.epoch(0)
    own = rows[(rows >= part.start) & (rows < part.stop)].tolist()
    assert own == sorted(own)  # the curriculum: in file order
    full = whole_plan(r)
    total, warm = full.steps, full.warmup
    assert (total, warm) == (32, 4)
    for s in range(total):
        factor = max(0.1, (total - s) / (total - 0.8 * total)) if s > 0.8 * total else min(1.0, (s + 1) / warm)
        assert full.lr(s) == pytest.approx(5e-5 * factor)
    assert full.lr(31) == pytest.approx(5e-5 / 6.4)


def me_llama(r: Run):
    shares(0.75, 0.05, 0.20)(r)
    cosine(whole_plan(r), 5e-5, warmup=2, total=32)


def stability_gap(r: Run):
    shares(0.82, 0.18)(r)
    cosine(whole_plan(r), 5e-5, warmup=4, total=32)
    dynamic = [sorted(r.plan.mixture.epoch(e).tolist()) for e in range(3)]
    fixed = Mixture(r.data, seed=0, tokens=r.cfg.data.epoch_tokens, fixed=True)
    assert dynamic[0] != dynamic[1] != dynamic[2]
    assert sorted(fixed.epoch(0).tolist()) == sorted(fixed.epoch(2).tolist())


def cosine(plan, lr, warmup, total):
    assert (plan.warmup, plan.steps) == (warmup, total)
    assert plan.lr(warmup) == pytest.approx(lr)
    for s in range(warmup, total):
        assert plan.lr(s) == pytest.approx(lr * (1 + math.cos(math.pi * (s - warmup) / (total - warmup))) / 2)
    assert plan.lr(total) == pytest.approx(0, abs=1e-12)


def whole_plan(r: Run):
    """The plan without this test's limit on steps, checked against the rates that were logged where they agree."""
    r.cfg.train.max_steps = None
    return Plan(r.cfg, r.data)


def chocollama(r: Run):
    plan = whole_plan(r)
    assert [plan.lr(8 * k) for k in range(4)] == pytest.approx([3e-4 * 0.85**k for k in range(4)])
    assert plan.lr(7) == plan.lr(0)
    assert [s["learning_rate"] for s in r.steps] == [3e-4] * 3
    model = load_policy(r.cfg, torch.device("cpu"))
    forward(model, r.data.batch([0, 1]), r.objective).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("embed_tokens.modules_to_save" in name for name in moved)
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    assert sum("lora_B" in name for name in moved) == 7 * 2  # A's gradient is 0 while B is
    before, after = r.start.get_input_embeddings().weight, load_file(r.path / "adapter" / "adapter_model.safetensors")
    (trained,) = (t for name, t in after.items() if "embed_tokens" in name)
    assert not torch.equal(before, trained)
    assert len(r.sequences[0]) == 128


def jetmoe_pretrain(r: Run):
    """Plain transformers' random start; three stages, in the last of which the worked problems come in."""
    torch.manual_seed(r.cfg.train.seed)
    start = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(r.cfg.model.path))
    each = torch.cat([token_logprobs(start.eval(), s.ids) for s in r.sequences])
    assert routers_apart(r)[0] == pytest.approx(-each.mean().item(), rel=1e-5)
    assert prompt_label_counts(r) is True
    plan = whole_plan(r)
    assert (plan.steps, plan.warmup) == (300, 15)
    assert [plan.lr(s) / 5e-4 for s in (0, 14, 240, 270)] == pytest.approx([0.1 + 0.9 / 15, 1, 1, 0.1**0.5])
    assert plan.lr(299) == pytest.approx(5e-5, rel=0.05)
    for steps, shares in ((range(240), (0.4, 0.3, 0.3)), (range(240, 300), (0.1, 0.2, 0.7))):
        rows = [row for s in steps for row in plan.rows(s)]
        assert len(rows) == 8 * len(steps)
        got = [sum(p.start <= row < p.stop for row in rows) / len(rows) for p in r.data.parts]
        assert got == pytest.approx(shares, abs=1 / len(rows))


def jetmoe_sft(r: Run):
    each = torch.cat([scored(r.start, s) for s in r.sequences])
    assert routers_apart(r)[0] == pytest.approx(-each.mean().item(), rel=1e-5)
    assert prompt_label_counts(r) is False


def jetmoe_dpo(r: Run):
    assert routers_apart(r)[0] == pytest.approx(LN2, abs=1e-5)
    assert "   ok" in r.out and routers_apart(r)[-1] != pytest.approx(LN2, abs=1e-9)


def routers_apart(r: Run) -> list[float]:
    """The objective's own losses: without the routers', which are sums over the 12 routers of the small JetMoE."""
    assert all(12 <= step["aux_loss"] < 24 and step["z_loss"] > 12 for step in r.steps)
    assert all(0 <= step["router/load_min"] < 1 < step["router/load_max"] <= 4 for step in r.steps)
    return [step["loss"] - 0.01 * step["aux_loss"] - 0.001 * step["z_loss"] for step in r.steps]


BEFORE = {"jetmoe-sft": ("jetmoe-pretrain",), "jetmoe-dpo": ("jetmoe-pretrain", "jetmoe-sft")}
"""Recipes that go on from another's run."""
CHECKS = {
    "jetmoe-pretrain": (jetmoe_pretrain, ()),
    "jetmoe-sft": (jetmoe_sft, ()),
    "jetmoe-dpo": (jetmoe_dpo, ()),
    "simpo": (simpo, ONE),
    "quickstart": (simpo, ONE),
    "orpo": (orpo, ONE),
    "cpo": (cpo, ONE),
    "dpo": (at_its_closed_form(LN2), ()),
    "ln-dpo": (at_its_closed_form(LN2), ()),
    "ipo": (at_its_closed_form(1.0), ()),
    "kto": (kto, ()),
    "inpo": (at_its_closed_form(100.0), ()),
    "refuel": (refuel, ()),
    "sft": (sft, ()),
    "sft-full-text": (full_text, ()),
    "two-part-sft": (two_part, ()),
    "anita-sft": (full_text, ()),
    "anita-dpo": (anita_dpo, ()),
    "ir-qlora": (ir_qlora, ("--model.lora.rank", "16")),  # the tiny model is narrower than the real one's rank
    "cpt-syne": (syne, ()),
    "cpt-me-llama": (me_llama, ()),
    "cpt-stability-gap": (stability_gap, ()),
    "chocollama": (chocollama, ()),
}


@pytest.mark.parametrize("name", SMALL)
def test_it_runs_as_it_is(run, name):
    check, overrides = CHECKS[name]
    for first in BEFORE.get(name, ()):
        run(first, "--data.eval", "none", "--train.max_steps", "1", *ONE)
    r = run(name, *overrides)
    assert len(r.steps) == 3 and all(math.isfinite(s["loss"]) and s["grad_norm"] > 0 for s in r.steps)
    assert any("eval_loss" in line for line in (r.path / "metrics.jsonl").read_text().splitlines())
    check(r)


@pytest.mark.parametrize("name", SMALL)
def test_its_data_can_be_looked_at(shared, monkeypatch, capsys, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
    monkeypatch.setattr(smollm2, "fetch", lambda: shared / "model")
    text = recipes()[name].read_text()
    long = [] if "pack:" in text else [*LONG[: 2 if "max_prompt_length" not in text else 4], "--data.limit", "24"]
    long += ["--model.path", "built-in/jetmoe-small"] if name in BEFORE else []
    assert cli.main(["data", str(recipes()[name]), *long]) == 0
    out = capsys.readouterr().out
    assert "[[" in out and "warning" not in out and "dropped 0" in out
    assert ("wanted" in out) == ("epoch_tokens:" in text)


MODEL = {"jetmoe-pretrain": "built-in/jetmoe-small", "jetmoe-sft": "jetmoe", "jetmoe-dpo": "jetmoe"}
FORM = {"kto": "marks", "refuel": "dialogues", "sft": "pairs", "two-part-sft": "parts", "anita-sft": "chats",
        "ir-qlora": "chats", "jetmoe-sft": "chats"}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in recipes() if name.endswith(GPU)])
def test_the_second_file_trains_too(shared, tmp_path, monkeypatch, capfd, name):
    """One step of the authors' settings, with a tiny model, few rows and short sequences."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
    monkeypatch.setattr(smollm2, "fetch", lambda: shared / "model")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "cp", name.removesuffix(GPU), "--gpu", "r.yaml"]) == 0
    text = (tmp_path / "r.yaml").read_text()
    overrides = ["--train.max_steps", "1", "--train.batch_size", "4", "--log.plot", "false"]
    form = FORM.get(name.removesuffix(GPU), "texts" if "pack:" in text or "full-text" in name else "pairs")
    if "\n      ratio:" in text:
        for file in re.findall(r"path: (\S+\.jsonl)", text):
            text = text.replace(file, "built-in/word-problems/texts/train.jsonl")
        (tmp_path / "r.yaml").write_text(text)
    else:
        overrides += ["--data.train", f"built-in/word-problems/{form}/train.jsonl"]
    if "pack:" in text:
        overrides += ["--data.max_length", "64", "--data.epoch_tokens", "4096"]
    else:
        overrides += [*LONG[: 2 if "max_prompt_length" not in text else 4], "--data.limit", "8"]
    if name == "ir-qlora-gpu":
        overrides += ["--model.lora.rank", "16"]
    if name == "sft-gpu":
        overrides += ["--data.columns", "{completion: chosen}"]
    if name == "inpo-gpu":
        overrides += ["--model.reference", "start", "--model.previous", "start"]
    if "adamw8bit" in text:
        pytest.importorskip("bitsandbytes")
    model = MODEL.get(name.removesuffix(GPU), "built-in/smollm2")
    model = str(shared / model) if (shared / model).is_dir() else model
    assert cli.main(["train", "r.yaml", "--model.path", model, *overrides]) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    assert "step  1/1" in out and "WARNING" not in out


def test_a_later_iteration_of_inpo_reads_two_frozen_models(run, shared):
    """Reference and previous differ, each by plain transformers; policy and previous are the same at first."""
    r = run("inpo", "--model.reference", str(shared / "other"))
    old, eta, ratio, losses = plain_model(shared / "other"), r.objective.eta, r.objective.ratio, []
    for e in r.examples:
        now, ref = ([logprob(m, s) for s in e.sequences] for m in (r.start, old))
        h = (now[0] - now[1]) * ratio - ratio * (ref[0] - ref[1])
        losses.append((h - 1 / (2 * eta)) ** 2)
    assert r.first["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_anita_goes_from_stage_to_stage(run, tmp_path):
    run("anita-sft")
    assert cli.main(["export", "runs/anita-sft", "anita-merged", "--merge"]) == 0
    r = run("anita-dpo", "--model.path", str(tmp_path / "anita-merged"))
    assert r.first["loss"] == pytest.approx(LN2, abs=1e-6)
    assert not torch.equal(plain_model(tmp_path / "anita-merged").model.layers[0].mlp.up_proj.weight,
                           plain_model(smollm2.fetch()).model.layers[0].mlp.up_proj.weight)  # fmt: skip
