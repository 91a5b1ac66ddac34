# SPDX-License-Identifier: Apache-2.0
"""Per-row `tools` and `chat_template_kwargs`, and messages that call tools."""

import json

import pytest

import tiny
from fastpost.data.loader import load_dataset
from fastpost.train.config import DataConfig

TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}{{ style }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.get('tool_calls', []) %}<call>{{ c['function']['name'] }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking is defined and not thinking %}<think></think>"
    "{% endif %}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "description": "W", "parameters": {"type": "object"}}}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def load(path, rows, **options):
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        tiny.write_jsonl(path, rows)
    return load_dataset(DataConfig(train=str(path), **options), tiny.tokenizer(TOOLS))


def text(data, i=0) -> str:
    return tiny.tokenizer().decode(list(data.examples[i].sequences[0].ids))


@pytest.mark.parametrize("as_json", [False, True])
def test_each_row_has_its_own(tmp_path, as_json):
    spell = json.dumps if as_json else lambda value: value
    rows = [
        {"messages": CHAT, "tools": spell([TOOL]), "chat_template_kwargs": spell({"style": " terse"})},
        {"messages": CHAT},
        {"messages": CHAT, "tools": "" if as_json else [], "chat_template_kwargs": None},
    ]
    data = load(tmp_path / "d.jsonl", rows)
    assert (
        text(data).startswith("<|im_start|>system\n[") and "weather" in text(data) and "] terse<|im_end|>" in text(data)
    )
    assert text(data, 1) == text(data, 2) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"


def test_what_is_served_before_the_reply_gets_them_too(tmp_path):
    """thinking=False changes the generation prompt; the template does not repeat it, so the mask would not be exact."""
    with pytest.raises(ValueError, match=r"d.jsonl:1: the chat template rewrites the conversation"):
        load(tmp_path / "d.jsonl", [{"messages": CHAT, "chat_template_kwargs": {"thinking": False}}])


def test_parquet_fills_no_fields_in(tmp_path):
    """Arrow gives every struct the fields of all: nulls that the row never had must not reach the template."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]}
    rows = [
        {"messages": [CHAT[0], call], "tools": [TOOL]},
        {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "n", "strict": True}}]},
    ]
    one, two = load(tmp_path / "d.jsonl", rows), load(tmp_path / "d.parquet", rows)
    assert sorted(text(one).split()) == sorted(text(two).split()) and "null" not in text(two) + text(two, 1)
    assert "<call>weather</call><|im_end|>" in text(two) and "<call>" not in text(two, 1)


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"tools": {"a": 1}}, "d.jsonl:1: column 'tools': expected a list or JSON of one, got dict"),
        ({"tools": "[{"}, "d.jsonl:1: column 'tools': expected JSON, got broken JSON"),
        ({"chat_template_kwargs": "[]"}, "column 'chat_template_kwargs': expected an object or JSON of one, got list"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": True}},
            "column 'chat_template_kwargs': add_generation_prompt is set by fastpost. Remove it from the row.",
        ),
        (
            {"messages": [CHAT[0], {"role": "assistant", "tool_calls": None}]},
            "messages[1]: expected {'role', 'content'}",
        ),
    ],
)
def test_mistakes(tmp_path, row, expected):
    with pytest.raises(ValueError) as error:
        load(tmp_path / "d.jsonl", [{"messages": CHAT, **row}])
    assert expected in str(error.value)


def test_content_that_the_template_cannot_write(tmp_path):
    broken = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"messages": [CHAT[0], {"role": "assistant", "content": 3}]}])
    with pytest.raises(ValueError, match=r"d.jsonl:1: the chat template refuses this conversation: can only concat"):
        load_dataset(DataConfig(train=str(path)), tiny.tokenizer(broken))
