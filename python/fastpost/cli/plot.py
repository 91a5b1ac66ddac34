# SPDX-License-Identifier: Apache-2.0
"""`fastpost plot RUN [RUN ...] [--metric NAME] [--out FILE]`: draw the curves of one run or several over each other."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastpost plot", description="Draw loss, margin, accuracy and rate from metrics.jsonl."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--metric", action="append", metavar="NAME",
        help="draw this instead, e.g. grad_norm, or tps of timing.jsonl; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="picture to write: .png, .svg or .pdf (default: RUN/loss.png, or compare.png)"
    )
    args = parser.parse_args(argv)

    from fastpost.train.plot import draw

    alone = len(args.runs) == 1 and not args.metric
    out = args.out or (args.runs[0] / "loss.png" if alone else Path("compare.png"))
    print(draw(args.runs, out, args.metric))
    return 0
