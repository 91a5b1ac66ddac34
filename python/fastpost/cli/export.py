# SPDX-License-Identifier: Apache-2.0
"""`fastpost export RUN OUT`: write a run's model or adapter, or one of its checkpoints; with --merge the two in one."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastpost export",
        description="Write a run as a Hugging Face folder, with the files and tensor names of the model it began with, "
        "or its adapter as a peft folder. What was written is loaded again and its logits are compared.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or an adapter folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--step", type=int, metavar="N", help="checkpoint to take (default: the final model, else the newest)"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32", "fp16"), help="precision to write (default: as the start model)"
    )
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (optim.ema)")
    parser.add_argument(
        "--average",
        metavar="WHICH",
        help="the mean of checkpoints: last:6, or steps such as 100,200,final (final is the finished model)",
    )
    parser.add_argument(
        "--updates", action="store_true", help="print how far each layer has moved from the start model"
    )
    parser.add_argument(
        "--merge", action="store_true", help="write the base model with the adapter merged into its weights"
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="merge, and write the layers of a base model in four bits in four bits again; the error is printed",
    )
    parser.add_argument(
        "--original",
        action="store_true",
        help="merge into the base folder's own weights where model.quantize held them in four bits; the difference to "
        "what was trained is printed",
    )
    args = parser.parse_args(argv)

    from fastpost.train.export import export

    options = {"ema": args.ema, "average": args.average, "updates": args.updates, "merge": args.merge,
               "requantize": args.requantize, "original": args.original}  # fmt: skip
    print(export(args.run, args.out, step=args.step, dtype=args.dtype, **options))
    return 0
