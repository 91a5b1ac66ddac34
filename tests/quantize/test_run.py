# SPDX-License-Identifier: Apache-2.0
"""Whole models through every method: folders that load, notes that tell the truth, runs that go on where they ended."""

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from fastpost.hf.perplexity import load, perplexity
from fastpost.quantize import run
from fastpost.quantize.blocks import Blocks
from fastpost.quantize.layer_files import Layer, read_layer, write_layer
from fastpost.quantize.methods import METHODS, settings
from fastpost.quantize.nf4 import nf4
from fastpost.quantize.output import NOTE, read_note
from fastpost.quantize.run import quantize_model, streamed_losses

G = torch.Generator().manual_seed(0)
ROWS, HELD_OUT = torch.randint(7, 320, (6, 40), generator=G), torch.randint(7, 320, (3, 40), generator=G)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Linear layers of 32, 64 and 32 columns: groups of 32 divide them."""
    return tiny.folder(tmp_path_factory.mktemp("model") / "m", intermediate_size=64)


def one(method, format=None, **options):
    group_size = None if METHODS[method].group_size is None else 32
    return settings(method, None, group_size, format, **options)


def agrees(out, result):
    """The folder, loaded as anyone loads it, has the perplexity that was measured block by block."""
    loaded = perplexity(load(out, torch.float32), torch.cat(list(HELD_OUT)), 40, 40)
    assert loaded.tokens == result.after[1]
    assert loaded.loss == pytest.approx(result.after[0], rel=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_folder(model, tmp_path, method):
    result = quantize_model(model, tmp_path / "out", one(method), ROWS, HELD_OUT)
    assert result.matrices == 14 and result.resumed == 0 and 0 < result.error < 0.8
    note = read_note(tmp_path / "out")
    assert note["method"] == method and note["bits"] == pytest.approx(result.bits, abs=1e-3)
    assert note["code_bits"] <= note["bits"] and note["perplexity"]["tokens"] == result.before[1]
    assert not (tmp_path / "out.partial").exists()
    agrees(tmp_path / "out", result)
    names = {f.name for f in model.iterdir() if f.suffix != ".safetensors"} | {NOTE, "model.safetensors"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="already exists"):
        quantize_model(model, tmp_path / "out", one(method), ROWS, HELD_OUT)
    with pytest.raises(ValueError, match=f"quantised already \\({method}\\)"):
        quantize_model(tmp_path / "out", tmp_path / "twice", one("rtn"))


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("format", ["fastpost", "gptq", "awq"])
def test_four_bit_formats(model, tmp_path, method, format):
    result = quantize_model(model, tmp_path / "out", one(method, format), ROWS, HELD_OUT)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == format
    agrees(tmp_path / "out", result)


def test_act_order_and_double_quant_are_stored(model, tmp_path):
    for how, name in ((one("gptq", act_order=True), "a"), (one("gptq", "gptq", act_order=True, symmetric=True), "b"),
                      (one("nf4", double_quant=True), "c")):  # fmt: skip
        agrees(tmp_path / name, quantize_model(model, tmp_path / name, how, ROWS, HELD_OUT))


def test_bf16_keeps_the_keys(model, tmp_path):
    quantize_model(model, tmp_path / "out", one("gptq", "bf16"), ROWS)
    before, after = Blocks(model).stored, Blocks(tmp_path / "out").stored
    assert {k: e["shape"] for k, e in before.entries.items()} == {k: e["shape"] for k, e in after.entries.items()}
    assert after.get("model.layers.1.mlp.up_proj.weight").dtype == torch.bfloat16
    assert torch.equal(after.get("model.norm.weight"), before.get("model.norm.weight"))


def test_rtn_is_rtn_of_each_matrix(model, tmp_path):
    """And what is not a linear layer of a block is left alone."""
    quantize_model(model, tmp_path / "out", settings("rtn", 3, 16), None)
    before, after = Blocks(model).stored, Blocks(tmp_path / "out").stored
    for key in before.entries:
        weight = before.get(key)
        if "_proj" in key:
            from fastpost.quantize.grid import Grid
            from fastpost.quantize.rtn import rtn

            weight = rtn(weight, Grid(3), 16).weight.bfloat16()
        assert torch.equal(after.get(key).float(), weight.float()), key


def test_calibration_follows_the_quantised_blocks(model, tmp_path):
    """The second block's Hessian comes from the first one as it is stored."""
    how = one("gptq", "bf16")
    quantize_model(model, tmp_path / "whole", how, ROWS)
    blocks, seen = Blocks(model), Blocks(tmp_path / "whole")
    hidden = list(seen.run(0, seen.block(0), seen.start(ROWS)))
    blocks.start(ROWS)
    block = blocks.block(1)
    inputs = run.Inputs(block)
    with inputs.gathered():
        list(blocks.run(1, block, hidden))
    made = run.quantize_matrix(how, "x", block.mlp.down_proj.weight, inputs.of("mlp.down_proj").hessian)
    assert torch.equal(made.weight.bfloat16(), seen.stored.get("model.layers.1.mlp.down_proj.weight"))


