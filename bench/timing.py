# SPDX-License-Identifier: Apache-2.0
"""Wall-clock on CPU, events on CUDA; providers take turns, so that disturbances and changing clocks hit all of them."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator

import torch

Clock = Callable[[], float]  # seconds
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""On a machine that others use too, CPU time of one thread leaves out the time that they took."""

SAMPLE_SECONDS = 2e-3  # a shorter run is repeated until a sample takes this long
SLOW = 8  # a provider this many times slower than the fastest (and than a second) is timed once, after one warm-up


def measure(run: Callable[[int], object], first: int, count: int, device: torch.device, clock: Clock) -> float:
    """Seconds that run(first), run(first + 1), ... take each."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for i in range(first, first + count):
            run(i)
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / count
    begin = clock()
    for i in range(first, first + count):
        run(i)
    return (clock() - begin) / count


def interleave(
    runs: dict[str, Callable[[int], object]], rounds: int, device: torch.device, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds a call, per provider and round. Every run is called twice before the first round; for a slow provider the
    second of these calls is all there is."""
    once = {}
    for name, run in runs.items():
        run(0)
        once[name] = measure(run, 1, 1, device, clock)
    count = {name: max(1, math.ceil(SAMPLE_SECONDS / max(t, 1e-8))) for name, t in once.items()}
    rare = {name for name, t in once.items() if t > SLOW * min(once.values()) and t > 1}
    times = {name: [once[name]] if name in rare else [] for name in runs}
    with no_collection():
        for turn in range(rounds):
            for name in list(runs)[:: -1 if turn % 2 else 1]:
                if name not in rare:
                    times[name].append(measure(runs[name], turn * count[name], count[name], device, clock))
            gc.collect()  # between rounds, outside every measurement
    return times


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with this many CPU threads; None leaves them as they are (on a GPU they do not matter)."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
