# SPDX-License-Identifier: Apache-2.0
"""Which tokens are trained. The mask is read back as text: [[trained]]."""

import random
from dataclasses import replace

import pytest

import tiny
from fastpost import objectives
from fastpost.data.collate import IGNORE
from fastpost.data.loader import load_dataset
from fastpost.hf import attention
from fastpost.train.config import DataConfig
from fastpost.train.forward import forward

INST = (  # Mistral's shape: no header before a reply, so no generation prompt is needed
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # Qwen3's shape: the reasoning of earlier turns is taken out of the history
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def marked(tokenizer, sequence) -> str:
    text = "".join(
        f"[[{tokenizer.decode([i])}]]" if on else tokenizer.decode([i]) for i, on in zip(sequence.ids, sequence.trained)
    )
    return text.replace("]][[", "")


@pytest.fixture
def load(tmp_path):
    def load(rows, tokenizer, objective=None, **options):
        path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
        return load_dataset(DataConfig(train=str(path), **options), tokenizer, objective)

    return load


@pytest.fixture
def error(load):
    def error(*args, **options) -> str:
        with pytest.raises(ValueError) as caught:
            load(*args, **options)
        return str(caught.value)

    return error


def test_reply_and_its_end_of_turn_are_trained(load):
    tokenizer = tiny.tokenizer()
    data = load([{"prompt": [user("Hi?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No")]}], tokenizer)
    chosen, rejected = data.examples[0].sequences
    start = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert marked(tokenizer, chosen) == start + "[[Yes.<|im_end|>]]"
    assert marked(tokenizer, rejected) == start + "[[No<|im_end|>]]"


def test_end_of_turn_is_trained_when_pad_is_the_same_token(load):
    tokenizer = tiny.tokenizer(pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = load(tiny.preference_rows(8), tokenizer)
    assert data.report.ends_trained == data.report.sequences == 16
    assert all(s.ids[-1] == tokenizer.eos_token_id and s.trained[-1] for e in data.examples for s in e.sequences)


def test_several_turns(load):
    tokenizer = tiny.tokenizer()
    messages = [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    open_ = "<|im_start|>assistant\n"
    before = turn.format("system", "S") + turn.format("user", "a") + open_
    between = "\n" + turn.format("user", "c") + open_
    expected = {
        "reply": before
        + "[[b<|im_end|>]]"
        + between
        + "[[d<|im_end|>]]",  # the last user turn is seen by no trained token
        "last": before + "b<|im_end|>" + between + "[[d<|im_end|>]]",
    }
    for mask, text in expected.items():
        assert marked(tokenizer, load([{"messages": messages}], tokenizer, mask=mask).examples[0].sequences[0]) == text
    full = load([{"messages": messages}], tokenizer, mask="full").examples[0].sequences[0]
    assert full.trained == b"\0" + b"\1" * (len(full) - 1)
    assert tokenizer.decode(list(full.ids)) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_prompt_turns_of_a_pair_are_not_trained(load):
    tokenizer = tiny.tokenizer()
    prompt = [user("a"), assistant("b"), user("c")]
    data = load([{"prompt": prompt, "chosen": [assistant("d")], "rejected": [assistant("e")]}], tokenizer)
    assert marked(tokenizer, data.examples[0].sequences[0]).count("[[") == 1
    assert marked(tokenizer, data.examples[0].sequences[0]).endswith("[[d<|im_end|>]]")


@pytest.mark.parametrize("bos", [False, True], ids=["tokenizer adds none", "tokenizer adds BOS too"])
def test_exactly_one_bos_from_the_template(load, bos):
    """The template writes BOS, and the tokenizer would write another if the text were tokenised with special tokens."""
    tokenizer = tiny.tokenizer(tiny.LLAMA3, bos=bos)
    if bos:
        text = tokenizer.apply_chat_template([user("a")], tokenize=False)
        assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2  # the trap
    data = load(tiny.preference_rows(4), tokenizer)
    assert data.report.bos == 1
    assert all(list(s.ids).count(tokenizer.bos_token_id) == 1 for e in data.examples for s in e.sequences)
    assert marked(tokenizer, data.examples[0].sequences[0]).endswith("<|eot|>]]")


def test_plain_strings_get_one_bos_and_one_eos(load):
    tokenizer = tiny.tokenizer(bos=True)
    rows = [{"prompt": "<|bos|>a", "completion": " b<|im_end|>"}, {"prompt": "a", "completion": " b"}]
    data = load(rows, tokenizer, objectives.SFT())
    texts = [marked(tokenizer, e.sequences[0]) for e in data.examples]
    assert texts == ["<|bos|>a[[ b<|im_end|>]]"] * 2


def test_double_bos_is_refused(error):
    tokenizer = tiny.tokenizer(tiny.LLAMA3, bos=True)
    text = error([{"prompt": "<|bos|><|bos|>a", "completion": "b"}], tokenizer)
    assert "d.jsonl:1: the row begins with 2 BOS tokens ('<|bos|>')" in text
    text = error([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "<|bos|>b"}], tokenizer)
    assert "d.jsonl:2: the BOS token '<|bos|>' stands in the middle of the row" in text


def test_template_without_a_generation_prompt(error):
    text = error(tiny.preference_rows(2), tiny.tokenizer(tiny.NO_GENERATION_PROMPT))
    assert "d.jsonl:1: the chat template has no generation prompt: it writes '<|im_start|>assistant\\n' before" in text
    assert "{% if add_generation_prompt %}" in text


def test_template_that_needs_no_generation_prompt(load):
    tokenizer = tiny.tokenizer(INST, bos=True)
    data = load([{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}], tokenizer)
    text = marked(tokenizer, data.examples[0].sequences[0])
    assert text == "<|bos|>[INST] a [/INST][[ b<|im_end|>]][INST] c [/INST][[ d<|im_end|>]]"


def test_template_that_rewrites_history(load, error):
    tokenizer = tiny.tokenizer(FORGETFUL)
    messages = [user("a"), assistant("<think>x</think>b"), user("c"), assistant("<think>y</think>d")]
    text = error([{"messages": messages}], tokenizer)
    assert "the chat template rewrites the conversation: an earlier turn has '<think>" in text
    assert text.endswith("Set data.mask: last.")
    data = load([{"messages": messages}], tokenizer, mask="last")
    seen = "\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    assert marked(tokenizer, data.examples[0].sequences[0]).endswith(seen + "[[<think>y</think>d<|im_end|>]]")


def test_no_template(error):
    assert "this tokenizer has no chat template" in error(tiny.preference_rows(1), tiny.tokenizer(None))


def test_prompt_and_reply_that_would_share_a_token(load):
    """Tokenised in one go, ' answer' is one token; the model is served the prompt alone, so the mask must cut there."""
    tokenizer = tiny.tokenizer()
    assert len(tokenizer(" answer")["input_ids"]) == 1
    data = load([{"prompt": "The ", "completion": "answer"}], tokenizer)
    sequence = data.examples[0].sequences[0]
    assert marked(tokenizer, sequence) == "The [[answer<|im_end|>]]"
    prompt = tokenizer("The ")["input_ids"]
    assert list(sequence.ids[: len(prompt)]) == prompt and data.report.merged == 1


def test_implicit_prompt(load, error):
    tokenizer = tiny.tokenizer()
    shared = [user("a")]
    row = {"chosen": shared + [assistant("b")], "rejected": shared + [assistant("c")]}
    explicit = {"prompt": shared, "chosen": [assistant("b")], "rejected": [assistant("c")]}
    with_copy = {"prompt": "a", **row}  # the question once more as a string, as many published sets have it
    got = [load([r], tokenizer).examples[0] for r in (explicit, row, with_copy)]
    assert got[0] == got[1] == got[2]
    strings = load([{"chosen": "What is it? Seven apples", "rejected": "What is it? Several"}], tokenizer).examples[0]
    assert [marked(tokenizer, s) for s in strings.sequences] == [
        "What is it?[[ Seven apples<|im_end|>]]", "What is it?[[ Several<|im_end|>]]",
    ]  # fmt: skip
    equal = load([{"chosen": shared + [assistant("b")], "rejected": shared + [assistant("b")]}], tokenizer)
    assert equal.report.identical == 1
    assert "share no first message" in error([{"chosen": [assistant("b")], "rejected": [assistant("c")]}], tokenizer)


def test_formats_must_agree(error):
    text = error([{"prompt": "a", "chosen": [assistant("b")], "rejected": "c"}], tiny.tokenizer())
    assert "column 'chosen' is a list of messages but 'rejected' is a string. Use the same format in both." in text
    text = error([{"prompt": [user("a")], "completion": "b"}], tiny.tokenizer())
    assert "column 'prompt' is a list of messages but 'completion' is a string." in text
    text = error([{"text": "a"}, {"text": [user("b")]}], tiny.tokenizer())
    assert "d.jsonl:2: strings and message lists are mixed in this file." in text
    text = error([{"prompt": [user("a")], "completion": [user("b")]}], tiny.tokenizer())
    assert "column 'completion' begins with role 'user'" in text
    assert "no assistant turn" in error([{"messages": [user("a")]}], tiny.tokenizer())
    assert "begins with the assistant" in error([{"messages": [assistant("a")]}], tiny.tokenizer())


def test_strings_as_chat(load):
    tokenizer = tiny.tokenizer()
    chat = load([{"prompt": [user("a")], "completion": [assistant("b")]}], tokenizer)
    strings = load([{"prompt": "a", "completion": "b"}], tokenizer, format="chat")
    assert chat.examples == strings.examples


def test_text_trains_everything_but_the_first_token(load):
    tokenizer = tiny.tokenizer()
    assert marked(tokenizer, load([{"text": "abc"}], tokenizer).examples[0].sequences[0]) == "a[[bc<|im_end|>]]"


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.LLAMA3, INST], ids=["chatml", "llama3", "inst"])
def test_any_chat_trains_its_replies_and_is_served_as_trained(load, template):
    """Random chats: the trained text is the replies with their ends, and before a reply stands what serving sends."""
    tokenizer, draw = tiny.tokenizer(template, bos=True), random.Random(1)
    end = "<|eot|>" if template == tiny.LLAMA3 else "<|im_end|>"
    pieces = ["the answer", "7", "é", "\n\n", "in ", " seven", "?", "[INST]", "漢", "  two  spaces", "user\n"]

    def text():
        return "".join(draw.choices(pieces, k=draw.randint(1, 6))).strip() or "x"

    chats = [[m for _ in range(draw.randint(1, 4)) for m in (user(text()), assistant(text()))] for _ in range(150)]
    data = load([{"messages": chat} for chat in chats], tokenizer)
    assert len(data) == len(chats)
    for chat, example in zip(chats, data.examples):
        (sequence,) = example.sequences
        replies = [m["content"] + end for m in chat if m["role"] == "assistant"]
        space = " " if template == INST else ""
        trained = tokenizer.decode([i for i, on in zip(sequence.ids, sequence.trained) if on])
        assert trained == "".join(space + r for r in replies)
        served = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        last = bytes(sequence.trained).rfind(0) + 1  # where the last reply begins
        assert list(sequence.ids[:last]) == tokenizer(served, add_special_tokens=False)["input_ids"]


