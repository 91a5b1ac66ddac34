# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from fastpost.hf import folder
from fastpost.hf.folder import load_model, load_tokenizer, save_folder, weight_files


def tensors(path) -> dict[str, torch.Tensor]:
    return {k: v for file in weight_files(path) for k, v in load_file(file).items()}


def other_files(path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir() if f.suffix != ".safetensors"}


@pytest.fixture
def source(tmp_path):
    return tiny.folder(tmp_path / "model")


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_out_as_in(tmp_path, kind, tie):
    source = tiny.folder(tmp_path / "model", kind, tie=tie)
    model = load_model(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    out = save_folder(model, source, tmp_path / "out")
    before, after = tensors(source), tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], before[k] + 1) for k in before)
    assert other_files(source) == other_files(out)
    assert len({f.stat().st_mode for f in out.iterdir()}) == 1, "weights are as readable as config.json"
    again = load_model(out)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_a_folder_with_both_halves_of_a_tied_pair_keeps_both(source, tmp_path):
    file = source / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file, metadata={"format": "pt"})
    out = save_folder(load_model(source), source, tmp_path / "out")
    assert tensors(out).keys() == weights.keys()
    assert torch.equal(tensors(out)["lm_head.weight"], tensors(out)["model.embed_tokens.weight"])


def test_shards_and_index(tmp_path):
    source = tiny.folder(tmp_path / "model")
    tiny.model().save_pretrained(source, max_shard_size="20KB")
    os.remove(source / "model.safetensors")
    assert len(weight_files(source)) > 1
    model = load_model(source)
    out = save_folder(model, source, tmp_path / "out")
    assert [f.name for f in weight_files(out)] == [f.name for f in weight_files(source)]
    assert other_files(out) == other_files(source)
    half = save_folder(model, source, tmp_path / "half", dtype=torch.bfloat16)
    index = json.loads((half / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(half).values())


def test_renamed_experts_come_out_under_their_old_names(tmp_path):
    """transformers fuses the experts of a mixture on the way in."""
    source = tiny.folder(tmp_path / "model")
    config = transformers.MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(source)
    model = load_model(source)
    before, after = tensors(source), tensors(save_folder(model, source, tmp_path / "out"))
    assert any("experts.1.w1" in k for k in before) and not any("experts.1.w1" in k for k in model.state_dict())
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_weights_leave_in_the_dtype_they_came_in_or_as_asked(tmp_path):
    source = tiny.folder(tmp_path / "model")
    tiny.model().to(torch.bfloat16).save_pretrained(source)
    model = load_model(source, torch.float32)
    assert model.dtype == torch.float32
    assert {t.dtype for t in tensors(save_folder(model, source, tmp_path / "out")).values()} == {torch.bfloat16}
    asked = save_folder(model, source, tmp_path / "asked", dtype=torch.float32)
    assert {t.dtype for t in tensors(asked).values()} == {torch.float32}
    assert json.loads((asked / "config.json").read_text())["dtype"] == "float32"


def test_nothing_is_overwritten(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out: already exists and is not empty; nothing is overwritten"):
        save_folder(load_model(source), source, out)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing_half_done(source, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model = load_model(source)
    monkeypatch.setattr(folder, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_folder(model, source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


class Bomb:
    def __reduce__(self):
        return (os.system, (f"touch {os.environ['FASTPOST_TEST_BOMB']}",))


def test_a_pickle_is_refused_and_not_opened(source, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPOST_TEST_BOMB", str(tmp_path / "exploded"))
    os.remove(source / "model.safetensors")
    torch.save({"model.embed_tokens.weight": Bomb()}, source / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        load_model(source)
    assert "pytorch_model.bin is a pickle, and reading a pickle can run any code; only safetensors is read." in str(
        error.value
    )
    assert "save_pretrained" in str(error.value)
    assert not (tmp_path / "exploded").exists()
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "exploded").exists()  # the bomb works, so the line above means something


def test_a_pickle_named_safetensors_is_refused(source):
    torch.save({"a": torch.zeros(2)}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        load_model(source)


def test_other_pickles_beside_safetensors_do_not_matter(source):
    torch.save({}, source / "training_args.bin")
    load_model(source)


def test_missing_weights_are_an_error_not_a_random_draw(source):
    weights = load_file(source / "model.safetensors")
    for key in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        del weights[key]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: model\.layers\.0\.mlp\.up_proj\.weight, model\.norm\.weight"):
        load_model(source)


def test_folders_that_are_none(tmp_path, source):
    with pytest.raises(ValueError, match=r"ORG/NAME: no such folder\. .*hf download"):
        load_model("ORG/NAME")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected .* found no config\.json"):
        load_tokenizer(tmp_path / "empty")
    adapter = tmp_path / "adapter"
    shutil.copytree(source, adapter)
    os.rename(adapter / "model.safetensors", adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="It is an adapter: give the folder of its base model"):
        load_model(adapter)


def test_tokenizer_and_template_are_the_folders_own(source):
    tokenizer = load_tokenizer(source)
    assert tokenizer.chat_template == tiny.CHATML and tokenizer.eos_token == "<|im_end|>"
