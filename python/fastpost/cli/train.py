# SPDX-License-Identifier: Apache-2.0
"""`fastpost train RECIPE [--group.key VALUE ...]`: train a model as a recipe says."""

from __future__ import annotations

import json
import os
import shlex
import time

USAGE = """usage: fastpost train RECIPE [--group.key VALUE ...]
       fastpost train RECIPE --dry-run      check settings and data, estimate memory and cost, try a step; write nothing
       fastpost train --schema              JSON schema of a recipe, for editors

Trains and writes the run folder (train.output_dir, default runs/NAME-OF-RECIPE): config.yaml, metrics.jsonl,
timing.jsonl, loss.png, checkpoints/ and model/, a Hugging Face folder. The same command resumes an interrupted run.
SIGTERM or Ctrl-C: the step is finished, a checkpoint written, the status is 143 or 130. Several GPUs or processes:
torchrun --nproc-per-node N -m fastpost train RECIPE ...
Options:
"""


def main(argv: list[str]) -> int:
    from fastpost.cli.built_in import resolve
    from fastpost.train.config import field_names, load_config

    if not argv or argv[0] in ("-h", "--help"):
        print(
            USAGE
            + "\n".join(f"  --{name}" for name in field_names())
            + "\n  --objective.FIELD of the objective, e.g. beta\n`fastpost data --help` says what each is."
        )
        return 0
    if "--schema" in argv:
        from fastpost.train.schema import schema

        print(json.dumps(schema(), indent=2))
        return 0
    dry, argv = "--dry-run" in argv, [a for a in argv if a != "--dry-run"]
    if not argv:
        raise ValueError("train: --dry-run: expected a recipe, got none. Write: fastpost train RECIPE --dry-run")
    try:
        cfg = resolve(load_config(argv[0], argv[1:]))
    except ValueError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(1)  # torchrun stops all at the first that ends; the first of this machine says it for the others
        return 1

    import torch

    from fastpost.cli import fail
    from fastpost.train.device import unused_gpus
    from fastpost.train.step import NotFinite

    if "WORLD_SIZE" not in os.environ and (gpus := unused_gpus(cfg.train.device)):
        again = f"torchrun --nproc-per-node {gpus} -m fastpost train {shlex.join(argv)}"
        print(f"{gpus} GPUs are visible and one is used. For all of them: {again}", flush=True)
    try:
        if dry:
            from fastpost.cli.dry_run import dry_run

            dry_run(cfg, argv[1:])
        else:
            from fastpost.train.loop import train

            train(cfg)
    except (NotFinite, OSError) as error:  # a disk that is full or fails is nobody's bug
        if os.environ.get("FASTPOST_TRACEBACK"):
            raise
        return fail(str(error), 1)
    except torch.OutOfMemoryError as error:
        if os.environ.get("FASTPOST_TRACEBACK"):
            raise
        said = str(error).splitlines()[0]
        return fail(f"[train] GPU memory: expected room for a step, got none: {said} Lower "
                    "train.max_tokens_per_micro_batch, or set train.gradient_checkpointing full; --dry-run says where "
                    "memory goes.", 1)  # fmt: skip
    return 0
