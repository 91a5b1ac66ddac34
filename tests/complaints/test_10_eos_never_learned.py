# SPDX-License-Identifier: Apache-2.0
"""Complaint 10: pad is EOS, padding is masked by its id, and the model never learns to stop.

The mistake: labels are masked where ids equal the pad token."""

import pytest
import torch

import tiny
from fastpost import cli, objectives
from fastpost.data.loader import load_dataset
from fastpost.hf import folder
from fastpost.train.config import DataConfig, load_config
from fastpost.train.loop import train


def load(tmp_path, rows, tokenizer, objective=None, **options):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    return load_dataset(DataConfig(train=str(path), **options), tokenizer, objective)


PLAIN = [{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": " longer"}]


@pytest.mark.parametrize(
    "rows, objective",
    [(tiny.preference_rows(4), objectives.DPO()), (tiny.sft_rows(4), None), (PLAIN, None), ([{"text": "ab"}], None)],
    ids=["pairs", "chats", "strings", "text"],
)
@pytest.mark.parametrize("mask", ["reply", "full"])
def test_the_end_is_a_target_although_pad_is_the_same_token(tmp_path, rows, objective, mask):
    tokenizer = tiny.tokenizer(pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = load(tmp_path, rows, tokenizer, objective, mask=mask)
    batch = data.batch(range(len(data)))
    ends = batch.cu_seqlens[1:].tolist()
    last = 3 if (mask == "full" and "messages" in rows[0]) or (mask == "full" and "chosen" in rows[0]) else 2
    # ChatML writes a line end after the end of turn; with the whole text trained it is the very last target.
    assert [batch.target[end - last].item() for end in ends] == [tokenizer.eos_token_id] * len(ends)
    assert data.report.ends_trained == data.report.sequences


def test_an_appended_end_is_trained_with_the_whole_text(tmp_path):
    """ANITA's rows are rendered text with an end marker, ATS's question and answer with EOS: all of it is trained."""
    tokenizer = tiny.tokenizer()
    chat = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    for text, end in ((chat + "<|endoftext|>", "<|endoftext|><|im_end|>"), ("a", "<|im_end|>"), ("a<|im_end|>", "")):
        (s,) = load(tmp_path, [{"text": text}], tokenizer, mask="full").examples[0].sequences
        assert tokenizer.decode(list(s.ids)).endswith(end) and list(s.trained) == [0] + [1] * (len(s) - 1)
        assert s.ids[-1] == tokenizer.eos_token_id and list(s.ids).count(s.ids[-1]) == (text + end).count("<|im_end|>")
    row = {"prompt": "# Question\na\n\n# Answer\n", "completion": "b"}
    (s,) = load(tmp_path, [row], tokenizer, mask="full").examples[0].sequences
    assert s.ids[-1] == tokenizer.eos_token_id and list(s.trained) == [0] + [1] * (len(s) - 1)


def test_a_model_that_was_trained_stops(tmp_path, capsys):
    """From rows to generated text: after a few steps on one answer the model says it and ends its turn."""
    tiny.folder(tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": "a?"}], "completion": [{"role": "assistant", "content": "Seven."}]}]
    data = {"train": tiny.write_jsonl(tmp_path / "d.jsonl", rows * 4)}
    settings = {"output_dir": tmp_path / "run", "epochs": 40, "batch_size": 4}
    recipe = tiny.recipe(
        tmp_path / "r.yaml", model={"path": tmp_path / "model"}, data=data, objective={"name": "sft"},
        optim={"lr": 1e-2, "precision": "fp32"}, train=settings, log={"plot": False},
    )  # fmt: skip
    run = train(load_config(recipe))
    model, tokenizer = folder.load_model(run / "model"), folder.load_tokenizer(run / "model")
    ids = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(out) == "Seven.<|im_end|>"
    assert cli.main(["data", str(recipe)]) == 0
    assert "end of turn <|im_end|> trained in 4/4" in capsys.readouterr().out
