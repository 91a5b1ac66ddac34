# SPDX-License-Identifier: Apache-2.0
"""What the ranks of tests/parallel do: `check_*` functions that every rank runs, in one process group per world size.

Importing torch costs each rank seconds, so all checks of a world share its processes."""

from __future__ import annotations

import datetime
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(world: int, store: Path, checks: dict) -> dict[str, str]:
    """Every check on every rank, gloo on CPU. Name of each check -> "" or the traceback of a rank where it failed."""
    mp.spawn(_rank, (world, str(store), checks), nprocs=world)
    texts = [torch.load(f"{store}.{rank}") for rank in range(world)]
    return {name: next((t[name] for t in texts if t[name]), "") for name in checks}


def _rank(rank, world, store, checks):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    texts = dict.fromkeys(checks, "not run: an earlier check failed")
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check(rank, world)
            failed = ""
        except Exception:
            failed = traceback.format_exc()
        anywhere = [None] * world
        try:
            dist.all_gather_object(anywhere, failed)
        except Exception:
            anywhere = [failed or traceback.format_exc()]
        texts[name] = next((text for text in anywhere if text), "")
        if texts[name]:
            break
    torch.save(texts, f"{store}.{rank}")
    sys.stdout.flush()
    os._exit(0)  # a rank that waits in a collective for one that failed would never leave by itself
