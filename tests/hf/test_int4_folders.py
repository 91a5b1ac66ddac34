# SPDX-License-Identifier: Apache-2.0
"""Four-bit folders of other libraries: their dequantised weights bit for bit, there and back, and clear refusals."""

import json
import shutil

import int4_writers as writers
import pytest
import torch
import transformers
from int4_writers import LAYERS, plain
from safetensors.torch import load_file, save_file

import fastpost.hf
from fastpost.hf import int4_folder
from fastpost.nn import Int4Linear, quantize_linears

FOREIGN = {
    "gptq": (writers.gptq, {}),
    "gptq sharded": (writers.gptq, {"shards": 3}),
    "gptq v1 asymmetric": (writers.gptq, {"sym": False}),
    "gptq v2 asymmetric": (writers.gptq, {"sym": False, "version": 2}),
    "gptq v1 zero point 0": (writers.gptq, {"sym": False, "zero_points": 0}),
    "gptq desc_act": (writers.gptq, {"desc_act": True, "sym": False}),
    "gptq by row": (writers.gptq, {"group_size": -1}),
    "awq": (writers.awq, {}),
    "awq symmetric": (writers.awq, {"sym": True}),
    "compressed": (writers.compressed, {}),
    "compressed asymmetric": (writers.compressed, {"sym": False, "dtype": torch.float16}),
    "compressed by row": (writers.compressed, {"strategy": "channel", "sym": False}),
    "compressed actorder": (writers.compressed, {"actorder": True}),
    "compressed old zeros": (writers.compressed, {"sym": False, "unpacked_zeros": True}),
    "nf4": (writers.bitsandbytes, {}),
    "nf4 nested": (writers.bitsandbytes, {"nested": True}),
    "nf4 float16": (writers.bitsandbytes, {"dtype": torch.float16, "nested": True}),
    "nf4 in bfloat16 storage": (writers.bitsandbytes, {"storage": torch.bfloat16}),
}


def foreign(path, name, **more):
    if name.startswith("nf4"):
        pytest.importorskip("bitsandbytes")
    write, options = FOREIGN[name]
    return write(plain(path), **options | more)


@pytest.mark.parametrize("name", FOREIGN)
def test_the_weights_are_theirs_to_the_last_bit(name, tmp_path):
    wanted = foreign(tmp_path / "model", name)
    model = fastpost.hf.load_int4(tmp_path / "model", torch.float32)
    assert model.get_output_embeddings().weight.dtype == torch.float32 and not model.training
    for layer, weight in wanted.items():
        ours = model.get_submodule(layer)
        assert type(ours) is Int4Linear
        assert torch.equal(ours.dequantize(weight.dtype), weight), layer
    assert torch.isfinite(model(torch.arange(5, 25)[None]).logits).all()


@pytest.mark.parametrize("name", FOREIGN)
def test_saved_as_ours_and_opened_by_transformers(name, tmp_path):
    foreign(tmp_path / "model", name)
    model = fastpost.hf.load_int4(tmp_path / "model", torch.bfloat16)
    out = fastpost.hf.save_int4(model, tmp_path / "own", tokenizer=tmp_path / "model")
    for again in (
        transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16),
        fastpost.hf.load_int4(out, torch.bfloat16),
    ):
        assert same(model, again)
    model.save_pretrained(tmp_path / "by transformers")
    assert same(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "by transformers"))
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("name", [n for n in FOREIGN if n.startswith("gptq")])
def test_gptq_there_and_back(name, tmp_path):
    wanted = foreign(tmp_path / "model", name)
    model = fastpost.hf.load_int4(tmp_path / "model", torch.float32)
    out = fastpost.hf.save_int4(model, tmp_path / "out", format="gptq")
    before, after = (
        json.loads((tmp_path / "model/config.json").read_text()),
        json.loads((out / "config.json").read_text()),
    )
    for field in ("bits", "group_size", "desc_act"):
        assert before["quantization_config"][field] == after["quantization_config"][field]
    old = {}
    for file in (tmp_path / "model").glob("*.safetensors"):
        old |= load_file(file)
    new = load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    if name != "gptq v1 zero point 0" and "v2" not in name:
        assert all(torch.equal(old[k], new[k]) for k in old)
    again = fastpost.hf.load_int4(out, torch.float32)
    assert all(torch.equal(again.get_submodule(n).dequantize(w.dtype), w) for n, w in wanted.items())


