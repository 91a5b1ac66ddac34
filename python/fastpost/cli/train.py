# SPDX-License-Identifier: Apache-2.0
"""`fastpost train RECIPE [--group.key VALUE ...]`: train a model as a recipe says."""

from __future__ import annotations

import os
import shlex
import time

USAGE = """usage: fastpost train RECIPE [--group.key VALUE ...]

Trains and writes the run folder (train.output_dir, default runs/NAME-OF-RECIPE): config.yaml, metrics.jsonl,
timing.jsonl, loss.png, checkpoints/ and model/, a Hugging Face folder. The same command resumes an interrupted run.
SIGTERM or Ctrl-C: the step is finished, a checkpoint written, the status is 143 or 130. Several GPUs or processes:
torchrun --nproc-per-node N -m fastpost train RECIPE ...
Options:
"""


def main(argv: list[str]) -> int:
    from fastpost.train.config import field_names, load_config

    if not argv or argv[0] in ("-h", "--help"):
        print(
            USAGE
            + "\n".join(f"  --{name}" for name in field_names())
            + "\n  --objective.FIELD of the objective, e.g. beta"
        )
        return 0
    try:
        cfg = load_config(argv[0], argv[1:])
    except ValueError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(1)  # torchrun stops all at the first that ends; the first of this machine says it for the others
        return 1

    from fastpost.cli import fail
    from fastpost.train.device import unused_gpus
    from fastpost.train.loop import train
    from fastpost.train.step import NotFinite

    if "WORLD_SIZE" not in os.environ and (gpus := unused_gpus(cfg.train.device)):
        again = f"torchrun --nproc-per-node {gpus} -m fastpost train {shlex.join(argv)}"
        print(f"{gpus} GPUs are visible and one is used. For all of them: {again}", flush=True)
    try:
        train(cfg)
    except (NotFinite, OSError) as error:  # a disk that is full or fails is nobody's bug
        if os.environ.get("FASTPOST_TRACEBACK"):
            raise
        return fail(str(error), 1)
    return 0
