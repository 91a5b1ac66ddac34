# SPDX-License-Identifier: Apache-2.0
"""`fastpost train` as a whole: tokens per second beside TRL, what packing is worth, the time to the first step.

    python -m bench.train --model DIR [--data GSM8K] [--json]        writes bench/results/<machine>-train.json
    python -m bench.train --model DIR --quick                        shows that everything runs, not how fast

Runs bench.train_step for sft and dpo, bench.packing and bench.start, each of which says more and can be run alone; one
thread, CPU time unless a line says wall. The goals are those of the project: at least 1.5 times TRL's tokens per second
and 1.5 times those of padded rows, at most 15 s from the command to the first step, 0.4 s for `fastpost --help`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

import torch

from bench import machine, packing, start, train_step

TRL = ["trl", "trl, checkpointing off", "trl, bf16 weights, checkpointing off"]
PADDING_FREE = ["trl, padding-free, checkpointing off", "trl, padding-free, bf16 weights, checkpointing off"]
SIDES = {"sft": ["fastpost", *TRL, *PADDING_FREE], "dpo": ["fastpost", *TRL]}
TPS, PACKING, FIRST_STEP, HELP = 1.5, 1.5, 15.0, 0.4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="Hugging Face folder of a chat model, as SmolLM2-135M-Instruct")
    parser.add_argument("--data", default=os.environ.get("FASTPOST_GSM8K", "gsm8k"), help="GSM8K folder")
    parser.add_argument("--steps", type=int, default=3, help="steps of each run beside TRL; the first is not timed (3)")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each side, timed packed steps, warm starts (2)")
    parser.add_argument("--no-peers", action="store_true", help="leave TRL out")
    parser.add_argument("--quick", action="store_true", help="as little as possible of each")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="results/<machine>-train.json by default")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps: expected at least 2, the first is not timed.")
    if args.repeat < 1:
        parser.error(f"--repeat: expected at least 1, got {args.repeat}.")
    torch.set_num_threads(1)
    data, steps, repeat = Path(args.data), 2 if args.quick else args.steps, 1 if args.quick else args.repeat
    result = machine.describe(torch.device("cpu")) | {"model": Path(args.model).name}
    before = machine.probe()
    result["steps"], result["packing"] = [], []
    for objective, sides in SIDES.items():
        chosen = sides if not args.quick else [s for s in sides if s in ("fastpost", "trl, checkpointing off")]
        chosen = [s for s in chosen if s.startswith("fastpost") or not args.no_peers]
        part = train_step.compare(
            args.model, objective, data, rows=2 if args.quick else None, steps=steps, repeat=repeat, threads=[1],
            sides=chosen, clock="cpu",
        )  # fmt: skip
        result["steps"].append(part)
    for kind in packing.MEASURED:
        size = 4 if args.quick else 16
        case = packing.measure(args.model, kind, data, size=size, repeat=repeat, clock="cpu")
        print(packing.report(case), flush=True)
        result["packing"].append(case)
    few = ["--rows", "8"] if args.quick else []
    result["start"] = start.main(["--model", args.model, "--data", args.data, "--repeat", str(repeat), *few])
    after = machine.probe()
    result["probe"] = {"before": before, "after": after, "verdict": machine.verdict(before, after, "cpu")}
    print("\n" + "\n".join([*([] if args.quick else goals(result)), *result["probe"]["verdict"]]))
    if args.json is not None:
        path = Path(args.json or Path(__file__).parent / "results" / f"{result['machine']}-train.json")
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"Wrote {path}.")
    return 0


def goals(result: dict) -> list[str]:
    """A line for each goal: what was reached, and whether that is enough."""
    lines = []
    for part in result["steps"]:
        by_side = {r["side"]: [q for q in part["runs"] if q["side"] == r["side"]] for r in part["runs"]}
        tps = {side: train_step.summary(runs)["tps"] for side, runs in by_side.items()}
        if peers := [side for side in tps if side.startswith("trl")]:
            fastest = max(peers, key=tps.get)
            what = f"{part['objective']}: tokens/s over those of '{fastest}'"
            lines.append(_goal(what, tps["fastpost"] / tps[fastest], TPS))
    for case in result["packing"]:
        others = {form: packing.speedup(case, form) for form in case["seconds"] if form != "packed"}
        hardest = min(others, key=others.get)
        lines.append(_goal(f"{case['kind']}: tokens/s over those of '{hardest}' rows", others[hardest], PACKING))
    for one in result["start"]["starts"]:
        seconds = start.warm(one, "total") - start.warm(one, "first step")
        lines.append(_goal(f"{one['objective']}: seconds to the first step, wall", seconds, FIRST_STEP, most=True))
    lines.append(_goal("fastpost --help: seconds, wall", statistics.median(result["start"]["help"]), HELP, most=True))
    return lines


def _goal(what: str, reached: float, wanted: float, most: bool = False) -> str:
    met = reached <= wanted if most else reached >= wanted
    return f"{'met' if met else 'MISSED'}: {what}: {reached:.2f} (at {'most' if most else 'least'} {wanted:g})"


if __name__ == "__main__":
    raise SystemExit(main())
