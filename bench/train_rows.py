# SPDX-License-Identifier: Apache-2.0
"""The rows that whole training steps are measured on, as each side wants to read them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

PAIRED = {"sft": False, "dpo": True, "simpo": True}
"""Objectives that are measured -> whether a row is a pair."""


def texts(folder: Path, count: int) -> tuple[str, list[tuple[str, str, str]]]:
    """(where they come from, `count` times (question, right reply, wrong reply)): GSM8K from `folder`/train.jsonl, or
    fastpost's own word problems when there is no such file."""
    file, draw = folder / "train.jsonl", random.Random(0)
    if file.is_file():
        rows = map(json.loads, draw.sample(file.read_text(encoding="utf-8").splitlines(), count))
        return "GSM8K", [spoil(row["question"], row["answer"], draw) for row in rows]
    from fastpost.data.word_problems import problems

    source = "fastpost.data.word_problems (no GSM8K found: shorter rows than a real set's)"
    return source, [
        (r["prompt"][0]["content"], *(r[k][0]["content"] for k in ("chosen", "rejected")))
        for r in problems("train", count)
    ]


def write(folder: Path, rows: list[tuple[str, str, str]], objective: str, tokenizer) -> None:
    """`folder`/fastpost.jsonl and `folder`/trl.jsonl.

    Ours are messages. TRL's are text with the template applied to the prompt: given messages it would train on the line
    break that the template puts after the end-of-turn token, and on a second end-of-turn token.
    """
    columns = ("chosen", "rejected") if PAIRED[objective] else ("completion",)
    ours, trl = [], []
    for question, *replies in rows:
        prompt = [{"role": "user", "content": question}]
        named = list(zip(columns, replies))  # of an unpaired row the right reply alone
        ours.append({"prompt": prompt} | {k: [{"role": "assistant", "content": reply}] for k, reply in named})
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        trl.append({"prompt": text} | dict(named))
    for name, each in (("fastpost", ours), ("trl", trl)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in each), encoding="utf-8")


def spoil(question: str, answer: str, draw: random.Random) -> tuple[str, str, str]:
    """A GSM8K row -> (question, its solution, the solution with one result wrong and wrong from there on)."""
    results = re.findall(r"=[^<>]*>>([\d.]*\d)", answer)
    right = re.sub(r"<<.*?>>", "", answer).replace("####", "The answer is")
    slips = results or [right.split()[-1]]
    old = draw.choice(slips)
    new = str(int(float(old.replace(",", ""))) + draw.choice([-3, -2, 2, 3, 10]))
    begin = right.find(old)
    head, tail = right[:begin], re.sub(rf"(?<![\d.]){re.escape(old)}(?![\d])", new, right[begin:])
    final = right.split()[-1]
    if tail.endswith(final):  # the slip must reach the answer
        tail = tail[: -len(final)] + str(int(float(final.replace(",", ""))) + draw.choice([-4, -1, 1, 5]))
    return question, right, head + tail
