# SPDX-License-Identifier: Apache-2.0
"""From the command to the end of the first step, stage by stage, and `fastpost --help`.

    python -m bench.start --model DIR [--data GSM8K] [--objective sft dpo] [--repeat 3]

`fastpost train` on rows of GSM8K (all 7473 for sft; 32 pairs for dpo, whose reference log-probs the first run
computes), 8 sequences a step, one thread. The first run finds empty caches (cold), the others what it left there
(warm): tokenised data and log-probs, in a folder of this benchmark's own. The system has read all files before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import train_rows

OBJECTIVES = {"sft": 7473, "dpo": 32}
"""What is started -> at most so many rows."""
REST = "everything else"


class FirstStep(Exception):
    """Ends a run that has taken its first step."""


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser("python -m bench.start", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", help="Hugging Face folder of a chat model, as SmolLM2-135M-Instruct")
    parser.add_argument("--data", default=os.environ.get("FASTPOST_GSM8K", "gsm8k"), help="GSM8K folder")
    parser.add_argument("--objective", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--rows", type=int, help="at most so many rows of data")
    parser.add_argument("--repeat", type=int, default=3, help="warm starts (3); medians are quoted")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        recipe, began, out = args.worker
        Path(out).write_text(json.dumps(stages(recipe, float(began))))
        return {}
    if not args.model:
        parser.error("--model: expected a Hugging Face folder, got nothing.")
    found = {"help": [help_seconds() for _ in range(5)], "starts": []}
    print(f"fastpost --help: {statistics.median(found['help']):.2f} s")
    for objective in args.objective:
        limit = min(OBJECTIVES[objective], args.rows or OBJECTIVES[objective])
        start = measure(Path(args.model), objective, Path(args.data), limit, args.repeat)
        print(report(start), flush=True)
        found["starts"].append(start)
    return found


def help_seconds() -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fastpost", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def measure(model: Path, objective: str, data: Path, limit: int, repeat: int) -> dict:
    """{"cold": stages, "warm": [stages, ...]}; stages: name -> [wall seconds, CPU seconds]."""
    import yaml

    from fastpost.hf.folder import load_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, texts = train_rows.texts(data, limit)
        train_rows.write(folder, texts, objective, load_tokenizer(model))
        recipe = {
            "model": {"path": str(model.resolve())},
            "data": {"train": str(folder / "fastpost.jsonl"), "max_length": 512, "cache": str(folder / "cache")},
            "objective": {"name": objective}, "optim": {"lr": 1e-6},
            "train": {"batch_size": 4 if train_rows.PAIRED[objective] else 8, "max_steps": 1}, "log": {"plot": False},
        }  # fmt: skip
        runs = []
        for turn in range(1 + repeat):
            recipe["train"]["output_dir"] = str(folder / f"run-{turn}")
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            command = [sys.executable, "-m", "bench.start", "--worker", str(folder / "recipe.yaml"), repr(time.time()),
                       str(folder / "out.json")]  # fmt: skip
            env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"[bench] a start stopped:\n{done.stderr[-3000:]}")
            runs.append(json.loads((folder / "out.json").read_text()))
    return {"objective": objective, "rows": source, "count": limit, "cold": runs[0], "warm": runs[1:]}


def stages(recipe: str, began: float) -> dict[str, list[float]]:
    """Run `recipe` to the end of its first step; `began`: time.time() when the command was given."""
    found = {"imports": [time.time() - began, time.process_time()]}
    with stage(found, "imports"):
        from fastpost.train import forward, loop
        from fastpost.train.config import load_config

    def watch(where, name: str, what: str, inside: str = "") -> None:
        original = getattr(where, name)

        def timed(*args, **kwargs):
            with stage(found, what, inside):
                return original(*args, **kwargs)

        setattr(where, name, timed)

    watch(loop.folder, "load_tokenizer", "tokenizer")
    watch(loop, "load_data", "data")
    watch(loop, "load_policy", "weights")
    watch(forward, "verify", "verify", inside="weights")
    watch(loop.AdamW, "from_config", "optimizer")
    watch(loop.reference, "attach", "reference")
    watch(loop, "train_step", "first step")

    class Stopping(loop.RunLog):
        def step(self, *args):
            super().step(*args)
            raise FirstStep

    loop.RunLog = Stopping
    with contextlib.suppress(FirstStep):
        loop.train(load_config(recipe, []))
    total = [time.time() - began, time.process_time()]
    found[REST] = [t - sum(s[i] for s in found.values()) for i, t in enumerate(total)]
    return found | {"total": total}


@contextlib.contextmanager
def stage(found: dict, name: str, inside: str = ""):
    """Add what the block takes to `name`, and take it off `inside`, which is running."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        taken = time.perf_counter() - wall, time.process_time() - cpu
        for key, sign in ((name, 1), (inside, -1)):
            if key:
                before = found.setdefault(key, [0.0, 0.0])
                found[key] = [b + sign * t for b, t in zip(before, taken)]


def warm(start: dict, name: str, clock: int = 0) -> float:
    """Median of a stage over the warm starts; clock 0 = wall, 1 = CPU."""
    return statistics.median(run[name][clock] for run in start["warm"])


def report(start: dict) -> str:
    title = f"{start['objective']}, {start['count']} rows of {start['rows']}"
    lines = [f"\n{title}: seconds from the command to the end of the first step"]
    lines.append(f"  {'':16} {'warm':>6} {'CPU':>6} {'cold':>6}")
    for name in start["warm"][0]:
        figures = f"{warm(start, name):6.2f} {warm(start, name, 1):6.2f} {start['cold'][name][0]:6.2f}"
        lines.append(f"  {name:16} {figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
