# SPDX-License-Identifier: Apache-2.0
"""Any chat, any template, any limit: no token is trained that is not part of a reply, and packing changes no target.

Rows are drawn by hypothesis. The oracle is slow and shares nothing with the code under test: it writes each template's
text by hand, notes which bytes are replies, lays the tokens over these bytes one after the other, and cuts token lists
with plain list operations. One case = one row through load_dataset under one template, mask and pair of limits."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

import tiny
from fastpost.data.chat import STAND_IN
from fastpost.data.loader import load_dataset
from fastpost.train.config import DataConfig

MISTRAL = (  # no header before a reply, so it needs no generation prompt
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
VICUNA = (  # its generation prompt ends in a space, which the tokenizer would take into the reply's first token
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}"
    "{{ eos_token }}{% else %}USER: {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
ROWS = 8  # a file in one example


def chatml(m):
    return [(f"<|im_start|>{m['role']}\n", False), (m["content"] + "<|im_end|>", True), ("\n", False)]


def llama3(m):
    return [(f"<|start|>{m['role']}<|end|>\n\n", False), (m["content"].strip() + "<|eot|>", True)]


def mistral(m):
    reply = m["role"] == "assistant"
    return [(f" {m['content']}<|im_end|>", True)] if reply else [(f"[INST] {m['content']} [/INST]", False)]


def vicuna(m):
    reply = m["role"] == "assistant"
    return (
        [("ASSISTANT: ", False), (m["content"] + "<|im_end|>", True)] if reply else [(f"USER: {m['content']} ", False)]
    )


@dataclass(frozen=True)
class Template:
    jinja: str | None
    write: object = None  # message -> [(text, is a reply if the assistant says it)]
    bos: bool = False


TEMPLATES = {
    "chatml": Template(tiny.CHATML, chatml),
    "llama3": Template(tiny.LLAMA3, llama3, bos=True),
    "mistral": Template(MISTRAL, mistral, bos=True),
    "vicuna": Template(VICUNA, vicuna, bos=True),
    "headless": Template(tiny.NO_GENERATION_PROMPT),
    "plain": Template(None, bos=True),
}


@cache
def tokenizer(name: str):
    return tiny.tokenizer(TEMPLATES[name].jinja, bos=TEMPLATES[name].bos)


@cache
def token_bytes(name: str) -> dict[int, bytes]:
    byte_of = {c: b for b, c in bytes_to_unicode().items()}
    raw = {i: t for t, i in tokenizer(name).get_vocab().items()}
    return {i: t.encode() if t in tiny.SPECIAL else bytes(byte_of[c] for c in t) for i, t in raw.items()}


# ---- what is drawn ---------------------------------------------------------------------------------------------------

PIECES = [
    *("the answer", " seven", "The ", "answer", " the", "re", "basket", "sum ", "in", "7", "?", "  two  spaces"),
    *("user\n", "assistant", "ASSISTANT: ", "[INST]", "[/INST]", "</s>"),
    *("", " ", "\n", "\n\n", "\t", "\u2028", "\x85", "\x00", "\u200b", "\u202e"),
    *("é", "e\u0301", "漢字", "🙂", "👩‍👩‍👧", "\U0010ffff", STAND_IN, STAND_IN[0]),
    *("<", "<|", "|>", "<|im_end|>", "<|im_start|>assistant\n", "<|eot|>", "<|endoftext|>", "<|end|>\n\n"),
]
TEXT = st.one_of(st.lists(st.sampled_from(PIECES), max_size=4).map("".join), st.text(max_size=6))


def messages(*roles):
    return st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(roles), TEXT)


MESSAGE = messages("user", "assistant", "assistant")
FIRST = messages("system", "user", "user", "assistant")
CHAT = st.builds(lambda first, rest: [first, *rest], FIRST, st.lists(MESSAGE, max_size=4))
PAIR = st.one_of(
    st.tuples(TEXT, TEXT),
    st.tuples(st.sampled_from(["The ", " ", "in\n", " ans"]), st.sampled_from(["answer", "the", "\n", "wer"])),  # merge
    st.tuples(TEXT, st.sampled_from(["<|eot|> \n", "7<|im_end|>", "7<|im_end|>\n", "<|endoftext|>\n\n", " \n"])),
)
MASK = st.sampled_from(["reply", "reply", "last", "turn", "full"])
LIMITS = st.fixed_dictionaries(
    {
        "max_length": st.sampled_from([2, 12, 24, 40, 60, 90, 4096, 4096]),
        "truncation": st.sampled_from(["completion", "drop"]),
    },
    optional={"max_prompt_length": st.sampled_from([1, 2, 12, 20, 30, 50])},
).map(lambda d: {k: v for k, v in d.items() if k != "max_prompt_length" or v < d["max_length"]})


# ---- the oracle ------------------------------------------------------------------------------------------------------


def pieces(name: str, messages: list[dict], turns: list[int]) -> list[tuple[bytes, bool]]:
    """The rendering in order: (bytes, to be trained)."""
    found = [(b"<|bos|>", False)] if TEMPLATES[name].bos else []
    for k, message in enumerate(messages):
        found += [(text.encode(), on and k in turns) for text, on in TEMPLATES[name].write(message)]
    return found


def turns_of(messages: list[dict], mask: str, turn: int | None, first: int = 0) -> list[int] | str:
    """Positions of the messages to train, or why the row is dropped."""
    turns = [k for k, m in enumerate(messages) if m["role"] == "assistant" and k >= first]
    if mask == "turn" and turn is not None:
        turns = [[k for k, m in enumerate(messages) if m["role"] == "assistant"][turn]]
    turns = turns[-1:] if mask == "last" or (mask == "turn" and turn is None) else turns
    return "no assistant turn" if not turns else "begins with the assistant" if turns[0] == 0 else turns


def lay(name: str, ids, rendering: list[tuple[bytes, bool]], whole: bool) -> list[bool]:
    """For each token whether its bytes are a reply's; fails where a token lies over a border or bytes differ."""
    on_byte = [on for text, on in rendering for _ in text]
    text = b"".join(text for text, _ in rendering)
    on_token, at = [], 0
    for token in ids:
        width = len(token_bytes(name)[token])
        assert text[at : at + width] == token_bytes(name)[token], "tokens do not spell the rendering"
        assert len(set(on_byte[at : at + width])) == 1, "a token lies over the border of a reply"
        on_token.append(on_byte[at])
        at += width
    rest = on_byte[at:]
    assert not rest if whole else not any(rest), "the sequence ends before its last reply does"
    return on_token


