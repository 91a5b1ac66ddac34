# SPDX-License-Identifier: Apache-2.0
"""A new vocabulary's rows are exact: copies to the bit, averages as written, the unknown row where nothing fits."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
from fastpost.hf import folder
from fastpost.hf.transplant import by_map, by_text, main, transplant


def other_tokenizer(bos=False):
    """Other merges than tiny.tokenizer's, so tokens are spelt in other ways."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_end|>", "<|pad|>", "<|new|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["De zeven appels liggen in de mand, en the answer is zeven."] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>")


def test_rows_are_exact():
    old = torch.randn(5, 700)
    new = transplant(old, [{0: 0.25, 1: 0.75}, {3: 1.0}, {}, {4: 2.0, 2: 6.0}, {2: 0.1}], unknown=1)
    wide = old.double()
    assert torch.equal(new[0], (0.25 * wide[0] + 0.75 * wide[1]).float())
    assert torch.equal(new[1], old[3]) and torch.equal(new[2], old[1]) and torch.equal(new[4], old[2])
    assert torch.equal(new[3], (0.25 * wide[4] + 0.75 * wide[2]).float())  # an average, whatever the weights' sum


def test_bfloat16_is_rounded_once():
    old = torch.randn(6, 64).bfloat16()
    mix = {i: 1 / 6 for i in range(6)}
    new = transplant(old, [mix, {5: 0.3}], unknown=0)
    assert new.dtype == torch.bfloat16 and torch.equal(new[0], old.double().mean(0).bfloat16())
    assert torch.equal(new[1], old[5])


def test_identity_map_gives_the_same_logits(tmp_path, capsys):
    source = tiny.folder(tmp_path / "model", tie=False)
    vocabulary = folder.load_tokenizer(source).get_vocab()
    (tmp_path / "map.json").write_text(json.dumps({t: {t: 1.0} for t in vocabulary}))
    assert main([str(source), str(source), str(tmp_path / "out"), "--map", str(tmp_path / "map.json")]) == 0
    assert f"{len(vocabulary)} rows copied, 0 averaged, 0 without" in capsys.readouterr().out
    ids = torch.arange(3, 40)[None]
    before, after = (folder.load_model(p)(ids).logits for p in (source, tmp_path / "out"))
    assert torch.equal(after, before[..., : after.shape[-1]])


@pytest.mark.parametrize("tie", [True, False])
def test_a_folder_by_text(tmp_path, tie, capsys):
    """The whole folder: rows, config and tokenizer are the new ones, everything else is the old one's."""
    source = tiny.folder(tmp_path / "model", tie=tie)
    new = other_tokenizer()
    new.save_pretrained(tmp_path / "tokenizer")
    assert main([str(source), str(tmp_path / "tokenizer"), str(tmp_path / "out")]) == 0
    assert "1 without a counterpart" in capsys.readouterr().out
    before, after = (load_file(p / "model.safetensors") for p in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    model, tokenizer = folder.load_model(tmp_path / "out"), folder.load_tokenizer(tmp_path / "out")
    old = folder.load_tokenizer(source)
    longest = max((t for t in tokenizer.get_vocab() if "\u0120zeven".startswith(t)), key=len)  # as in " zeven"
    assert longest not in old.get_vocab()
    assert model.config.vocab_size == len(new) and model.config.eos_token_id == new.eos_token_id
    ends = ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tie)
    for key in ends:
        assert after[key].shape == (len(new), 32)
        one = old.convert_tokens_to_ids("e")
        assert torch.equal(after[key][tokenizer.convert_tokens_to_ids("e")], before[key][one])
        spelt = old(" zeven"[: len(longest)], add_special_tokens=False)["input_ids"]
        assert len(spelt) > 1
        row = after[key][tokenizer.convert_tokens_to_ids(longest)]
        torch.testing.assert_close(row, before[key][spelt].mean(0))
        assert torch.equal(after[key][tokenizer.eos_token_id], before[key][old.eos_token_id])
        unknown = old.bos_token_id if old.bos_token_id is not None else old.eos_token_id
        assert torch.equal(after[key][tokenizer.convert_tokens_to_ids("<|new|>")], before[key][unknown])
    assert all(torch.equal(before[k], after[k]) for k in before if k not in ends)


def test_mistakes(tmp_path, capsys):
    old = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"\[transplant\] mixes\[1\]: expected rows from 0 to 3, got 4"):
        transplant(old, [{0: 1.0}, {4: 1.0}], 0)
    with pytest.raises(ValueError, match=r"mixes\[0\]: expected weights above 0, got -0.5 for row 2"):
        transplant(old, [{1: 1.0, 2: -0.5}], 0)
    a, b = tiny.tokenizer(), other_tokenizer()
    with pytest.raises(ValueError, match="the new tokenizer has no token 'nope'"):
        by_map({"nope": {}}, a, b)
    with pytest.raises(ValueError, match="'e': the old tokenizer has no token 'nope'"):
        by_map({"e": {"nope": 1.0}}, a, b)
    assert by_map({}, a, b) == [{}] * len(b)
    assert len(by_text(a, b)) == len(b)
    source = tiny.folder(tmp_path / "model")
    assert main([str(source), str(source), str(source)]) == 1
    assert "already exists and is not empty" in capsys.readouterr().err
