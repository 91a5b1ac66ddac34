# SPDX-License-Identifier: Apache-2.0
"""The word problems in the columns of each kind of training, small enough for a first run on a CPU.

    python -m fastpost.data.word_problem_forms DATA     # DATA/pairs/train.jsonl, DATA/pairs/same.jsonl, ...

    pairs       prompt, chosen, rejected, as word_problems writes them
    chats       messages: the question and its right solution
    marks       prompt, completion, label: right and wrong solutions, one by one, of different problems
    parts       prompt, rationale, answer: the right solution cut before its last line
    dialogues   chosen, rejected, turn, chosen_reward, rejected_reward: several problems in a row, the same up to turn
                `turn`, which was answered twice; the rewards count the right answers of each dialogue
    texts       text: question and right solution, from few worked lines to many (a curriculum in file order)
    drills      text: worked lines without their stories
    everyday    text: sentences about people and things without sums, in the place of general text

The splits train, same and new are those of word_problems. Rows are a pure function of (form, split, seed, index)."""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from .word_problems import BOXES, NAMES, THINGS, problems

ROWS = {"train": 1600, "same": 200, "new": 200}
"""Problems that each split draws on."""
TURNS = 3
"""Most assistant turns of a dialogue."""

COLOURS = "red blue green yellow white grey brown black".split()
PLACES = ("garden", "kitchen", "harbour", "library", "market", "station", "school", "workshop", "park", "bakery")
SENTENCES = (
    "{A} keeps {colour} {things} in a box by the window.",
    "In the morning the {place} is quiet, and {A} likes to sit there with a cup of tea.",
    "{B} asks {A} whether the {things} are for the children.",
    "The road to the {place} is wet, because it has rained all night.",
    "{A} and {B} have known each other since they were at school.",
    "Nobody at the {place} can say who left the {colour} {things} on the bench.",
    "{B} paints the door of the {place} {colour} and puts the brush away.",
    "When the wind comes from the sea, the {boxes} in front of the {place} have to be tied down.",
    "{A} writes a letter about it and forgets to post it.",
    "The old {place} has a {colour} roof, which can be seen from the hill.",
    "{B} would rather talk about the {things} than about the weather.",
    "Later they walk home together and say little.",
    "{A} has lost the key again, so {B} waits at the {place}.",
    "There is a smell of fresh bread, and somebody is singing.",
)


def pairs(split: str, seed: int = 0) -> list[dict]:
    return problems(split, ROWS[split], seed)


def chats(split: str, seed: int = 0) -> list[dict]:
    return [{"messages": row["prompt"] + row["chosen"]} for row in pairs(split, seed)]


def marks(split: str, seed: int = 0) -> list[dict]:
    rows = enumerate(pairs(split, seed))
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, row in rows
    ]


def parts(split: str, seed: int = 0) -> list[dict]:
    rows = []
    for row in pairs(split, seed):
        rationale, _, answer = row["chosen"][0]["content"].rpartition("\n")
        rows.append({"prompt": row["prompt"], "rationale": rationale + "\n", "answer": answer})
    return rows


def dialogues(split: str, seed: int = 0) -> list[dict]:
    """As REFUEL samples them: the length H' of a dialogue is uniform, the turn h that is answered twice uniform up to
    it. Turns before h are right; what comes after may be right or wrong in either dialogue."""
    found, rows = pairs(split, seed), []
    for index in range(len(found) // TURNS):
        draw = random.Random(f"fastpost dialogues {seed} {split} {index}")
        turns = found[index * TURNS : (index + 1) * TURNS]
        last = draw.randrange(TURNS)
        h = draw.randint(0, last)
        right = [[True] * h + [first] for first in (True, False)]
        while True:
            whole = [r + [draw.random() < 0.75 for _ in range(last - h)] for r in right]
            if sum(whole[0]) != sum(whole[1]):
                break
        whole.sort(key=sum, reverse=True)
        chosen, rejected = ([turns[0]["prompt"][0], *_spoken(turns, answers)] for answers in whole)
        rows.append(
            {
                "chosen": chosen,
                "rejected": rejected,
                "turn": h,
                "chosen_reward": sum(whole[0]),
                "rejected_reward": sum(whole[1]),
            }
        )
    return rows


def _spoken(turns: list[dict], right: list[bool]) -> list[dict]:
    return [m for row, ok in zip(turns, right) for m in (row["prompt"][-1], *row["chosen" if ok else "rejected"])]


def texts(split: str, seed: int = 0) -> list[dict]:
    rows = pairs(split, seed)
    rows.sort(key=lambda row: len(row["chosen"][0]["content"].splitlines()))
    return [
        {"text": f"# Question\n{row['prompt'][-1]['content']}\n\n# Answer\n{row['chosen'][0]['content']}"}
        for row in rows
    ]


def drills(split: str, seed: int = 0) -> list[dict]:
    rows = []
    for row in pairs(split, seed):
        *lines, _ = row["chosen"][0]["content"].splitlines()
        words = (line.rstrip(".").split() for line in lines)
        rows.append({"text": "\n".join(_equation(list(line)) for line in words)})
    return rows


def _equation(words: list[str]) -> str:
    at = words.index("=")
    return " ".join(words[at - 3 : at + 2])


def everyday(split: str, seed: int = 0) -> list[dict]:
    rows = []
    for index in range(ROWS[split]):
        draw = random.Random(f"fastpost everyday {seed} {split} {index}")
        a, b = draw.sample(NAMES.split(), 2)
        sentences = draw.sample(SENTENCES, draw.randint(4, 8))
        words = {"A": a, "B": b, "place": draw.choice(PLACES)}
        text = " ".join(
            s.format(
                **words,
                colour=draw.choice(COLOURS),
                things=draw.choice(THINGS.split()),
                boxes=draw.choice(BOXES),
            )
            for s in sentences
        )
        rows.append({"text": text})
    return rows


FORMS: dict[str, Callable[..., list[dict]]] = {
    f.__name__: f for f in (pairs, chats, marks, parts, dialogues, texts, drills, everyday)
}


def write(folder: str | Path, form: str, split: str, seed: int = 0) -> Path:
    """Write folder/form/split.jsonl and return it; the file appears when it is complete. ValueError for a form or
    split that does not exist."""
    if form not in FORMS or split not in ROWS:
        raise ValueError(
            f"[word problems] {form}/{split}.jsonl: expected a form ({', '.join(FORMS)}) and a split "
            f"({', '.join(ROWS)}), got another. Choose e.g. pairs/train.jsonl."
        )
    path = Path(folder) / form / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    lines = [json.dumps(row) + "\n" for row in FORMS[form](split, seed)]
    draft.write_text("".join(lines), encoding="utf-8", newline="\n")
    os.replace(draft, path)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the word problems in the columns of each kind of training.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for form in FORMS:
        for split in ROWS:
            print(write(args.folder, form, split, args.seed))


if __name__ == "__main__":
    main()
