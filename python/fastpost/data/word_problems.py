# SPDX-License-Identifier: Apache-2.0
"""Arithmetic word problems with a right and a plausibly wrong solution: a preference set and a verifiable reward.

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

Both solutions of a row are written in the same words, end in the same format, and differ only in what the error
changes. The wrong number is larger than the right one half of the time, and stays within a factor of two of it. So
length, wording and size of the answer do not tell right from wrong: one has to follow the arithmetic.

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
    "Ada Amir Ana Ben Bo Carla Chen Dana Diego Ela Emil Fatma Finn Grace Hana Hugo Ines Ivan Jade Jonas Kai Kofi Lara "
    "Leo Lina Mara Milo Nadia Nils Noor Olga Omar Pia Quinn Rosa Sami Sofia Tariq Uma Vera Wei Yara Zoe"
)
THINGS = (
    "apples balls beads books bricks buttons cards coins cookies crayons cups flags gloves hats keys lamps lemons "
    "marbles mugs nuts pears pencils pens plates plums puzzles ribbons rings shells spoons stamps stickers stones toys"
)
BOXES = ("bags", "boxes", "crates", "jars", "packs", "baskets", "tins")
NEUTRAL = ("That makes {eq} {unit}.", "This gives {eq} {unit}.", "So we get {eq} {unit}.")
SYSTEM = "Solve step by step. End with: The answer is (number)."

OPERATIONS = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left // right if right and left % right == 0 else -1,
}
CONFUSED = {"+": "-", "-": "+/", "*": "+/", "/": "-"}
# literals in a formula are unit factors; these are the ones people confuse them with
WRONG_FACTORS = {"60": (24, 50, 90, 100), "12": (6, 10, 15, 20), "7": (5, 6, 8, 10), "2": (3, 4)}
# how often a mistake is made where it is possible. What makes a wrong answer larger is possible more often than what
# makes it smaller; the weights of the operations even that out, so that each sign is as frequent in right as in wrong.
WEIGHTS = {"slip": 0.6, "operands": 3, "unit": 3, "dropped": 2.4, "decoy": 2}
WEIGHTS |= {"- for +": 6, "+ for -": 2, "+ for *": 0.3, "/ for *": 3, "- for /": 1, "/ for -": 3}
LARGEST, FACTOR, TRIES = 999, 2, 20000


class Line(NamedTuple):
    """One worked line: ``left op right = result``, made from ``family.steps[step]``."""

    step: int
    left: int
    op: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"


def solve(family: Family, numbers: dict[str, int], counted: bool, slip: tuple[int, int] = (-1, 0)) -> list[Line] | None:
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
        exact = OPERATIONS[op](a, b)
        result = exact + slip[1] if slip[0] == index else exact
        if exact <= 0 or not 0 < result <= LARGEST:
            return None
        values[name] = result
        lines.append(Line(index, a, op, b, result))
    return lines


def mistakes(family: Family, numbers: dict[str, int], told: bool | None) -> Iterator[tuple[str, list[Line] | None]]:
    """Every wrong way to work, as (kind, lines or None). told: the event counts; False: a decoy; None: no event."""
    counted = bool(told)
    for line in solve(family, numbers, counted):
        for size in (1, 2, 10) + ((line.left, line.right) if line.op == "*" else ()):
            yield "slip", solve(family, numbers, counted, (line.step, size))
            yield "slip", solve(family, numbers, counted, (line.step, -size))
        name, _, left, op, right = family.steps[line.step].formula.split()
        for other in CONFUSED[op]:
            yield (
                f"{other} for {op}",
                solve(_with(family, line.step, f"{name} = {left} {other} {right}"), numbers, counted),
            )
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
    for _ in range(TRIES):
        numbers = {name: rng.randint(*bounds) for name, bounds in family.numbers.items()}
        given = (family.name, *(value for name, value in numbers.items() if name != "e"))
        problem = (given, told is not None and numbers["e"])
        right = solve(family, numbers, bool(told))
        if right is None or problem in used or len(set(given)) < len(given):
            continue
        # a hash of its numbers decides, once and for all seeds, whether a problem is for training or held out
        held_out = zlib.crc32(repr(given).encode()) % 8 == 0
        if split != "new" and held_out != (split == "same"):
            continue
        wrong = [(kind, lines) for kind, lines in mistakes(family, numbers, told) if _plausible(right, lines, upward)]
        if wrong:
            break
    else:
        raise ValueError(
            f"[problems] count: expected fewer rows, got so many that the family {family.name!r} has no new problem. "
            "Ask for fewer, or widen its numbers in word_problem_families.py."
        )
    used.add(problem)
    kinds = sorted({kind for kind, _ in wrong})
    kind = rng.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
    rejected = rng.choice([lines for other, lines in wrong if other == kind])

    words = _words(rng) | numbers
    event = "" if told is None else (family.told if told else family.decoy).format(**words)
    question = rng.choice(family.questions).format(event=event, **words)
    phrases = [rng.choice((rng.choice(step.phrases or NEUTRAL), rng.choice(NEUTRAL))) for step in family.steps]

    def written(lines: list[Line]) -> list[dict]:
        text = [phrases[n.step].format(eq=n, unit=family.steps[n.step].unit.format(**words), **words) for n in lines]
        return [{"role": "assistant", "content": "\n".join([*text, f"The answer is {lines[-1].result}."])}]

    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        "chosen": written(right),
        "rejected": written(rejected),
        "family": family.name,
        "answer": right[-1].result,
        "wrong": rejected[-1].result,
        "error": "operation" if " for " in kind else kind,
        "error_step": next(i for i, (a, b) in enumerate(itertools.zip_longest(right, rejected)) if a != b),
    }


def _plausible(right: list[Line], wrong: list[Line] | None, upward: bool) -> bool:
    if wrong is None:
        return False
    answer, other = right[-1].result, wrong[-1].result
    return other != answer and (other > answer) == upward and answer <= FACTOR * other and other <= FACTOR * answer


def _words(rng: random.Random) -> dict[str, str]:
    names = NAMES.split()
    rng.shuffle(names)
    return {
        "A": names[0],
        "B": names[1],
        "C": names[2],
        "things": rng.choice(THINGS.split()),
        "boxes": rng.choice(BOXES),
    }


_ANSWER = re.compile(r"(?:####|answer is:?|\\boxed\{)[\s$*]*(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)


def final_answer(text: str) -> float | None:
    """The number after the last ``####``, ``answer is`` or ``\\boxed{``; None when there is none."""
    found = _ANSWER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def reward(completion: str | list[dict], answer: int | float) -> float:
    """1.0 when the completion (text, or messages whose last one counts) ends in the answer, else 0.0."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return float(final_answer(text) == answer)


def write(folder: str | Path, *, seed: int = 0, rows: int = 2000, held_out: int = 280) -> dict[str, Path]:
    """Write train.jsonl (``rows``), same.jsonl and new.jsonl (``held_out`` each); returns the paths by split."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, count in (("train", rows), ("same", held_out), ("new", held_out)):
        paths[split] = folder / f"{split}.jsonl"
        lines = [json.dumps(row) + "\n" for row in problems(split, count, seed)]
        paths[split].write_text("".join(lines), encoding="utf-8", newline="\n")
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