def cut(ids: list[int], reply: list[bool], mask: str, limits: dict, bos: int) -> tuple | str:
    """(ids, trained) under the limits, or why the row is dropped."""
    prompt, shorter = reply.index(True), False
    most = limits.get("max_prompt_length")
    if most is not None and prompt > most:
        if limits["truncation"] == "drop":
            return "prompt exceeds max_prompt_length"
        keep = min(bos, most)
        gone = range(keep, prompt - (most - keep))
        ids, reply = ([x for i, x in enumerate(xs) if i not in gone] for xs in (ids, reply))
        shorter = True
    if len(ids) > limits["max_length"]:
        if limits["truncation"] == "drop":
            return "exceeds max_length"
        ids, reply, shorter = ids[: limits["max_length"]], reply[: limits["max_length"]], True
    trained = [i > 0 and (on or mask == "full") for i, on in enumerate(reply)]
    if not any(trained) or not any(reply[1:] if mask != "full" else reply):
        return "prompt fills max_length" if shorter else "nothing to train"
    return ids, trained


def load(path, name, rows, **options):
    """The data set, or None when every row was dropped."""
    tiny.write_jsonl(path, rows)
    try:
        return load_dataset(DataConfig(train=str(path), **options), tokenizer(name))
    except ValueError as error:
        if "every row was dropped" not in str(error):
            raise
        return None


def check(path, name: str, rows: list[dict], expected: list, mask: str, limits: dict) -> None:
    """expected[i]: a reason, or the renderings of row i's sequences, each a list of (bytes, to be trained)."""
    plain = {"format": "plain"} if name == "plain" else {}
    whole = load(path, name, rows, mask=mask, max_length=1 << 20, **plain)
    tokens = {}  # row -> [(ids, reply)]
    for example in whole.examples if whole else []:
        pair = zip(example.sequences, expected[example.row], strict=True)
        tokens[example.row] = [(list(s.ids), lay(name, s.ids, text, mask == "full")) for s, text in pair]
        for s, (_, reply) in zip(example.sequences, tokens[example.row]):
            assert list(s.trained) == [i > 0 and (on or mask == "full") for i, on in enumerate(reply)]
            assert any(s.trained) and (mask == "full" or s.trained[-1]), "nothing trained sees what stands last"
    alone = "nothing to train"  # a reply whose only token is the first of its row
    for i, e in enumerate(expected):
        assert (i in tokens) == (not isinstance(e, str)) or whole is None or whole.report.dropped[alone], (i, e)
    data = load(path, name, rows, mask=mask, **limits, **plain)
    got = {e.row: [(list(s.ids), list(s.trained)) for s in e.sequences] for e in (data.examples if data else [])}
    for row, sequences in tokens.items():
        bos = int(TEMPLATES[name].bos)
        fitted = [cut(ids, reply, mask, limits, bos) for ids, reply in sequences]
        if any(isinstance(f, str) for f in fitted):
            assert row not in got, fitted
        else:
            assert [(list(ids), list(map(bool, on))) for ids, on in got.pop(row)] == fitted
    assert not got
    if data:
        assert data.report.kept + data.report.dropped.total() == data.report.rows == len(rows)
        assert data.report.kept == len(data)
        packed(data)


