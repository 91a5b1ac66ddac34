# SPDX-License-Identifier: Apache-2.0
"""Runs that train an adapter, from the recipe to the merged folder."""

import json
import signal

import peft
import pytest
import torch
from safetensors.torch import load_file

import runs
import tiny
from fastpost.cli import main
from fastpost.hf import adapter, folder
from fastpost.train import checkpoint, export, loop, metrics
from fastpost.train.evaluate import evaluate_config
from fastpost.train.loop import train

LORA = ["--model.lora.rank", "4", "--model.lora.alpha", "32"]
WHOLE = ["--model.lora.train_embeddings", "true", "--model.lora.train_head", "true"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A DPO run of 6 steps with LoRA, embedding and head."""
    tmp = tmp_path_factory.mktemp("lora")
    train(runs.recipe(tmp, *LORA, *WHOLE, "--model.lora.dropout", "0.1", model={"tie": False}))
    return tmp


def outcome(run):
    return [(run / name).read_bytes() for name in ("metrics.jsonl", "adapter/adapter_model.safetensors")]


def test_it_learns_and_writes_only_the_adapter(finished):
    rows = [r for r in metrics.read(finished / "run/metrics.jsonl") if "loss" in r]
    assert rows[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-7) and rows[-1]["loss"] < 0.6
    assert not (finished / "run/model").exists()
    kept = runs.stored(finished / "run/checkpoints/step-000004", "model")
    assert all("lora_" in name or "modules_to_save" in name for name in kept)
    state = runs.stored(finished / "run/checkpoints/step-000004", "optimizer")
    assert {n.partition(".")[2] for n in state if n.startswith("exp_avg.")} == set(kept)
    assert sum(n.startswith("remainder.") for n in state) == len(kept)  # float32 masters
    wide = load_file(finished / "run/adapter/adapter_model.safetensors")
    moved = wide["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    assert moved.dtype == torch.float32 and not torch.equal(moved, moved.bfloat16().float())


def test_killed_and_started_again(finished, tmp_path):
    def cfg(*more):
        where = ["--train.output_dir", str(tmp_path / "run")]
        return runs.recipe(finished, *LORA, *WHOLE, "--model.lora.dropout", "0.1", *where, *more)

    assert runs.in_child(runs.killed_at(cfg(), loop, "train_step", 5)) == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"model\.lora\.rank is 4 there, 8 now"):
        train(cfg("--model.lora.rank", "8"))
    train(cfg())
    assert outcome(tmp_path / "run") == outcome(finished / "run")


def test_merge_in_every_precision(finished, tmp_path):
    """The merged logits stay within rounding: a few units in the last place of the dtype."""
    run, ids = finished / "run", torch.arange(5, 25)[None]
    before = adapter.load(run)(ids).logits
    for dtype, eps in (("fp32", 1e-5), ("fp16", 2**-10), ("bf16", 2**-7)):
        said = []
        out = export.export(run, tmp_path / dtype, merge=True, dtype=dtype, say=said.append)
        assert "check  merged: logits differ by" in said[0] and "largest logit difference" in said[1]
        merged = folder.load_model(out)
        assert export.difference(merged(ids).logits, before) < 4 * eps
        assert not (out / adapter.CONFIG).exists()
        before_keys, keys = (load_file(p / "model.safetensors").keys() for p in (finished / "model", out))
        assert before_keys == keys
        assert json.loads((out / "config.json").read_text())["dtype"] == str(export.DTYPES[dtype]).partition(".")[2]


def test_export_of_adapters_and_checkpoints(finished, tmp_path):
    quiet = lambda text: None  # noqa: E731
    run = finished / "run"
    out = export.export(run, tmp_path / "final", say=quiet)
    assert (out / adapter.WEIGHTS).read_bytes() == (run / "adapter" / adapter.WEIGHTS).read_bytes()
    four = load_file(export.export(run, tmp_path / "four", step=4, say=quiet) / adapter.WEIGHTS)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    assert 0 < (four[name] - load_file(out / adapter.WEIGHTS)[name]).abs().max() < 0.01
    export.export(run, tmp_path / "four merged", step=4, merge=True, say=quiet)
    other = export.export(out, tmp_path / "from an adapter", merge=True, say=quiet)
    direct = export.export(run, tmp_path / "from the run", merge=True, say=quiet)
    assert (other / "model.safetensors").read_bytes() == (direct / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is a whole model, there is no adapter to merge"):
        cfg = runs.recipe(finished, "--train.output_dir", str(tmp_path / "full"), "--train.max_steps", "1")
        export.export(train(cfg), tmp_path / "x", merge=True)
    with pytest.raises(ValueError, match="expected none for an adapter folder, got 4"):
        export.export(out, tmp_path / "x", step=4)


def test_a_merge_that_goes_wrong_is_not_kept(finished, tmp_path, monkeypatch):
    def half(model):  # merges, but forgets part of the scale
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] *= 0.99
        return model.merge_and_unload()

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "merged", half)
        with pytest.raises(ValueError, match=r"merging changed the logits by .*expected at most 1e-04"):
            export.export(finished / "run", tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()
    plain = folder.save_folder
    spoil = lambda model, *rest, **more: plain(model.apply(_shrink_norm), *rest, **more)  # noqa: E731
    monkeypatch.setattr(folder, "save_folder", spoil)
    with pytest.raises(ValueError, match="does not compute what the model did; it is removed"):
        export.export(finished / "run", tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def _shrink_norm(module):
    if type(module).__name__ == "LlamaRMSNorm":
        module.weight.data *= 0.9


def test_eval_and_generate_read_runs_and_adapters(finished, capsys):
    recipe = str(finished / "recipe.yaml")
    runs.recipe(finished, model={"tie": False})
    short = ["--max-new-tokens", "4", "--dtype", "fp32"]
    answers = []
    for model in (finished / "run", finished / "run/adapter", finished / "model"):
        assert main(["generate", str(model), "Hello", *short, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answers"])
        assert main(["eval", recipe, "--model", str(model), "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["loss"])
    assert answers[:2] == answers[2:4] and answers[1] < answers[5]
    last = [r for r in metrics.read(finished / "run/metrics.jsonl") if "eval_loss" in r][-1]
    assert answers[1] == pytest.approx(last["eval_loss"], abs=2e-3)
    assert answers[5] == pytest.approx(0.693147, abs=1e-6)


def test_an_adapter_goes_on_training(finished, tmp_path, capsys):
    """A second stage starts where the first ended, to the last bit of its float32 masters."""
    (tmp_path / "model").symlink_to(finished / "model")
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).symlink_to(finished / name)
    cfg = runs.recipe(tmp_path, "--model.path", str(finished / "run/adapter"), "--optim.lr", "0")
    train(cfg)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("check"))
    assert "reference = start" in line and line.endswith("ok")
    assert outcome(tmp_path / "run")[1] == outcome(finished / "run")[1]
    tree = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert tree["base_model_name_or_path"] == str((finished / "model").resolve()) and tree["r"] == 4
    cfg = runs.recipe(
        tmp_path, "--model.path", str(finished / "model"), "--model.adapter", str(finished / "run/adapter"),
        "--optim.lr", "0", "--train.output_dir", str(tmp_path / "named"),
    )  # fmt: skip
    train(cfg)
    assert outcome(tmp_path / "named") == outcome(tmp_path / "run")


def test_settings_that_contradict(finished, tmp_path):
    def message(*overrides):
        with pytest.raises(ValueError) as error:
            train(runs.recipe(finished, "--train.output_dir", str(tmp_path / "run"), *overrides))
        return str(error.value)

    path = str(finished / "run/adapter")
    assert "goes on training with its own rank, got 8. For a new adapter upon it, merge it first" in message(
        "--model.path", path, "--model.lora.rank", "8"
    )
    assert "is an adapter already" in message("--model.path", path, "--model.adapter", path)
    assert "no adapter_config.json, so this is not an adapter folder" in message(
        "--model.adapter", str(finished / "model")
    )
    assert "model.lora.train_head: expected false without a new adapter" in message("--model.lora.train_head", "true")
    assert "model.lora.dropout: expected at least 0 and below 1, got 1.0" in message("--model.lora.dropout", "1")
    assert "expected names of linear layers, got 'no_proj'" in message(*LORA, "--model.lora.targets", "no_proj")
    assert "unknown option --model.lora.rnk. Did you mean" in message("--model.lora.rnk", "1")


@pytest.mark.parametrize("precision", ["bf16", "fp32", "pure-bf16"])
def test_precisions_tied_and_with_a_low_rank_head(tmp_path, precision):
    """Untied with LoRA on the head; tied with embedding and head trained as one matrix."""
    for tie, settings in ((False, ["--model.lora.targets", "[q_proj, lm_head]"]), (True, WHOLE)):
        tmp = tmp_path / str(tie)
        tmp.mkdir()
        steps = ["--train.max_steps", "3", "--optim.precision", precision]
        train(runs.recipe(tmp, *LORA, *settings, *steps, model={"tie": tie}))
        rows = [r for r in metrics.read(tmp / "run/metrics.jsonl") if "loss" in r]
        assert rows[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-7) and rows[-1]["loss"] < 0.69
        out = export.export(tmp / "run", tmp / "out", merge=True, say=lambda text: None)
        before, after = (load_file(p / "model.safetensors") for p in (tmp / "model", out))
        assert before.keys() == after.keys()
        head = "model.embed_tokens.weight" if tie else "lm_head.weight"
        assert not torch.equal(before[head], after[head])


def test_training_with_lora_is_training_with_peft_alone(tmp_path):
    """Three AdamW steps of our loop and of a plain loop over peft's model and materialised logits."""
    rows = tiny.preference_rows(8)
    cfg = runs.recipe(
        tmp_path, *LORA, "--optim.precision", "fp32", "--train.epochs", "3", rows=8,
        optim={"lr": 3e-3, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": None},
    )  # fmt: skip
    assert len(rows) == 8 == cfg.train.batch_size
    train(cfg)
    ours = [r["loss"] for r in metrics.read(tmp_path / "run/metrics.jsonl") if "loss" in r]

    torch.manual_seed(cfg.train.seed)
    base = folder.load_model(tmp_path / "model", attention_name="sdpa")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear")).train()
    data = loop.load_data(cfg, tiny.tokenizer(), fastpost_dpo(), {"reference_logprob": "start"})["train"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)

    def margin():
        sums = []
        for example in data.examples:
            for s in example.sequences:
                logp = model(torch.tensor([list(s.ids)])).logits[0, :-1].log_softmax(-1)
                logp = logp.gather(1, torch.tensor(list(s.ids))[1:, None])[:, 0]
                sums.append((logp * torch.tensor(list(s.trained[1:]))).sum())
        return torch.stack(sums[0::2]) - torch.stack(sums[1::2])

    with torch.no_grad(), model.disable_adapter():
        reference = margin()
    theirs = []
    for _ in range(3):
        loss = -torch.nn.functional.logsigmoid(0.1 * (margin() - reference)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, abs=2e-5) and theirs[-1] < theirs[0] - 0.01


def fastpost_dpo():
    from fastpost.objectives import DPO

    return DPO()


def test_a_run_without_a_result_yet(finished, tmp_path):
    cfg = runs.recipe(finished, *LORA, "--train.output_dir", str(tmp_path / "run"))
    assert runs.in_child(runs.killed_at(cfg, checkpoint, "save", 1, after=True)) == -signal.SIGKILL
    with pytest.raises(ValueError, match="this run is not finished"):
        evaluate_config(cfg, tmp_path / "run")
    out = export.export(tmp_path / "run", tmp_path / "out", say=lambda text: None)
    assert (out / adapter.CONFIG).is_file()
