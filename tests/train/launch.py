# SPDX-License-Identifier: Apache-2.0
"""Runs of several ranks: forks of this process (torch is imported already, which saves seconds), or torchrun itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from fastpost.train import metrics


class Forked:
    """`action()` on `size` ranks, each a fork of this process. size 1: no ranks, a process alone."""

    def __init__(self, action, size: int = 2, *, limit_s: int = 120, stderr: Path | None = None):
        sys.stdout.flush()
        sys.stderr.flush()
        port = free_port()
        self.pids = [_fork(action, rank, size, port, limit_s, stderr) for rank in range(size)]
        self._codes = {}

    def wait(self) -> list[int]:
        """The exit code of each rank, or minus the signal that ended it."""
        for pid in self.pids:
            if pid not in self._codes:
                self._codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return [self._codes[pid] for pid in self.pids]

    def running(self) -> bool:
        for pid in self.pids:
            if pid not in self._codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self._codes) < len(self.pids)

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to one rank, or to all."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            if pid not in self._codes:
                os.kill(pid, number)


def _fork(action, rank: int, size: int, port: int, limit_s: int, stderr: Path | None) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(limit_s)
        torch.set_num_threads(1)
        if stderr is not None:
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115, pytest has another
        if size > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        action()
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def torchrun(recipe: Path, *overrides: str, ranks: int = 2) -> list[str]:
    """The command line of a run; ranks 1: without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), f"--master-port={free_port()}"]
    return [
        sys.executable, *(launcher if ranks > 1 else []), "-m", "fastpost", "train", str(recipe), *overrides
    ]  # fmt: skip


def run(command: list[str]) -> str:
    """Run to the end; returns what it printed. AssertionError with all of it when it fails."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def wait_for_step(run: Path, step: int, running, limit_s: float = 120) -> None:
    """Until metrics.jsonl of a run has `step`, or the run is over."""
    deadline = time.monotonic() + limit_s
    while running() and not any(row["step"] >= step and "loss" in row for row in metrics.read(run / "metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """The processes that process `pid` has started."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(run: Path) -> torch.Tensor:
    """The curve: float64 [steps]."""
    return torch.tensor([r["loss"] for r in metrics.read(run / "metrics.jsonl") if "loss" in r], dtype=torch.float64)
