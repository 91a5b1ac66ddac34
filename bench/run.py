# SPDX-License-Identifier: Apache-2.0
"""One case: check every provider against the reference, then time all of them in turns, for each number of threads."""

from __future__ import annotations

import statistics
import warnings

from bench import timing
from bench.case import Case, Options, errors, worst
from bench.limits import COLD

OURS = "fastpost"
MOST_COPIES = 16  # inputs smaller than COLD are rotated among copies, so that no run finds its own in cache


def run(op: str, case: Case, options: Options, threads: list[int], rounds: int) -> dict:
    """The record that --json writes: seconds a call of all rounds, medians, limits, errors, what failed and why."""
    inputs = [case.make()]
    wrong, failed = check(case, inputs[0])
    if 0 < case.bytes < COLD:
        inputs += [case.make() for _ in range(min(MOST_COPIES, COLD // case.bytes) - 1)]
    calls = {
        name: lambda i, f=f: f(inputs[i % len(inputs)])
        for name, f in {**case.limits, **case.runs}.items()
        if name not in failed
    }
    measured = []
    for count in threads:
        with timing.threads(count):
            times = timing.interleave(calls, rounds, options.device, timing.CLOCKS[options.clock])
        times = {name: [t / case.calls for t in each] for name, each in times.items()}
        median = {name: statistics.median(each) for name, each in times.items()}
        measured.append({"threads": count, "median": median, "times": times})
    return {
        "op": op,
        "case": case.name,
        "bound": case.bound,
        "flops": case.flops,
        "bytes": case.bytes,
        "input_copies": len(inputs),
        "limits": list(case.limits),
        "goals": case.goals,
        "tolerance": case.tolerance,
        "errors": wrong,
        "disagrees": [name for name, e in wrong.items() if worst(e) > case.tolerance],
        "failed": failed,
        "measured": measured,
    }


def check(case: Case, inputs) -> tuple[dict, dict[str, str]]:
    """(errors of each provider against the reference, why a provider could not run)."""
    wrong, failed = {}, {}
    wanted = case.reference(inputs) if case.reference else {}
    for name, f in case.runs.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = f(inputs)
        except Exception as error:  # another library's: the rest of the table is still worth having
            if name == OURS:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            continue
        if wanted:
            wrong[name] = errors(got, wanted)
    return wrong, failed


def ratio(record: dict, name: str, measured: dict) -> float | None:
    """How many times faster ours is than `name`; None where there is nothing to compare or one of the two is wrong."""
    median = measured["median"]
    if OURS not in median or name not in median or name == OURS or {OURS, name} & set(record["disagrees"]):
        return None
    return median[name] / median[OURS]


def share(record: dict, name: str, measured: dict) -> float | None:
    """Time of the first limit over the time of `name`: 1 = as fast as the limit."""
    median = measured["median"]
    if not record["limits"] or name not in median or name in record["disagrees"]:
        return None
    return median[record["limits"][0]] / median[name]