@pytest.mark.parametrize("name", ["awq", "awq symmetric"])
def test_awq_there_and_back(name, tmp_path):
    foreign(tmp_path / "model", name)
    out = fastpost.hf.save_int4(fastpost.hf.load_int4(tmp_path / "model", torch.float32), tmp_path / "o", format="awq")
    old, new = load_file(tmp_path / "model/model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


def test_quantised_on_loading(tmp_path):
    path = plain(tmp_path / "model")
    config = fastpost.hf.Int4Config("nf4", 64, double_quant=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    by_hand = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    quantize_linears(by_hand, group_size=64, scheme="nf4", double_quant=True)
    assert same(model, by_hand) and model.config.quantization_config.skip == ["lm_head"]
    model.save_pretrained(tmp_path / "out")
    assert same(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    back = model.dequantize(torch.float32)
    assert not any(isinstance(m, Int4Linear) for m in back.modules())


def test_layers_of_several_kinds_in_one_folder(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(plain(tmp_path / "model"), dtype=torch.bfloat16)
    quantize_linears(model, group_size=32, skip=["lm_head", "down_proj", "layers.0.self_attn.q_proj"])
    quantize_linears(
        model, group_size=64, scheme="asymmetric", scales_dtype=torch.float16, skip=["lm_head", "down_proj"]
    )
    out = fastpost.hf.save_int4(model, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["layers"] == {"model.layers.0.self_attn.q_proj": {
        "scheme": "asymmetric", "group_size": 64, "scales_dtype": "float16"}}  # fmt: skip
    assert config["skip"] == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert same(model, fastpost.hf.load_int4(out))


def test_a_quantised_head_becomes_a_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "LAYERS", [*LAYERS, "lm_head"])
    wanted = writers.gptq(plain(tmp_path / "model"))
    model = fastpost.hf.load_int4(tmp_path / "model", torch.float16)
    assert torch.equal(model.lm_head.weight, wanted["lm_head"])


def test_nothing_is_written_over(tmp_path):
    model = fastpost.hf.load_int4(_gptq(tmp_path))
    with pytest.raises(ValueError, match="already exists and is not empty"):
        fastpost.hf.save_int4(model, tmp_path / "model")
    with pytest.raises(ValueError, match="format: expected fastpost, gptq, awq, got 'exl2'"):
        fastpost.hf.save_int4(model, tmp_path / "out", format="exl2")
    with pytest.raises(ValueError, match="expected layers in four bits, found none"):
        fastpost.hf.save_int4(torch.nn.Sequential(torch.nn.Linear(32, 8)), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def _gptq(tmp_path):
    writers.gptq(plain(tmp_path / "model"))
    return tmp_path / "model"


LOSSY = [
    ("gptq", {"scheme": "nf4", "group_size": 32}, "not nf4"),
    ("awq", {"scheme": "nf4", "group_size": 32}, "not nf4"),
    ("gptq", {"group_size": 32, "scales_dtype": torch.float32}, "scales that float16 holds exactly, got float32"),
    ("awq", {"group_size": 64}, r"\[N, K\] of whole words and groups"),  # 96 columns are no whole number of groups
]


@pytest.mark.parametrize("format, options, message", LOSSY)
def test_what_a_format_cannot_hold_is_not_rounded(format, options, message, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(plain(tmp_path / "model"), dtype=torch.float32)
    quantize_linears(model, **options)
    with pytest.raises(ValueError, match=rf"\[save {format}\] model\.layers\.0\..*{message}"):
        fastpost.hf.save_int4(model, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


# ---- refusals --------------------------------------------------------------------------------------------------------


def edit(path, change):
    """change(tensors) in place, written back."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})


def configured(path, **fields):
    tree = json.loads((path / "config.json").read_text())
    tree["quantization_config"] |= fields
    (path / "config.json").write_text(json.dumps(tree))


Q = "model.layers.1.mlp.up_proj"


def spoil(tensors, key, value, at=(0, 0)):
    tensors[key][at] = value


DAMAGED = {
    "cut": ("gptq", lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-100]),
            r"model\.safetensors is not a safetensors file \(or was cut short\)"),
    "lost": ("gptq", lambda p: edit(p, lambda t: t.pop(f"{Q}.scales")),
             rf"tensor '{Q}\.scales': missing\. Fetch"),
    "three bits": ("gptq", lambda p: edit(p, lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:6]})),
                   rf"model\.safetensors: tensor '{Q}\.qweight': expected int32 \[8, 96\], got int32 \[6, 96\]\. A"),
    "bits": ("gptq", lambda p: configured(p, bits=8), r"config\.json: quantization_config: bits: expected 4, got 8\."),
    "marlin": ("gptq", lambda p: configured(p, checkpoint_format="marlin"), "expected gptq or gptq_v2, got 'marlin'"),
    "group 16": ("gptq", lambda p: configured(p, group_size=16), r"expected groups of 32, .*, got group_size 16"),
    "another group": ("gptq", lambda p: configured(p, group_size=64), r"qzeros': expected int32 .*Another group size"),
    "nan": ("gptq", lambda p: edit(p, lambda t: spoil(t, f"{Q}.scales", float("nan"))),
            rf"tensor '{Q}\.scales'\] scales: expected finite numbers"),
    "zero scale": ("gptq", lambda p: edit(p, lambda t: spoil(t, f"{Q}.scales", 0)),
                   rf"tensor '{Q}\.scales'\] scales: expected no 0 where codes differ"),
    "order": ("gptq", lambda p: edit(p, lambda t: spoil(t, f"{Q}.g_idx", 1, 0)),
              r"g_idx': expected each group 32 times"),
    "no layers": ("gptq", lambda p: configured(p, quant_method="compressed-tensors", format="pack-quantized"),
                  r"expected tensors named \*\.weight_packed"),
    "unknown": ("gptq", lambda p: configured(p, quant_method="hqq"), "quant_method: expected fastpost, gptq, awq,"),
    "stranger": ("gptq", lambda p: edit(p, lambda t: t.update({"model.x.qweight": t[f"{Q}.qweight"] + 0})),
                 r"this model has no linear layer 'model\.x'"),
    "norm lost": ("gptq", lambda p: edit(p, lambda t: t.pop("model.norm.weight")), r"'model\.norm\.weight': missing"),
    "awq gemv": ("awq", lambda p: configured(p, version="gemv"), "version: expected gemm, got 'gemv'"),
    "awq bits": ("awq", lambda p: edit(p, lambda t: t.update({f"{Q}.qweight": torch.zeros(64, 3, dtype=torch.int32)})),
                 rf"tensor '{Q}\.qweight': expected int32 \[64, 12\], got int32 \[64, 3\]"),
    "int8": ("compressed", lambda p: configured(p, config_groups={"g": {"weights": {"num_bits": 8}}}),
             r"config_groups\.g\.weights\.num_bits: expected 4, got 8"),
    "fp8": ("compressed", lambda p: configured(p, format="float-quantized"), "format: expected pack-quantized"),
    "activations": ("compressed", lambda p: configured(p, config_groups={"g": {"weights": {"num_bits": 4},
                    "input_activations": {"num_bits": 8}}}), r"input_activations: expected none"),
    "shape": ("compressed", lambda p: edit(p, lambda t: spoil(t, f"{Q}.weight_shape", 95, 0)),
              rf"'{Q}\.weight_shape': expected \[96, 64\], got \[95, 64\]"),
    "state": ("nf4", lambda p: edit(p, lambda t: spoil(t, f"{Q}.weight.quant_state.bitsandbytes__nf4", 7, 0)),
              r"quant_state\.bitsandbytes__nf4': expected JSON"),
    "table": ("nf4", lambda p: edit(p, lambda t: spoil(t, f"{Q}.weight.quant_map", 0.5, 3)),
              r"quant_map': expected the 16 values of NF4"),
    "bytes": ("nf4", lambda p: edit(p, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:-1]})),
              rf"tensor '{Q}\.weight': expected 3072 bytes, got 3071"),
    "8 bit": ("nf4", lambda p: configured(p, load_in_4bit=False, load_in_8bit=True), "expected bitsandbytes in 4 bits"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_and_other_formats_are_named(name, tmp_path):
    kind, change, message = DAMAGED[name]
    foreign(tmp_path / "model", kind)
    change(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        fastpost.hf.load_int4(tmp_path / "model")


def test_blocks_that_cross_rows_and_fp4_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    writers.bitsandbytes(plain(tmp_path / "a"), block=64)  # 96 columns
    with pytest.raises(ValueError, match="blocksize: expected a multiple of 32 that divides the 96 columns"):
        fastpost.hf.load_int4(tmp_path / "a")
    writers.bitsandbytes(plain(tmp_path / "b"), kind="fp4")
    configured(tmp_path / "b", bnb_4bit_quant_type="nf4")
    with pytest.raises(ValueError, match=r"bitsandbytes__fp4': expected bitsandbytes in NF4, got FP4"):
        fastpost.hf.load_int4(tmp_path / "b")


def test_folders_that_are_not_whole(tmp_path):
    path = plain(tmp_path / "model")
    with pytest.raises(ValueError, match="quantization_config: missing, so this is no quantised model"):
        fastpost.hf.load_int4(path)
    writers.gptq(path, shards=2)
    shutil.copytree(path, tmp_path / "pickled")
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: missing, but model\.safetensors\.index"):
        fastpost.hf.load_int4(path)
    pickled = tmp_path / "pickled"
    for file in pickled.glob("*.safetensors*"):
        file.unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected \.safetensors files, got pytorch_model\.bin, a pickle"):
        fastpost.hf.load_int4(pickled)


def test_an_unknown_field_is_an_error():
    for fields, message in (
        ({"group": 64}, "expected scheme, .*, got group"),
        ({"scheme": "fp4"}, "scheme: expected symmetric, asymmetric, nf4, got 'fp4'"),
        ({"group_size": 48}, "group_size: expected 32, 64, 128 or -1"),
        ({"double_quant": True}, "double_quant: expected the scheme nf4"),
        ({"layers": {"x": {"bits": 3}}}, "layers: x: field: expected scheme"),
    ):
        with pytest.raises(ValueError, match=message):
            fastpost.hf.Int4Config(**fields)
    assert int4_folder.WRITTEN.keys() == {"fastpost", "gptq", "awq"}
