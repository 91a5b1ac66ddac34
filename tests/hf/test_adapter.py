# SPDX-License-Identifier: Apache-2.0
"""Adapters: what trains, what is written, what peft reads of it, and what is refused."""

import json
import math
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from fastpost.hf import adapter, folder

IDS = torch.arange(5, 25)[None]


def stir(model, seed=0):
    """B = 0 hides mistakes: move all that is trained."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=draw)
    return model


def made(tmp_path, tie=False, kind="llama", **settings):
    """(base folder, adapter folder, the model that was saved)."""
    base = tiny.folder(tmp_path / "base", kind, tie=tie)
    model = stir(adapter.fresh(folder.load_model(base), **({"rank": 4, "alpha": 8.0} | settings))).eval()
    return base, adapter.save(model, base, tmp_path / "adapter"), model


def test_a_new_adapter_changes_nothing_and_rslora_scales_by_the_root(tmp_path):
    base = tiny.folder(tmp_path / "base")
    plain = folder.load_model(base)
    before = plain(IDS).logits
    scales = {}
    for rslora in (False, True):
        model = adapter.fresh(folder.load_model(base), rank=16, alpha=8.0, rslora=rslora)
        assert torch.equal(model(IDS).logits, before)
        (scales[rslora],) = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scales == {False: 0.5, True: 0.5 * math.sqrt(16)}


@pytest.mark.parametrize("tie", [False, True])
def test_gradients_reach_adapter_embedding_and_head_but_no_base_linear(tmp_path, tie):
    base = tiny.folder(tmp_path / "base", tie=tie)
    model = adapter.fresh(folder.load_model(base), rank=4, alpha=8.0, train_embeddings=True, train_head=True)
    stir(model)(IDS, labels=IDS).loss.backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert touched == trained and all("lora_" in n or "modules_to_save" in n for n in trained)
    assert sum("embed_tokens.modules_to_save" in n for n in trained) == 1
    assert sum("lm_head.modules_to_save" in n for n in trained) == (0 if tie else 1)  # tied: one parameter, one slot
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == tie


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind, tie", [("llama", False), ("llama", True), ("gemma2", True), ("qwen2", False)])
def test_peft_reads_what_is_written(tmp_path, kind, tie, whole):
    base, out, model = made(tmp_path, tie, kind, rslora=True, train_embeddings=whole, train_head=whole)
    keys = load_file(out / adapter.WEIGHTS).keys()
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight" in keys
    assert (
        ("base_model.model.lm_head.weight" in keys) == ("base_model.model.model.embed_tokens.weight" in keys) == whole
    )
    tree = json.loads((out / adapter.CONFIG).read_text())
    assert (tree["peft_type"], tree["r"], tree["use_rslora"]) == ("LORA", 4, True)
    assert tree["base_model_name_or_path"] == str(base) and tree["inference_mode"] is True
    assert tree["modules_to_save"] == (["embed_tokens", "lm_head"] if whole else None)
    theirs = peft.PeftModel.from_pretrained(folder.load_model(base), out)
    logits = model(IDS).logits
    assert torch.equal(theirs(IDS).logits, logits)
    assert torch.equal(adapter.load(out)(IDS).logits, logits)
    assert not torch.allclose(folder.load_model(base)(IDS).logits, logits, atol=1e-2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    torch.testing.assert_close(adapter.merged(adapter.load(out))(IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_off_is_the_base_and_leaves_no_trace(tmp_path):
    base, out, _ = made(tmp_path, train_embeddings=True, train_head=True)
    model = adapter.load(out)
    next(p for n, p in model.named_parameters() if "layers.0" in n and "lora_A" in n).requires_grad_(False)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with adapter.off(model):
        assert torch.equal(model(IDS).logits, folder.load_model(base)(IDS).logits)
    assert trained == [n for n, p in model.named_parameters() if p.requires_grad] and trained
    plain = folder.load_model(base)
    with adapter.off(plain) as same:
        assert same is plain


def test_what_a_path_stands_for(tmp_path):
    base, out, _ = made(tmp_path)
    assert folder.locate(base) == (base, None, base) and folder.locate(out) == (base, out, out)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="this run is not finished, so it has no model yet"):
        folder.locate(run)
    shutil.copytree(out, run / "adapter")
    assert folder.locate(run) == (base, run / "adapter", run / "adapter")
    (run / "adapter/tokenizer_config.json").unlink()
    assert folder.locate(run).tokenizer == base
    assert folder.load_tokenizer(run).chat_template == tiny.CHATML
    tree = json.loads((out / adapter.CONFIG).read_text())
    (out / adapter.CONFIG).write_text(json.dumps(tree | {"base_model_name_or_path": "org/name"}))
    with pytest.raises(ValueError, match=r"expected the folder of the base model, got 'org/name'.*model\.adapter"):
        folder.locate(out)
    (out / adapter.CONFIG).write_text(json.dumps(tree | {"base_model_name_or_path": "../base"}))
    assert folder.locate(out).base.resolve() == base


def test_targets_and_tied_ends_are_checked(tmp_path):
    model = lambda tie: folder.load_model(tiny.folder(tmp_path / f"m{tie}", tie=tie))  # noqa: E731
    with pytest.raises(ValueError, match=r"got 'q_prj', which LlamaForCausalLM has not. It has: down_proj, .*q_proj"):
        adapter.fresh(model(True), rank=2, alpha=4, targets=["v_proj", "q_prj"])
    for name, other in (("train_head", "train_embeddings"), ("train_embeddings", "train_head")):
        with pytest.raises(ValueError, match=rf"\[lora\] {name}: .*are one matrix .*Set {other}, too, or neither"):
            adapter.fresh(model(True), rank=2, alpha=4, **{name: True})
    with pytest.raises(ValueError, match=r"low-rank change of 'lm_head' alone fits no merged model"):
        adapter.fresh(model(True), rank=2, alpha=4, targets=["q_proj", "lm_head"])
    adapter.fresh(model(False), rank=2, alpha=4, targets=["q_proj", "lm_head"], train_embeddings=True)


def test_an_adapter_that_does_not_fit_is_an_error(tmp_path):
    """peft itself warns at most, and computes with random or base weights."""
    _, out, _ = made(tmp_path)
    tensors = load_file(out / adapter.WEIGHTS)
    first = sorted(tensors)[0]

    def written(changed):
        save_file(changed, out / adapter.WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError) as error:
            adapter.load(out)
        return str(error.value)

    assert f"lacks {first}. The adapter belongs to another base" in written(
        {k: v for k, v in tensors.items() if k != first}
    )
    assert "has in another shape" in written(tensors | {first: torch.zeros(4, 7)})
    assert "does not ask for on this model, base_model.model.extra.lora_A.weight" in written(
        tensors | {"base_model.model.extra.lora_A.weight": torch.zeros(1)}
    )
    tree = json.loads((out / adapter.CONFIG).read_text())
    save_file(tensors, out / adapter.WEIGHTS, metadata={"format": "pt"})
    for name, value, expected in (
        ("peft_type", "LOHA", "peft_type: expected LORA, got 'LOHA'"),
        ("bias", "all", "bias: expected none"),
        ("init_lora_weights", "pissa_niter_4", "leaves the base model as it is, got 'pissa_niter_4'"),
    ):
        (out / adapter.CONFIG).write_text(json.dumps(tree | {name: value}))
        with pytest.raises(ValueError, match=expected):
            adapter.load(out)
    (out / adapter.CONFIG).write_text(json.dumps(tree))
    (out / adapter.WEIGHTS).rename(out / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle.*only safetensors is read"):
        adapter.load(out)


def test_a_full_disk_leaves_nothing_half_done(tmp_path, monkeypatch):
    base, out, model = made(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        adapter.save(model, base, tmp_path / "other")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        adapter.save(model, base, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
