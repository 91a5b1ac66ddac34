# SPDX-License-Identifier: Apache-2.0
"""Complaint 9: the last characters of the prompt and the first of the reply become one token, and the mask shifts.

The mistake: prompt + reply is tokenised in one go and the mask begins at len(tokens of the prompt)."""

import pytest

import tiny
from fastpost.data.loader import load_dataset
from fastpost.train.config import DataConfig

SPACED = (  # its generation prompt ends in a space
    "{% for m in messages %}{% if m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}{{ eos_token }}"
    "{% else %}USER: {{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
MERGING = [("The ", "answer"), ("What is", " the sum?"), ("a\n", "\nb"), (" an", "swer")]


def load(tmp_path, rows, tokenizer, **options):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    return load_dataset(DataConfig(train=str(path), **options), tokenizer)


def test_the_prompt_keeps_the_tokens_that_serving_sends(tmp_path):
    tokenizer, merged = tiny.tokenizer(), 0
    rows = [{"prompt": prompt, "completion": reply} for prompt, reply in MERGING]
    data = load(tmp_path, rows, tokenizer)
    for (prompt, reply), example in zip(MERGING, data.examples):
        (s,) = example.sequences
        served = tokenizer(prompt)["input_ids"]
        together = tokenizer(prompt + reply)["input_ids"]
        merged += together[: len(served)] != served
        assert list(s.ids[: len(served)]) == served
        assert list(s.trained) == [0] * len(served) + [1] * (len(s) - len(served))
        assert tokenizer.decode(list(s.ids)) == prompt + reply + "<|im_end|>"
    assert merged >= 2 and data.report.merged == merged, "the texts above were chosen because they merge"
    assert data.report.notes() == [
        f"{merged} sequences would share a token between prompt and reply; they are tokenised apart, as when serving"
    ]


def test_a_generation_prompt_that_ends_in_a_space(tmp_path):
    tokenizer = tiny.tokenizer(SPACED)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answer"}]}
    data = load(tmp_path, [row], tokenizer)
    (s,) = data.examples[0].sequences
    served = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
    assert list(s.ids[: len(served)]) == served and s.trained[len(served)] and data.report.merged == 1


def llama2():
    """A tokenizer that puts a space before whatever it encodes, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["</s>", "<unk>", "▁", *"abcdeTh\n", "▁a", "▁b", "ab", "▁ab"]
    vocab = {t: i for i, t in enumerate(letters)}
    raw = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prompt, reply", [("The ", "ab"), ("a b", "b"), ("a ", " ab")])
def test_a_reply_tokenised_apart_gets_no_space_of_its_own(tmp_path, prompt, reply):
    tokenizer = llama2()
    data = load(tmp_path, [{"prompt": prompt, "completion": reply}], tokenizer)
    (s,) = data.examples[0].sequences
    text = "".join(tokenizer.convert_ids_to_tokens(list(s.ids))).replace("▁", " ")
    assert text == f" {prompt}{reply}</s>"
    served = tokenizer(prompt)["input_ids"]
    assert list(s.ids[: len(served)]) == served and bytes(s.trained).find(1) == len(served)
