# SPDX-License-Identifier: Apache-2.0
"""Complaint 21: exported weights do not load: tied lm_head, missing keys (vLLM PR #6758; accelerate #3870, #2155;
transformers #41038, #38870, #30202; torchtune #1122; LLaMA-Factory #2789).

What a run writes has the keys, shards and files of the model that it began with, loads in plain transformers (or peft)
without a missing or unexpected key, and computes the same logits. `fastpost export` checks the last itself.
"""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from fastpost.hf import adapter, folder
from fastpost.train import export
from fastpost.train.loop import train
from train import runs

IDS = torch.arange(5, 25)[None]
ALL = [
    *("--model.lora.rank", "4", "--model.lora.alpha", "32"),
    *("--model.lora.train_embeddings", "true", "--model.lora.train_head", "true"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def keys(path):
    return {k for f in path.glob("model*.safetensors") for k in load_file(f)}


def shard(path):
    """Split the one weight file in two with an index, as large models come."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({k: tensors[k] for k in part}, path / file, metadata={"format": "pt"})
    (path / "model.safetensors").unlink()
    size = sum(t.nbytes for t in tensors.values())
    where = {k: file for file, part in parts.items() for k in part}
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": where})
    )


def loads(source, out):
    """The whole of the complaint, as a check of one exported folder."""
    assert keys(out) == keys(source)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    return model(IDS).logits


FORMS = {"tied": {"tie": True}, "untied": {"tie": False}, "qwen2": {"kind": "qwen2", "tie": True}}


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one file", "shards"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["whole", "merged"])
def test_it_loads_in_transformers(tmp_path, form, sharded, way):
    options = FORMS[form]
    cfg = runs.recipe(tmp_path, *(ALL if way == "merged" else []), "--train.max_steps", "2", model=options)
    if sharded:
        shard(tmp_path / "model")
    run = train(cfg)
    said = []
    out = export.export(run, tmp_path / "out", merge=way == "merged", say=said.append)
    assert any("loaded again: largest logit difference" in text for text in said)
    mine = adapter.load(run)(IDS).logits
    torch.testing.assert_close(loads(tmp_path / "model", out), mine, rtol=1e-4, atol=1e-4)
    if way == "whole":
        torch.testing.assert_close(loads(tmp_path / "model", run / "model"), mine, rtol=1e-4, atol=1e-4)
    else:
        theirs = peft.PeftModel.from_pretrained(folder.load_model(tmp_path / "model"), run / "adapter")
        torch.testing.assert_close(theirs(IDS).logits, mine, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mine, folder.load_model(tmp_path / "model")(IDS).logits, atol=1e-3)


def test_the_mistakes_are_noticed(tmp_path):
    """Each of those that the reports describe, made by hand upon a right folder."""
    source = tiny.folder(tmp_path / "source", tie=False)
    run = train(runs.recipe(tmp_path, "--train.max_steps", "1", model={"tie": True}))
    good = export.export(run, tmp_path / "good", say=lambda text: None)
    loads(tmp_path / "model", good)

    def spoilt(change, source=tmp_path / "model"):
        tensors = load_file(good / "model.safetensors")
        change(tensors)
        out = tmp_path / f"bad{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        for file in good.glob("*.json"):
            (out / file.name).write_bytes(file.read_bytes())
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AssertionError):
            loads(source, out)

    spoilt(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))  # tied, written twice
    spoilt(lambda t: t.pop("model.norm.weight"))  # missing
    spoilt(lambda t: t.update({f"base_model.model.{k}": t.pop(k) for k in list(t)}))  # a wrapper's prefix is left
    spoilt(lambda t: None, source)  # untied came in, tied goes out


def test_export_checks_what_it_wrote(tmp_path, monkeypatch):
    """A tied head lost on the way out: the folder loads without a complaint and computes something else."""
    run = train(runs.recipe(tmp_path, "--train.max_steps", "1", model={"tie": False}))
    plain = folder.save_folder

    def loses_the_head(model, source, out, *rest, **more):
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
        return plain(model, source, out, *rest, **more)

    monkeypatch.setattr(folder, "save_folder", loses_the_head)
    with pytest.raises(ValueError, match="does not compute what the model did; it is removed"):
        export.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