def test_half_a_surrogate_pair_names_its_row(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b\\ud83d"}\n')
    with pytest.raises(ValueError) as caught:
        load_dataset(DataConfig(train=str(path)), tiny.tokenizer())
    text = "d.jsonl:2: the text holds \\ud83d, half of a surrogate pair and no character. Remove it."
    assert str(caught.value).endswith(text)
    path.write_text('{"text": "\\ud83d\\ude42"}\n')
    assert len(load_dataset(DataConfig(train=str(path)), tiny.tokenizer())) == 1


@pytest.mark.parametrize("kind", ["chat", "text", "question"])
@pytest.mark.parametrize("mask", ["full", "reply"])
def test_a_changed_label_of_the_prompt(load, mask, kind):
    """ANITA and ATS train the whole text: another label in the prompt is another loss. Masked, it is not."""
    rows = {
        "chat": {"messages": [user("What is 7 + 5?"), assistant("12")]},
        "text": {"text": "What is 7 + 5? 12<|endoftext|>"},
        "question": {"prompt": "# Question\nWhat is 7 + 5?\n\n# Answer\n", "completion": "12"},
    }
    data = load([rows[kind]], tiny.tokenizer(), objectives.SFT(), mask=mask)
    attention.register()
    model = tiny.model()
    model.set_attn_implementation(attention.NAME)
    batch = data.batch([0])
    prompt, end = 4, len(data.examples[0].sequences[0]) - 1
    losses = []
    for position in (None, prompt, end):
        target = batch.target.clone()
        if position is not None and target[position - 1] != IGNORE:
            target[position - 1] = 99
        losses.append(forward(model, replace(batch, target=target), objectives.SFT()).loss.item())
    whole = mask == "full" or kind == "text"
    assert (losses[1] != losses[0]) == whole and losses[2] != losses[0]
    assert batch.scored == (end if whole else len("12") + 1)
