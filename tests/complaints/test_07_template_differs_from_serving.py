# SPDX-License-Identifier: Apache-2.0
"""Complaint 7: training writes another prompt than serving sends.

The mistakes: a template of the trainer's own, headers trained as part of a reply, a history that the template rewrites,
a template that is not exported as it came."""

import pytest

import tiny
from fastpost.data.loader import load_dataset
from fastpost.hf import folder
from fastpost.train.config import DataConfig

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # Qwen3's shape: what the model thought is taken out of earlier turns
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(tmp_path, rows, template, **options):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    return load_dataset(DataConfig(train=str(path), **options), tiny.tokenizer(template))


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.LLAMA3, MISTRAL], ids=["chatml", "llama3", "mistral"])
def test_what_stands_before_each_reply_is_what_serving_sends(tmp_path, template):
    tokenizer, rows = tiny.tokenizer(template), tiny.sft_rows(4)
    for row, example in zip(rows, load(tmp_path, rows, template).examples):
        (s,) = example.sequences
        begins = [t for t in range(1, len(s)) if s.trained[t] and not s.trained[t - 1]]
        turns = [k for k, m in enumerate(row["messages"]) if m["role"] == "assistant"]
        assert len(begins) == len(turns) == 2
        for begin, k in zip(begins, turns):
            served = tokenizer.apply_chat_template(row["messages"][:k], add_generation_prompt=True, return_dict=False)
            assert list(s.ids[:begin]) == served


def test_a_header_is_not_trained(tmp_path):
    """Whatever the reply is: '<' also stands in the header."""
    for reply in ("Yes.", "<", "<|im_start|>", ""):
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": reply}]}
        with pytest.raises(ValueError, match=r"the chat template has no generation prompt: it writes '<\|im_start\|>"):
            load(tmp_path, [row], tiny.NO_GENERATION_PROMPT)


def test_a_history_that_is_rewritten_is_refused_and_the_last_turn_is_exact(tmp_path):
    messages = []
    for i in range(2):
        messages += [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"<think>t</think>a{i}"}]
    with pytest.raises(ValueError, match=r"the chat template rewrites the conversation.*Set data.mask: last"):
        load(tmp_path, [{"messages": messages}], THINKING)
    (s,) = load(tmp_path, [{"messages": messages}], THINKING, mask="last").examples[0].sequences
    begin, tokenizer = bytes(s.trained).find(1), tiny.tokenizer(THINKING)
    served = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert list(s.ids[:begin]) == served and "<think>" not in tokenizer.decode(served)


def test_the_template_is_exported_as_it_came(tmp_path):
    source = tiny.folder(tmp_path / "model", template=tiny.LLAMA3)
    out = folder.save_folder(folder.load_model(source), source, tmp_path / "out")
    files = sorted(f.name for f in source.iterdir() if "token" in f.name or "template" in f.name)
    assert "chat_template.jinja" in files and "tokenizer.json" in files
    assert all((source / name).read_bytes() == (out / name).read_bytes() for name in files)
