# SPDX-License-Identifier: Apache-2.0
"""What tools/quickstart does once fastpost is installed: model, data, before, training, after, table.

    python -m fastpost.cli.quickstart --seed 0

The training is `fastpost train` with the recipe quickstart.yaml. Accuracy is the share of held-out pairs in which the
right solution has the higher log-prob per token, margin the mean difference; both are SimPO's own measures.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastpost.train.config import Config

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
HELD_OUT = 84  # pairs in each held-out set: six of each training family
SETS = {"same": "same families, new problems", "new": "families never trained on"}
ANSWER_TOKENS = 96


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/quickstart", description="Train SmolLM2-135M on word problems.")
    parser.add_argument("--seed", type=int, default=0, help="seeds problems, order and sampled answers (0)")
    parser.add_argument("--steps", type=int, help="optimizer steps (the recipe's number)")
    parser.add_argument("--out", type=Path, help="run folder (the next free runs/quickstart...)")
    parser.add_argument("--elapsed", type=float, default=0.0, help="seconds spent before, for the clock")
    args = parser.parse_args(argv)
    try:
        run(args.seed, args.steps, args.out, Clock(args.elapsed))
    except ValueError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    return 0


class Clock:
    """Prints what comes next, with the seconds since the beginning."""

    def __init__(self, elapsed: float = 0.0):
        self.start = time.monotonic() - elapsed

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:3.0f} s] {text}", flush=True)


class Look(NamedTuple):
    """A model seen from outside: set -> (accuracy, margin), and its sampled answer to the first problem of each set."""

    scores: dict[str, tuple[float, float]]
    answers: dict[str, str]


def run(seed: int, steps: int | None, out: Path | None, clock: Clock) -> Path:
    """The whole tour; returns the run folder. Raises ValueError for a used folder or a model that cannot be had."""
    out = fresh(out)
    clock.say("model: SmolLM2-135M-Instruct (fetched once, then from the cache)")
    from fastpost.data import word_problems
    from fastpost.hf import smollm2
    from fastpost.train.config import load_config
    from fastpost.train.loop import train

    model = smollm2.fetch()
    # beside the run, not in it: the run folder belongs to `fastpost train`
    data = word_problems.write(out.parent / f"word-problems-seed{seed}", seed=seed, held_out=HELD_OUT)
    questions = {name: word_problems.problems(name, 1, seed)[0] for name in SETS}
    options = {"model.path": model, "data.train": data["train"], "data.eval": "null"}  # the table below scores them
    options |= {"train.output_dir": out, "train.seed": seed}
    if steps is not None:
        options["train.max_steps"] = steps
    overrides = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    cfg = load_config(RECIPE, overrides)

    clock.say(f"before: {HELD_OUT} held-out pairs of each kind, and two answers")
    before = look(cfg, model, data, questions, seed)
    clock.say(f"train: fastpost train {RECIPE.name} {' '.join(overrides)}")
    train(cfg)
    clock.say("after: the same pairs and the same questions")
    after = look(cfg, out / "model", data, questions, seed)
    clock.say("done")
    print("\n".join(["", *table(before, after), *answers(before, after, questions), "", *next_commands(out, data)]))
    return out


def fresh(out: Path | None) -> Path:
    """The run folder: `out`, which must not exist, or the first free of runs/quickstart, runs/quickstart-2, ..."""
    if out is not None:
        if out.exists():
            raise ValueError(f"--out: expected a new folder, got {out}, which exists. Choose another name.")
        return out
    number, path = 1, Path("runs/quickstart")
    while path.exists():
        number += 1
        path = path.with_name(f"quickstart-{number}")
    return path


def look(cfg: Config, path: Path, data: dict[str, Path], questions: dict[str, dict], seed: int) -> Look:
    """Score the held-out sets, and sample an answer to each question, with the model at `path`."""
    import torch

    from fastpost import objectives
    from fastpost.data.loader import load_dataset
    from fastpost.generate import generate
    from fastpost.hf import folder
    from fastpost.train.evaluate import evaluate

    objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
    tokenizer = folder.load_tokenizer(path)
    model = folder.load_model(path, torch.bfloat16, cfg.model.attention)
    scores = {}
    for name in SETS:
        rows = load_dataset(cfg.data, tokenizer, objective, path=data[name])
        parts = rows.micro_batches(list(range(len(rows))), cfg.train.max_tokens_per_micro_batch, None)
        means = evaluate(model, objective, map(rows.batch, parts))
        # SimPO's reward is beta times the log-prob per token; the table shows the latter
        scores[name] = means["rewards/accuracies"], means["rewards/margins"] / objective.beta
    prompts = [row["prompt"] for row in questions.values()]
    texts = generate(model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, temperature=0.7, top_p=0.9, seed=seed)
    return Look(scores, {name: text for name, (text,) in zip(questions, texts)})


def table(before: Look, after: Look) -> list[str]:
    """Accuracy and margin before and after, a line for each held-out set."""
    lines = [f"{'held-out pairs':<34}  {'accuracy':^16}  {'margin (nats a token)':^21}"]
    for name, words in SETS.items():
        (accuracy, margin), (accuracy2, margin2) = before.scores[name], after.scores[name]
        head = f"{words} ({HELD_OUT})"
        lines.append(f"{head:<34}  {accuracy:5.1%} -> {accuracy2:5.1%}  {margin:+9.4f} -> {margin2:+8.4f}")
    return lines


def answers(before: Look, after: Look, questions: dict[str, dict]) -> list[str]:
    """The sampled answers, with the verdict of the verifiable reward."""
    from fastpost.data.word_problems import reward

    lines = []
    for name, row in questions.items():
        lines += ["", f"question ({SETS[name]}): {row['prompt'][-1]['content']}   [{row['answer']}]"]
        for when, seen in (("before", before), ("after", after)):
            text = seen.answers[name]
            lines.append(f"  {when}, {'right' if reward(text, row['answer']) else 'wrong'}:")
            lines += [f"    {line}" for line in text.splitlines()]
    return lines


def next_commands(out: Path, data: dict[str, Path]) -> list[str]:
    return [
        f"curves      {out}/loss.png",
        "",
        "next, with .venv/bin on your PATH:",
        f"  fastpost data {out}/config.yaml                  what the model saw, token by token",
        f'  fastpost generate {out} "Tom has 3 bags of 12 nuts and eats 5. How many are left?"',
        f"  fastpost eval {out}/config.yaml --data.eval {data['new']} --model {out}/model",
        "  fastpost recipes ls                              DPO, ORPO, KTO and others",
    ]


if __name__ == "__main__":
    sys.exit(main())