def packed(data) -> None:
    """Any order, shared prompts and not: each position's target is the next token of its own sequence or none."""
    indices = list(range(len(data)))
    random.Random(len(data)).shuffle(indices)
    for share in (True, False):
        data.share_prompt = share
        batch = data.batch(indices)
        sequences = [s for i in indices for s in data.examples[i].sequences]
        ends, scored = batch.cu_seqlens.tolist(), 0
        ends_k = ends if batch.cu_seqlens_k is None else batch.cu_seqlens_k.tolist()
        keys = range(ends[-1]) if batch.key_rows is None else batch.key_rows.tolist()
        ids, places, target = batch.input_ids[0].tolist(), batch.position_ids[0].tolist(), batch.target.tolist()
        assert len(ends) == len(sequences) + 1 and ends[-1] == len(ids) == len(target)
        for n, s in enumerate(sequences):
            own, seen = range(ends[n], ends[n + 1]), keys[ends_k[n] : ends_k[n + 1]]
            assert [ids[k] for k in seen] == list(s.ids) and [places[k] for k in seen] == list(range(len(s)))
            assert list(seen[len(seen) - len(own) :]) == list(own)
            for row in own:
                t = places[row] + 1
                assert target[row] == (s.ids[t] if t < len(s) and s.trained[t] else -100)
            scored += sum(s.trained)
        assert sum(t != -100 for t in target) == scored


# ---- the properties --------------------------------------------------------------------------------------------------

CASES = {"rows": 0}


def chats(path, draw_name, chats, mask, limits, turn):
    rows, expected = [], []
    for messages in chats:
        said = sum(m["role"] == "assistant" for m in messages)
        which = turn % said if mask == "turn" and turn is not None and said else None
        rows.append({"messages": messages} if which is None else {"messages": messages, "turn": which})
        turns = turns_of(messages, mask, which)
        shown = messages if mask == "full" or isinstance(turns, str) else messages[: turns[-1] + 1]
        expected.append(turns if isinstance(turns, str) else [pieces(draw_name, shown, turns)])
    check(path, draw_name, rows, expected, mask, limits)
    CASES["rows"] += len(rows)


def pairs(path, name, drawn, mask, limits):
    rows, expected = [], []
    for prompt, chosen, rejected in drawn:
        replies = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
        prompt = [{"role": "user", "content": "q"}, *prompt]
        rows.append({"prompt": prompt, "chosen": replies[0], "rejected": replies[1]})
        expected.append([pieces(name, prompt + r, [len(prompt)]) for r in replies])
    check(path, name, rows, expected, mask, limits)
    CASES["rows"] += len(rows)


def plain(path, drawn, mask, limits):
    rows, expected = [], []
    for prompt, completion in drawn:
        rows.append({"prompt": prompt, "completion": completion})
        end = completion.rstrip() if completion.rstrip().endswith("<|im_end|>") else completion + "<|im_end|>"
        after = completion[len(end) :] if mask == "full" else ""
        rendering = [(b"<|bos|>", False), (prompt.encode(), False), (end.encode(), True), (after.encode(), False)]
        expected.append([rendering])
    check(path, "plain", rows, expected, mask, limits)
    CASES["rows"] += len(rows)


def headless(path, chats):
    """A template that ignores add_generation_prompt would have its headers trained: refused whatever the text is."""
    for messages in chats:
        turns = turns_of(messages, "reply", None)
        tiny.write_jsonl(path, [{"messages": messages}])
        refused = "every row was dropped" if isinstance(turns, str) else "the chat template has no generation prompt"
        with pytest.raises(ValueError, match=refused):
            load_dataset(DataConfig(train=str(path)), tokenizer("headless"))
        CASES["rows"] += 1


def run(path, examples: int) -> int:
    """`examples` draws of each property; returns how many rows they held."""
    CASES["rows"] = 0
    options = settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    name, many = st.sampled_from(["chatml", "llama3", "mistral", "vicuna"]), {"min_size": ROWS, "max_size": ROWS}
    turn = st.one_of(st.none(), st.integers(0, 5))
    pair = st.tuples(st.lists(MESSAGE, max_size=3), TEXT, TEXT)
    for function, drawn in (
        (chats, (name, st.lists(CHAT, **many), MASK, LIMITS, turn)),
        (pairs, (name, st.lists(pair, **many), st.sampled_from(["reply", "last", "turn", "full"]), LIMITS)),
        (
            plain,
            (st.lists(PAIR, **many), st.sampled_from(["reply", "full"]), LIMITS),
        ),
        (headless, (st.lists(CHAT, min_size=2, max_size=2),)),
    ):

        @options
        @given(st.tuples(*drawn))
        def case(values):
            function(path, *values)  # noqa: B023, called before the next turn of the loop

        case()
    return CASES["rows"]


def test_a_few(tmp_path):
    assert run(tmp_path / "d.jsonl", 12) >= 300


@pytest.mark.slow
def test_ten_thousand(tmp_path):
    assert run(tmp_path / "d.jsonl", 420) >= 10_000
