# SPDX-License-Identifier: Apache-2.0
"""python -m bench [op ...]: see the package's docstring, or --help."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

import bench
from bench import machine, peers, plot, report, timing
from bench.case import Options
from bench.run import run

HERE = Path(__file__).parent
OPS = sorted(p.stem.removeprefix("bench_") for p in (HERE / "ops").glob("bench_*.py"))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("[bench] --device cuda: torch finds no GPU here. `fastpost env` tells what it does find.")
    options = Options(device, args.quick, args.peers, args.clock)
    threads = [None] if device.type == "cuda" else args.threads or sorted({1, torch.get_num_threads()})
    result = machine.describe(device) | {"threads": threads, "rounds": args.repeat, "clock": args.clock, "cases": []}
    chip = result["gpu"] or f"{result['cpu']}, {result['hardware_threads']} hardware threads"
    print(f"{chip}, torch {torch.__version__}, commit {result['commit']}, {args.clock} time", flush=True)
    if peers.missing():
        print(f"Not installed, so not compared with: {', '.join(peers.missing())} (pip install 'fastpost[peers]').")
    before = machine.probe()
    for op in args.op or OPS:
        for case in importlib.import_module(f"bench.ops.bench_{op}").cases(options):
            if args.only and not all(word in case.name for word in args.only):
                continue
            record = run(op, case, options, threads, args.repeat)
            print(report.table(record), flush=True)
            result["cases"].append(record)
    after = machine.probe()
    result["probe"] = {"before": before, "after": after, "verdict": machine.verdict(before, after, args.clock)}
    print("\n" + "\n".join(result["probe"]["verdict"]))
    if args.json is not None:
        path = Path(args.json or HERE / "results" / f"{result['machine']}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"Wrote {path}.")
    if args.plot:
        plot.draw(result, Path(args.plot))
        print(f"Drew {args.plot}.")
    ours = [r for r in result["cases"] if "fastpost" in r["disagrees"]]
    for record in ours:
        print(f"fastpost disagrees with the reference: {record['op']} {record['case']}", file=sys.stderr)
    return 1 if ours else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench", description=bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="*", help=f"any of: {', '.join(OPS)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of CPU threads to measure with (1 and all)")
    parser.add_argument("--peers", nargs="*", help=f"only these: {' '.join(peers.NAMES)}; nothing after it = no peer")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only cases with all these words in their names")
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="interleaved rounds (7); medians are quoted")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall", help="cpu: leaves out what others took")
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that everything runs, not how fast")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="write all times (results/<machine>.json)")
    parser.add_argument("--plot", metavar="FILE", help="draw the cases as bars (png, svg, pdf)")
    args = parser.parse_args(argv)
    for given, known, what in ((args.op, OPS, "op"), (args.peers or [], peers.NAMES, "--peers")):
        for word in given:
            if word not in known:
                parser.error(f"{what} {word!r}: expected one of {', '.join(known)}.")
    if args.clock == "cpu" and (args.threads != [1] or args.device != "cpu"):
        parser.error("--clock cpu: adds up all threads and sees no GPU. Use it with --threads 1 on the CPU.")
    if args.repeat < 1:
        parser.error(f"--repeat: expected at least 1, got {args.repeat}.")
    return args


if __name__ == "__main__":
    sys.exit(main())
