# SPDX-License-Identifier: Apache-2.0
"""Where to compute."""

from __future__ import annotations

import torch

from .distributed import ALONE, Ranks


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """auto | cpu | cuda -> the device of this rank; each rank of a machine has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "[train] train.device: expected a CUDA GPU, torch finds none. Use cpu or auto; `fastpost env` says more."
        )
    if name == "cpu" or ranks.size == 1:
        return torch.device(name)
    if ranks.local >= torch.cuda.device_count():
        raise ValueError(
            f"[train] train.device: expected a GPU for each process of this machine, got {torch.cuda.device_count()} "
            f"GPUs and a process number {ranks.local + 1}. Start fewer with --nproc-per-node, or use cpu."
        )
    torch.cuda.set_device(ranks.local)
    return torch.device("cuda", ranks.local)


def unused_gpus(name: str) -> int:
    """How many GPUs are visible when one process would use one of several, else 0."""
    several = name != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() > 1
    return torch.cuda.device_count() if several else 0
