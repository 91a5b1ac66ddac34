# SPDX-License-Identifier: Apache-2.0
"""Whole optimizer steps beside TRL's: tokens per second, seconds, peak memory, loss.

    python -m bench.train_step --model DIR [--objective sft|dpo|simpo] [--rows 8] [--steps 4] [--repeat 2] [--json FILE]

`fastpost train` on one side; SFTTrainer (completion only), DPOTrainer (reference log-probs computed beforehand, on both
sides) or CPOTrainer (loss_type="simpo", cpo_alpha=0) on the other. Each side runs alone in a process of its own, taking
turns, on the same rows in the same order, one micro-batch a step. Equal on both sides and checked: token ids and which
are scored. Equal by construction: AdamW at a constant lr of 1e-6, the objective's settings, clipping at 1, no dropout.
Tokens are those of prompts and replies, without padding; a prompt that a pair shares counts twice on both sides. The
weights:

    trl             as it comes: float32 weights and moments under bf16 autocast (SFTTrainer and DPOTrainer load them so
                    whatever the files hold); right-padded batches; checkpointing ON. CPOTrainer keeps the dtype of the
                    files, which for SmolLM2 means bf16 weights and moments, whose updates mostly round away at this lr
    trl, float32    the first of these two, also for CPOTrainer; "trl, bf16 weights" is the second, also for the others
    fastpost        as it comes: float32 master weights and moments, bf16 compute; packed rows; selective recomputation

and each with gradient checkpointing OFF, ours with it in full and in pure bf16 too. SFTTrainer also runs padding-free,
and packing, when a step is one pack of up to 256 tokens for each of --rows and so has other rows.

Rows are GSM8K questions with their solution as chosen and the same solution with a slip that runs through to the end as
rejected, from $FASTPOST_GSM8K or --data (a folder with train.jsonl); without it fastpost's own word problems.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import train_rows
from bench.timing import CLOCKS
from bench.train_sides import MAX_LENGTH, SFT_ALONE, SIDES


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench.train_step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="Hugging Face folder of a chat model, as SmolLM2-135M-Instruct")
    parser.add_argument("--objective", default="simpo", choices=train_rows.PAIRED, help="sft, dpo or simpo (simpo)")
    parser.add_argument("--data", default=os.environ.get("FASTPOST_GSM8K", "gsm8k"), help="GSM8K folder")
    parser.add_argument("--rows", type=int, help="rows in a step (8, pairs: 4)")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run; the first is not timed (4)")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each side, in turns (2)")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="SIDE", help="any of (all): " + "; ".join(SIDES))
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: leaves out what others took (one thread)")
    parser.add_argument("--json", metavar="FILE", help="write every time, loss and peak")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps: expected at least 2, the first is not timed.")
    if args.clock == "cpu" and args.threads != [1]:
        parser.error("--clock cpu: adds up all threads. Use it with --threads 1.")
    if args.objective != "sft" and (wrong := set(args.sides or ()) & {*SFT_ALONE}):
        parser.error(f"--sides: TRL has '{sorted(wrong)[0]}' for sft only.")
    result = compare(
        args.model, args.objective, Path(args.data), rows=args.rows, steps=args.steps, repeat=args.repeat,
        threads=args.threads, sides=args.sides, clock=args.clock,
    )  # fmt: skip
    if args.json:
        from torch import device

        from bench.machine import describe

        Path(args.json).write_text(json.dumps(describe(device("cpu")) | result, indent=1) + "\n")


def compare(
    model: str,
    objective: str,
    data: Path,
    *,
    rows: int | None = None,
    steps: int = 4,
    repeat: int = 2,
    threads: list[int],
    sides: list[str] | None = None,
    clock: str = "wall",
) -> dict:
    """Run the sides in turns, print the table, return {"objective", "rows", "rows_a_step", "clock", "runs"}."""
    from transformers import AutoTokenizer

    size = rows or (4 if train_rows.PAIRED[objective] else 8)
    sides = sides or [side for side in SIDES if objective == "sft" or side not in SFT_ALONE]
    source, texts = train_rows.texts(data, size * steps)
    what = "pairs" if train_rows.PAIRED[objective] else "rows"
    print(f"{objective}: {size} {what} a step from {source}, at most {MAX_LENGTH} tokens; {steps - 1} timed steps")
    runs = []
    with tempfile.TemporaryDirectory() as name:
        train_rows.write(Path(name), texts, objective, AutoTokenizer.from_pretrained(model))
        for count in threads:
            for turn in range(repeat):
                for side in sides[:: -1 if turn % 2 else 1]:
                    given = ["--objective", objective, "--model", str(Path(model).resolve()), "--rows", str(size),
                             "--steps", str(steps), "--clock", clock]  # fmt: skip
                    runs.append({"side": side, "threads": count, **worker(side, Path(name), given, count)})
    check_rows(runs)
    for count in threads:
        report([r for r in runs if r["threads"] == count], sides, count)
    return {"objective": objective, "rows": source, "rows_a_step": size, "clock": clock, "runs": runs}


def worker(side: str, folder: Path, given: list[str], threads: int) -> dict:
    command = [sys.executable, "-m", "bench.train_sides", side, str(folder), *given]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"[bench] {side} stopped:\n{done.stderr[-3000:]}")
    return json.loads((folder / "result.json").read_text())


def check_rows(runs: list[dict]) -> None:
    """Same tokens, same mask, on both sides; anything else would compare two different jobs."""
    if len({r["digest"] for r in runs}) > 1:
        counts = {r["side"]: (r["tokens"], r["scored"]) for r in runs}
        sys.exit(f"[bench] the sides do not train on the same tokens. (tokens, scored) of each: {counts}")
    tokens = {r["side"].split(",")[0]: r["tokens"] for r in runs}
    print(f"All score the same {runs[0]['scored']} tokens, with the same tokens before them. In all: {tokens}")


def summary(runs: list[dict]) -> dict[str, float]:
    """Of the runs of one side: median seconds of a step, tokens per second over all timed steps, highest peak, memory
    before the first step and the loss of that step."""
    tokens, seconds = (sum(x for r in runs for x in r[name][1:]) for name in ("step_tokens", "seconds"))
    return {
        "seconds": statistics.median(t for r in runs for t in r["seconds"][1:]),
        "tps": tokens / seconds,
        "peak_gb": max(r["peak_gb"] for r in runs),
        "before_gb": runs[0]["before_gb"],
        "loss": runs[0]["loss"][0],
    }


def report(runs: list[dict], sides: list[str], threads: int) -> None:
    title = f"{threads} thread{'s' * (threads > 1)}"
    columns = f"{'s/step':>6} {'tok/s':>7} {'peak GB':>8} {'before GB':>10} {'loss at step 0':>15}"
    print(f"\n{title:40} {columns}")
    found = {side: summary([r for r in runs if r["side"] == side]) for side in sides}
    for side, s in found.items():
        memory = f"{s['peak_gb']:>8.2f} {s['before_gb']:>10.2f}"
        print(f"{side:40} {s['seconds']:>6.2f} {s['tps']:>7.1f} {memory} {s['loss']:>15.5f}")
    for side in sides if "fastpost" in found else ():
        if side.startswith("fastpost"):
            continue
        ours, theirs = found["fastpost"], found[side]
        speed, memory = ours["tps"] / theirs["tps"], ours["peak_gb"] / theirs["peak_gb"]
        print(f"fastpost does {speed:.2f} times the tokens per second of {side}, in {memory:.2f} of its peak memory")


if __name__ == "__main__":
    main()
