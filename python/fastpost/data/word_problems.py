# SPDX-License-Identifier: Apache-2.0
"""Arithmetic word problems with a right and a plausibly wrong worked solution: a preference set and a verifiable reward.

    python -m fastpost.data.word_problems data/ --seed 0        # train.jsonl, same.jsonl, new.jsonl
    rows = problems("train", 2000, seed=0)                      # the same rows as Python dicts
    reward("6 * 4 = 24\\nThe answer is 24.", 24)                # 1.0

Each row has TRL's columns ``prompt``, ``chosen``, ``rejected`` (message lists) and

    family      which kind of problem (``word_problem_families``)
    answer      the right final number, a positive integer
    wrong       the final number of the rejected solution
    error       slip: one line's result is miscalculated            operation: + for -, / for *, ...
                operands: two numbers of the problem are exchanged   unit: an hour of 100 minutes, a dozen of 10, ...
                dropped: an event that counts is left out           decoy: a number that must not count is used
    error_step  the first line (from 0) in which the rejected solution leaves the right path

Both solutions of a row are written in the same words, end in the same format, and differ only in what the error changes. The
wrong number is larger than the right one half of the time, and stays within a factor of three of it. So length, wording
and size of the answer do not tell right from wrong: one has to follow the arithmetic.

The rows are a pure function of (split, seed, index). Splits never share a problem: a family's numbers are used once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .word_problem_families import HELD_OUT, TRAINING, Family

NAMES = (
    "Ada Amir Ana Ben Bo Carla Chen Dana Diego Ela Emil Fatma Finn Grace Hana Hugo Ines Ivan Jade Jonas Kai Kofi Lara Leo Lina "
    "Mara Milo Nadia Nils Noor Olga Omar Pia Quinn Rosa Sami Sofia Tariq Uma Vera Wei Yara Zoe"
).split()
THINGS = (
    "apples balls beads books bricks buttons cards coins cookies crayons cups flags gloves hats keys lamps lemons marbles mugs nuts "
    "pears pencils pens plates plums puzzles ribbons rings shells spoons stamps stickers stones toys"
).split()
BOXES = "bags boxes crates jars packs baskets tins".split()
NEUTRAL = ("That makes {eq} {unit}.", "This gives {eq} {unit}.", "So we get {eq} {unit}.")
REQUEST = "\nEnd with: The answer is (number)."

OPERATIONS = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left // right if right and left % right == 0 else -1,
}
CONFUSED = {"+": "-*", "-": "+/", "*": "+/", "/": "*-"}
# literals in a formula are unit factors; these are the ones people confuse them with
WRONG_FACTORS = {"60": (24, 50, 90, 100), "12": (6, 10, 15, 20), "7": (5, 6, 8, 10), "2": (1, 3, 4)}
KIND_WEIGHTS = {"slip": 3, "operation": 3, "operands": 2, "unit": 2, "dropped": 4, "decoy": 4}
LARGEST, FACTOR = 2000, 3


class Line(NamedTuple):
    """One worked line: ``left op right = result``, made from ``family.steps[step]``."""

    step: int
    left: int
    op: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"


def solve(family: Family, numbers: dict[str, int], counted: bool, slip: tuple[int, int] | None = None) -> list[Line] | None:
    """Work through the steps. counted: the event's step belongs. slip: (step, amount by which its result is off).

    None when a result is not a whole number from 1 to ``LARGEST``.
    """
    values, lines = dict(numbers), []
    for index, step in enumerate(family.steps):
        name, _, left, op, right = step.formula.split()
        if step.event and not counted:
            values[name] = values[left]
            continue
        a, b = (values[word] if word in values else int(word) for word in (left, right))
        result = OPERATIONS[op](a, b)
        if slip and slip[0] == index:
            result += slip[1]
        if not 0 < result <= LARGEST:
            return None
        values[name] = result
        lines.append(Line(index, a, op, b, result))
    return lines


def mistakes(family: Family, numbers: dict[str, int], told: bool | None) -> Iterator[tuple[str, list[Line] | None]]:
    """Every wrong way to work as (kind, lines or None). told: the event counts; False: it is a decoy; None: it is absent."""
    counted = bool(told)
    for line in solve(family, numbers, counted):
        for size in (1, 2, 10) + ((line.left, line.right) if line.op == "*" else ()):
            yield "slip", solve(family, numbers, counted, (line.step, size))
            yield "slip", solve(family, numbers, counted, (line.step, -size))
        name, _, left, op, right = family.steps[line.step].formula.split()
        for other in CONFUSED[op]:
            yield "operation", solve(_with(family, line.step, f"{name} = {left} {other} {right}"), numbers, counted)
        for factor in WRONG_FACTORS.get(right, ()):
            yield "unit", solve(_with(family, line.step, f"{name} = {left} {op} {factor}"), numbers, counted)
    for first, second in itertools.combinations([n for n in numbers if n != "e" or told is not None], 2):
        yield "operands", solve(family, numbers | {first: numbers[second], second: numbers[first]}, counted)
    if told is not None:
        yield ("dropped" if told else "decoy"), solve(family, numbers, not counted)


def _with(family: Family, step: int, formula: str) -> Family:
    changed = replace(family.steps[step], formula=formula)
    return replace(family, steps=family.steps[:step] + (changed,) + family.steps[step + 1 :])


def problems(split: str, count: int, seed: int = 0) -> list[dict]:
    """``count`` rows of a split, the families taking turns.

    split: ``train``; ``same`` (held-out problems of the training families); ``new`` (families never trained on).
    """
    if split not in ("train", "same", "new"):
        raise ValueError(f"[problems] split: expected train, same or new, got {split!r}. Choose one of the three.")
    families = HELD_OUT if split == "new" else TRAINING
    used: set[tuple] = set()
    rngs = (random.Random(f"fastpost word problems {seed} {split} {index}") for index in range(count))
    return [_row(families[index % len(families)], split, rng, used) for index, rng in enumerate(rngs)]


def _row(family: Family, split: str, rng: random.Random, used: set[tuple]) -> dict:
    told = rng.choice((None, True, True, False, False))
    upward = rng.random() < 0.5
    numbers, right, wrong = {}, None, []
    while not wrong:
        numbers = {name: rng.randint(*bounds) for name, bounds in family.numbers.items()}
        key = (family.name, *(value for name, value in numbers.items() if name != "e"))
        right = solve(family, numbers, bool(told))
        # a hash of its numbers decides once and for all seeds whether a problem is for training or held out
        held_out = zlib.crc32(repr(key).encode()) % 8 == 0
        if right is None or key in used or len(set(key)) < len(key) or (split != "new" and held_out != (split == "same")):
            continue
        wrong = [(kind, lines) for kind, lines in mistakes(family, numbers, told) if lines and _plausible(right, lines, upward)]
    used.add(key)
    kinds = sorted({kind for kind, _ in wrong})
    kind = rng.choices(kinds, [KIND_WEIGHTS[kind] for kind in kinds])[0]
    rejected = rng.choice([lines for other, lines in wrong if other == kind])

    words = _words(rng) | numbers
    event = "" if told is None else (family.told if told else family.decoy).format(**words)
    question = rng.choice(family.questions).format(event=event, **words)
    phrases = [rng.choice((rng.choice(step.phrases or NEUTRAL), rng.choice(NEUTRAL))) for step in family.steps]

    def written(lines: list[Line]) -> list[dict]:
        text = [phrases[n.step].format(eq=n, unit=family.steps[n.step].unit.format(**words), **words) for n in lines]
        return [{"role": "assistant", "content": "\n".join([*text, f"The answer is {lines[-1].result}."])}]

    return {
        "prompt": [{"role": "user", "content": question + REQUEST}],
        "chosen": written(right),
        "rejected": written(rejected),
        "family": family.name,
        "answer": right[-1].result,
        "wrong": rejected[-1].result,
        "error": kind,
        "error_step": next((i for i, (a, b) in enumerate(zip(right, rejected)) if a != b), min(len(right), len(rejected))),
    }


def _plausible(right: list[Line], wrong: list[Line], upward: bool) -> bool:
    answer, other = right[-1].result, wrong[-1].result
    return other != answer and (other > answer) == upward and answer <= FACTOR * other and other <= FACTOR * answer


def _words(rng: random.Random) -> dict[str, str]:
    names = list(NAMES)
    rng.shuffle(names)
    return {"A": names[0], "B": names[1], "C": names[2], "things": rng.choice(THINGS), "boxes": rng.choice(BOXES)}


_ANSWER = re.compile(r"(?:####|answer is:?|\\boxed\{)[\s$*]*(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)


def final_answer(text: str) -> float | None:
    """The number after the last ``####``, ``answer is`` or ``\\boxed{``; None when there is none."""
    found = _ANSWER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def reward(completion: str | list[dict], answer: int | float) -> float:
    """1.0 when the completion's final answer is ``answer``, else 0.0. completion: text, or messages (the last one counts)."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return float(final_answer(text) == answer)


def write(folder: str | Path, *, seed: int = 0, rows: int = 2000, held_out: int = 280) -> dict[str, Path]:
    """Write train.jsonl (``rows``), same.jsonl and new.jsonl (``held_out`` each); returns the paths by split."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, count in (("train", rows), ("same", held_out), ("new", held_out)):
        paths[split] = folder / f"{split}.jsonl"
        paths[split].write_text("".join(json.dumps(row) + "\n" for row in problems(split, count, seed)), encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the word-problem preference set as jsonl.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2000, help="training rows")
    parser.add_argument("--held-out", type=int, default=280, help="rows in each held-out file")
    args = parser.parse_args()
    for path in write(args.folder, seed=args.seed, rows=args.rows, held_out=args.held_out).values():
        print(path)


if __name__ == "__main__":
    main()