def test_calibrated_methods_change_the_output_less(tmp_path):
    """A model in which some channels are large, as in real ones: with three bits, what the blocks give is nearer to the
    exact model's with GPTQ and with AWQ than with plain rounding."""
    model = tiny.folder(tmp_path / "m", intermediate_size=64)
    state = load_file(model / "model.safetensors")
    for key, tensor in state.items():
        if "layernorm" in key:
            tensor[:4] = 6.0
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    rows, errors = torch.randint(7, 320, (24, 64), generator=torch.Generator().manual_seed(1)), {}

    def outputs(path):
        blocks = Blocks(path)
        hidden = blocks.start(HELD_OUT)
        for i in range(len(blocks)):
            hidden = list(blocks.run(i, blocks.block(i), hidden))
        return torch.cat(hidden)

    want = outputs(model)
    for method in ("rtn", "gptq", "awq"):
        quantize_model(model, tmp_path / method, settings(method, 3, 32, "bf16"), None if method == "rtn" else rows)
        errors[method] = float((outputs(tmp_path / method) - want).norm() / want.norm())
    assert errors["gptq"] < 0.95 * errors["rtn"] and errors["awq"] < 0.95 * errors["rtn"], errors


@pytest.mark.parametrize("method", ["gptq", "awq", "nf4", "quip"])
def test_a_killed_run_goes_on_to_the_same_bits(model, tmp_path, method, monkeypatch, one_thread):
    how = one(method)
    quantize_model(model, tmp_path / "whole", how, ROWS, HELD_OUT)
    keep, calls = run._Desk.keep, []

    def dies(desk, i, layer, hidden):
        keep(desk, i, layer, hidden)
        calls.append(i)
        raise KeyboardInterrupt

    monkeypatch.setattr(run._Desk, "keep", dies)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, tmp_path / "out", how, ROWS, HELD_OUT)
    assert calls == [0] and not (tmp_path / "out").exists()
    monkeypatch.setattr(run._Desk, "keep", keep)
    with pytest.raises(ValueError, match="with another seed"):
        quantize_model(model, tmp_path / "out", settings(method, seed=9, group_size=how.group_size), ROWS)
    if method != "nf4":
        with pytest.raises(ValueError, match="with another calibration"):
            quantize_model(model, tmp_path / "out", how, ROWS.flip(0))
    result = quantize_model(model, tmp_path / "out", how, ROWS, HELD_OUT)
    assert result.resumed == 1
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_one_block_at_a_time(tmp_path, monkeypatch):
    """Blocks, with their Hessians, are gone before the next one is made."""
    model, alive, most = tiny.folder(tmp_path / "m", layers=4), [], []
    make = Blocks.block

    def watched(self, i, tensors=None):
        most.append(sum(ref() is not None for ref in alive))
        made = make(self, i, tensors)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Blocks, "block", watched)
    for method in ("gptq", "awq", "rtn"):
        how = settings(method, 4, 16, "bf16")
        quantize_model(model, tmp_path / method, how, ROWS if method != "rtn" else None, HELD_OUT)
    assert len(most) == 3 * 3 * 4 and max(most) == 0


def test_ended_between_two_files(model, tmp_path):
    """A block is finished when what comes after it is there, too."""
    desk = run._Desk(tmp_path / "out", {"a": 1})
    for i in range(2):
        desk.keep(i, Layer({"x": torch.zeros(1)}), [torch.ones(1, 2, 3) * i])
    assert desk.finished(5, True) == 2 and torch.equal(desk.hidden(2)[0], torch.ones(1, 2, 3))
    assert sorted(f.name for f in desk.path.glob("hidden*")) == ["hidden-00002.safetensors"]
    write_layer(desk._layer(2), Layer({}))
    assert desk.finished(5, True) == 2 and desk.finished(5, False) == 3 and desk.finished(3, True) == 3


