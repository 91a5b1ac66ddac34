# SPDX-License-Identifier: Apache-2.0
"""What the numbers were measured on, and whether it was quiet."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import torch

SHARED_CORE = 1.4  # two threads that do less than this many times the work of one share a core, or the machine is busy
DISTURBED = 0.15  # relative change of the probe between start and end


def describe(device: torch.device) -> dict:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": re.sub(r"[^a-z0-9]+", "-", f"{gpu or cpu} {'' if gpu else f'{cores} threads'}".lower()).strip("-"),
        "cpu": cpu,
        "hardware_threads": cores,
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in ("torch", "fastpost", "trl", "liger-kernel", "transformers")},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def probe(seconds: float = 0.25) -> dict[str, float]:
    """GFLOP/s of a matrix product that stays in cache, by one thread and by two at once, and the load from outside."""
    one = max(_rate(seconds) for _ in range(2))
    with ThreadPoolExecutor(2) as pool:
        two = max(sum(pool.map(_rate, [seconds] * 2)) for _ in range(2))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return {"one_thread_gflops": one, "two_threads_gflops": two, "load_average": load}


def verdict(before: dict[str, float], after: dict[str, float], clock: str = "wall") -> list[str]:
    """What the reader has to know about the machine, in sentences."""
    gain = [p["two_threads_gflops"] / p["one_thread_gflops"] for p in (before, after)]
    one = [p["one_thread_gflops"] for p in (before, after)]
    said = [
        f"Probe: one thread {one[0]:.0f} GFLOP/s before and {one[1]:.0f} after; "
        f"two threads do {gain[0]:.2f} and {gain[1]:.2f} times the work of one."
    ]
    if min(gain) < SHARED_CORE:
        said.append("Two threads share a core or other work runs here: read the one-thread figures.")
    if abs(one[1] / one[0] - 1) > DISTURBED:
        said.append("The machine was disturbed: the ratios, measured in turns, hold better than the times.")
    if clock == "cpu":
        said.append("Times are CPU time of one thread, which leaves out what other programs took.")
    return said


def _rate(seconds: float) -> float:
    torch.set_num_threads(1)  # of this Python thread
    a, b, out = torch.ones(192, 192), torch.ones(192, 192), torch.empty(192, 192)
    done, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        for _ in range(10):
            torch.mm(a, b, out=out)
        done += 10
    return done * 2 * 192**3 / passed / 1e9


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    run = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
