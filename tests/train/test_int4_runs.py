# SPDX-License-Identifier: Apache-2.0
"""Runs that train an adapter upon a base model in four bits, QLoRA and IR-QLoRA: from the recipe to the merged
folder."""

import json
import math
import signal

import pytest
import torch
from safetensors.torch import load_file

import launch
import runs
from fastpost.cli import main
from fastpost.hf import adapter, folder, int4_lora, load_int4, save_int4
from fastpost.nn import Int4Linear, ShiftedInt4Linear, quantize_linears
from fastpost.train import export, loop, metrics
from fastpost.train.config import load_config
from fastpost.train.evaluate import evaluate_config
from fastpost.train.forward import load_policy
from fastpost.train.loop import train

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tie": False}
LORA = ["--model.lora.rank", "8", "--model.lora.alpha", "16", "--model.lora.rslora", "true"]
NF4 = ["--model.quantize.scheme", "nf4", "--model.quantize.double_quant", "true", "--model.reference", "base"]
KINDS = {
    "nf4": NF4,
    "symmetric": ["--model.quantize.scheme", "symmetric", "--model.quantize.group_size", "32"],
    "ir": [*NF4, "--model.quantize.shift", "true", "--model.lora.connections", "true"],
}

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(tmp, *overrides):
    return runs.recipe(tmp, *LORA, *overrides, model=SIZES)


@pytest.fixture(scope="module", params=KINDS)
def finished(request, tmp_path_factory):
    """(folder, kind) of a DPO run of 6 steps."""
    tmp = tmp_path_factory.mktemp("int4")
    train(recipe(tmp, *KINDS[request.param]))
    return tmp, request.param


def steps(run):
    return [r for r in metrics.read(run / "metrics.jsonl") if "loss" in r]


def test_it_begins_at_ln_2_and_learns(finished):
    tmp, kind = finished
    rows = steps(tmp / "run")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and rows[-1]["loss"] < 0.65
    said = json.loads((tmp / "run/adapter/fastpost.json").read_text())
    assert said["base"]["scheme"] == ("symmetric" if kind == "symmetric" else "nf4")
    assert said["connections"] == (kind == "ir")
    trained = load_file(tmp / "run/adapter/adapter_model.safetensors")
    assert sum(t.abs().max() > 0 for t in trained.values()) == (56 if kind == "ir" else 28)
    assert all(t.dtype == torch.float32 for t in trained.values())
    kept = runs.stored(tmp / "run/checkpoints/step-000004", "model")
    assert kept and all("lora_" in name for name in kept)


def test_killed_and_started_again(finished, tmp_path):
    tmp, kind = finished
    cfg = recipe(tmp, *KINDS[kind], "--train.output_dir", str(tmp_path / "run"))
    assert runs.in_child(runs.killed_at(cfg, loop, "train_step", 5)) == -signal.SIGKILL
    train(cfg)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp / "run" / name).read_bytes()