def test_another_folder_in_the_way(model, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine.txt").write_text("x")
    with pytest.raises(ValueError, match="in the way"):
        quantize_model(model, tmp_path / "out", one("rtn"))
    assert (tmp_path / "out.partial/mine.txt").read_text() == "x"


def test_smoothquant_rounds_activations_when_it_is_loaded(model, tmp_path):
    for bits in (8, 4):
        result = quantize_model(model, tmp_path / str(bits), settings("smoothquant", bits), ROWS, HELD_OUT)
        agrees(tmp_path / str(bits), result)
        rounded = perplexity(load(tmp_path / str(bits), torch.float32), HELD_OUT[0], 40).loss
        (tmp_path / str(bits) / NOTE).unlink()
        assert perplexity(load(tmp_path / str(bits), torch.float32), HELD_OUT[0], 40).loss != rounded


def test_error_falls_with_bits(model, tmp_path):
    errors = [quantize_model(model, tmp_path / f"{b}", settings("gptq", b, 32, "bf16"), ROWS).error for b in (2, 4, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_layer_files_keep_everything(tmp_path):
    weight = nf4(torch.randn(16, 256), 64, double_quant=True).int4
    layer = Layer({"norm.weight": torch.randn(4).bfloat16()}, {"mlp.up": weight}, {"mlp.up": {"bits": 4.1}})
    write_layer(tmp_path / "x", layer)
    found = read_layer(tmp_path / "x")
    assert torch.equal(found.tensors["norm.weight"], layer.tensors["norm.weight"]) and found.report == layer.report
    assert torch.equal(found.int4["mlp.up"].dequantize(), weight.dequantize())
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_broken_weights(model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    state = load_file(tmp_path / "m/model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(state, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        quantize_model(tmp_path / "m", tmp_path / "out", one("gptq"), ROWS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_mistakes_that_are_seen_at_once(model, tmp_path):
    for how, rows, said in [
        (settings("gptq", 4, 128), ROWS, r"model.layers.0.self_attn.q_proj: .*128 does not divide the 32 columns"),
        (one("gptq"), None, "needs calibration text"),
        (one("awq"), ROWS[:0], "needs calibration text"),
        (one("gptq"), ROWS + 1000, "its tokenizer makes token"),
        (one("gptq"), ROWS.repeat(1, 20), "reads 512 tokens at most, got 800"),
    ]:
        with pytest.raises(ValueError, match=said):
            quantize_model(model, tmp_path / "out", how, rows)
    assert not list(tmp_path.iterdir())


def test_layers_that_do_not_fit_a_format(tmp_path):
    odd = tiny.folder(tmp_path / "m", head_dim=6, intermediate_size=64)
    with pytest.raises(ValueError, match=r"k_proj: --format: awq packs eight .* got \[12, 32\]. Take fastpost or bf16"):
        quantize_model(odd, tmp_path / "out", settings("rtn", 4, -1, "awq"))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_settings():
    assert settings("rtn").format == "fastpost" and settings("rtn", 3).format == "bf16"
    assert (
        settings("nf4").group_size == 64 and settings("gptq").group_size == 128 and settings("quip").group_size is None
    )
    for arguments, said in [
        ({"method": "gtpq"}, "Did you mean gptq"),
        ({"method": "nf4", "bits": 3}, "nf4 does 4 bits, got 3. 3 bits: rtn, gptq, awq, quip"),
        ({"method": "smoothquant", "bits": 5}, "does 4 or 6 or 8 bits"),
        ({"method": "rtn", "bits": 9}, "does 1 to 8 bits, got 9"),
        ({"method": "billm", "group_size": 64}, "has no groups"),
        ({"method": "rtn", "group_size": 0}, "group_size"),
        ({"method": "rtn", "act_order": True}, "--act-order: rtn has no such option"),
        ({"method": "gptq", "bits": 3, "format": "gptq"}, "can be written as bf16, got 'gptq'"),
        ({"method": "gptq", "format": "awq", "act_order": True}, "leave --act-order out"),
        ({"method": "rtn", "format": "awq", "symmetric": True}, "has zero points"),
        ({"method": "nf4", "format": "gptq"}, "fastpost or bf16, got 'gptq'"),
        ({"method": "pb-llm", "binary_share": 2.0}, "expected 0 to 1, got 2"),
    ]:
        with pytest.raises(ValueError, match=said):
            settings(**arguments)


def test_perplexity_before_is_that_of_the_source(model, tmp_path):
    result = quantize_model(model, tmp_path / "out", one("rtn"), None, HELD_OUT)
    assert result.before == streamed_losses(Blocks(model), HELD_OUT)