def test_the_adapter_finds_its_base_again(finished):
    """Evaluation and loading quantise the base as training did."""
    tmp, kind = finished
    model = adapter.load(tmp / "run")
    layers = [m for m in model.modules() if isinstance(m, Int4Linear)]
    assert len(layers) == 14 and all(isinstance(m, ShiftedInt4Linear) == (kind == "ir") for m in layers)
    recipe(tmp, *KINDS[kind])
    last = [r for r in metrics.read(tmp / "run/metrics.jsonl") if "eval_loss" in r][-1]
    cfg = load_config(tmp / "run/config.yaml")
    assert evaluate_config(cfg, str(tmp / "run"))["loss"] == pytest.approx(last["eval_loss"], abs=2e-3)
    assert evaluate_config(cfg, None)["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_merged_and_requantized(finished, tmp_path, capsys):
    tmp, kind = finished
    run, ids = tmp / "run", torch.arange(5, 25)[None]
    before = adapter.load(run)(ids).logits
    said = []
    out = export.export(run, tmp_path / "merged", merge=True, dtype="fp32", say=said.append)
    assert "check  merged: logits differ by" in said[0]
    merged = folder.load_model(out)
    assert not any(isinstance(m, Int4Linear) for m in merged.modules())
    assert export.difference(merged(ids).logits, before) < 1e-4
    assert load_file(out / "model.safetensors").keys() == load_file(tmp / "model/model.safetensors").keys()
    out = export.export(run, tmp_path / "original", original=True, dtype="fp32", say=said.append)
    assert "check  upon the original weights: logits differ by" in said[2]
    original = adapter.moved(adapter.load(run), folder.load_model(tmp / "model"), quantize=False).eval()
    assert export.difference(folder.load_model(out)(ids).logits, original(ids).logits) < 1e-4
    with pytest.raises(ValueError, match="expected one of --original and --requantize"):
        export.export(run, tmp_path / "both", original=True, requantize=True)
    if kind == "ir":
        with pytest.raises(ValueError, match="expected layers without shifts, which no folder holds"):
            export.export(run, tmp_path / "again", requantize=True, say=said.append)
        assert not (tmp_path / "again").exists()
        return
    assert main(["export", str(run), str(tmp_path / "again"), "--requantize"]) == 0
    printed = capsys.readouterr().out
    assert "check  four bits again: relative error of the weights 0.0" in printed and "loaded again" in printed
    again = load_int4(tmp_path / "again", torch.float32)
    assert sum(isinstance(m, Int4Linear) for m in again.modules()) == 14
    assert 1e-4 < export.difference(again(ids).logits, before) < 1


def test_the_adapter_goes_on_training(finished, tmp_path):
    tmp, kind = finished
    model = ["--model.path", str(tmp / "run/adapter"), "--model.reference", "start", "--train.max_steps", "1"]
    cfg = runs.recipe(tmp, *model, "--train.output_dir", str(tmp_path / "more"), model=SIZES)
    train(cfg)
    assert steps(tmp_path / "more")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    first, second = (json.loads((r / "adapter/fastpost.json").read_text()) for r in (tmp / "run", tmp_path / "more"))
    assert first == second
    other = "asymmetric" if kind == "symmetric" else "symmetric"
    with pytest.raises(ValueError, match=r"model.quantize: expected BaseFormat.*was trained, got"):
        load_policy(runs.recipe(tmp, *model, "--model.quantize.scheme", other, model=SIZES), torch.device("cpu"))


# ---- folders that are in four bits already ---------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["fastpost", "gptq"])
def test_upon_a_quantised_folder(format, tmp_path):
    cfg = recipe(tmp_path)
    model = folder.load_model(tmp_path / "model", torch.float32)
    quantize_linears(model, group_size=32, scheme="asymmetric", scales_dtype=torch.float16)
    quantised = save_int4(model, tmp_path / "four", format=format, tokenizer=tmp_path / "model")
    cfg = recipe(tmp_path, "--model.path", str(quantised), "--model.reference", "base")
    train(cfg)
    rows = steps(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and rows[-1]["loss"] < 0.65
    assert not (tmp_path / "run/adapter/fastpost.json").exists()
    ids, before = torch.arange(5, 25)[None], adapter.load(tmp_path / "run")
    like, before = int4_lora.formats(before), before(torch.arange(5, 25)[None]).logits
    merged = folder.load_model(export.export(tmp_path / "run", tmp_path / "merged", merge=True, dtype="fp32"))
    assert export.difference(merged(ids).logits, before) < 1e-4
    assert not folder.is_quantized(tmp_path / "merged")
    again = load_int4(export.export(tmp_path / "run", tmp_path / "again", requantize=True, dtype="fp32"))
    assert {n: m.scheme for n, m in int4_lora.formats(again).items()} == {n: m.scheme for n, m in like.items()}
    with pytest.raises(ValueError, match=r"scheme: expected none, because .* is in four bits already, got nf4"):
        load_policy(recipe(tmp_path, "--model.path", str(quantised), *NF4), torch.device("cpu"))
    with pytest.raises(ValueError, match="expected an adapter upon a base model in four bits"):
        load_policy(recipe(tmp_path, "--model.path", str(quantised), "--model.lora.rank", "0"), torch.device("cpu"))


REFUSED = [
    (["--model.quantize.scheme", "fp4"], "model.quantize.scheme: expected one of none, nf4, symmetric, asymmetric"),
    (["--model.quantize.scheme", "nf4", "--model.quantize.group_size", "48"], "expected 32, 64, 128 or -1"),
    (["--model.quantize.double_quant", "true"], "double_quant: expected false with the scheme none"),
    (["--model.quantize.scheme", "symmetric", "--model.quantize.shift", "true"], "shift: expected false"),
    (["--model.lora.connections", "true", "--model.lora.rank", "0"], "connections: expected false without a new"),
]


@pytest.mark.parametrize("overrides, message", REFUSED)
def test_settings_that_do_not_fit(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, *overrides)


def test_without_an_adapter_it_is_refused(tmp_path):
    cfg = runs.recipe(tmp_path, *NF4[:2], model=SIZES)
    with pytest.raises(ValueError, match=r"model.quantize: expected an adapter .*Set model.lora.rank"):
        train(cfg)


def test_dry_run_and_memory(tmp_path, capsys):
    """Shapes go through four-bit layers, and what is counted are weights, not bytes."""
    recipe(tmp_path)
    counted = []
    for quantize in ([], NF4):
        assert main(["train", str(tmp_path / "recipe.yaml"), "--dry-run", *LORA, *quantize]) == 0
        out = capsys.readouterr().out
        counted.append(next(line.split(",")[1] for line in out.splitlines() if line.startswith("model ")))
        counted.append(next(line.rpartition(",")[2] for line in out.splitlines() if line.startswith("steps ")))
    assert counted[0] == counted[2] and counted[1] == counted[3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "ir"])
def test_two_ranks_hold_half_the_codes_each(kind, tmp_path):
    """FSDP2 over gloo: the losses of one process up to rounding, and the adapter whole at the end."""

    def cfg(name, *more):
        overrides = [*KINDS[kind], "--optim.precision", "fp32", "--train.output_dir", str(tmp_path / name), *more]
        return recipe(tmp_path, *overrides)

    train(cfg("alone"))
    shared = cfg("fsdp", "--train.parallel", "fsdp")
    assert launch.Forked(lambda: train(shared), 2).wait() == [0, 0]
    assert (launch.losses(tmp_path / "fsdp") - launch.losses(tmp_path / "alone")).abs().max() < 1e-3
    one, two = (load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("alone", "fsdp"))
    assert one.keys() == two.keys() and all(one[k].shape == two[k].shape for k in one)
    first, second = (json.loads((tmp_path / n / "adapter/fastpost.json").read_text()) for n in ("alone", "fsdp"))
    assert first == second
