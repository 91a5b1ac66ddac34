# SPDX-License-Identifier: Apache-2.0
"""A record as a table for people: one thread first, then all."""

from __future__ import annotations

from bench.case import worst
from bench.run import OURS, ratio, share


def table(record: dict) -> str:
    """Providers are rows; for each number of threads: time, rate, share of the limit, time as a multiple of ours."""
    compute = record["bound"] == "compute"
    work, unit = (record["flops"], "GFLOP/s") if compute else (record["bytes"], "GB/s")
    small = all(t < 1e-4 for m in record["measured"] for t in m["median"].values())
    scale, time_unit = (1e6, "µs") if small else (1e3, "ms")
    head = [""]
    for m in record["measured"]:
        threads = "" if m["threads"] is None else f" {m['threads']} thr"
        head += [time_unit + threads] + ([unit, "of limit"] if work else []) + (["x ours"] if record["limits"] else [])
    if record["errors"]:
        head.append("error")
    if record["goals"]:
        head.append("goal")
    rows = [head]
    for name in [*record["limits"], *record["errors"]] if record["errors"] else record["measured"][0]["median"]:
        row = [name]
        for m in record["measured"]:
            row += _figures(record, name, m, work, scale)
        if record["errors"]:
            row.append(_error(record, name))
        if record["goals"]:
            row.append(_goal(record, name, scale, time_unit))
        rows.append(row)
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    padded = ([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:]))] for r in rows)
    lines = ["  ".join(cells).rstrip() for cells in padded]
    title = f"\n{record['op']}   {record['case']}"
    if work:
        title += f"   {record['flops'] / 1e9:.1f} GFLOP" if compute else f"   {record['bytes'] / 1e6:.1f} MB"
    lines += [f"{name} did not run: {why}" for name, why in record["failed"].items()]
    if record["disagrees"]:
        lines.append(f"A result that is off by more than {record['tolerance']:g} gets no ratio.")
    return "\n".join([title, *lines])


def _figures(record: dict, name: str, m: dict, work: int, scale: float) -> list[str]:
    cells = [_digits(m["median"][name] * scale)]
    if work:
        part = share(record, name, m)
        cells += [_digits(work / m["median"][name] / 1e9), "" if part is None else f"{part:.2f}"]
    if record["limits"] and (name == OURS or name in record["limits"]):
        cells.append("")
    elif record["limits"]:
        times = ratio(record, name, m)
        cells.append("disagrees" if times is None else f"{times:.2f}x")
    return cells


def _digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _error(record: dict, name: str) -> str:
    return f"{worst(record['errors'][name]):.1e}" if name in record["errors"] else ""


def _goal(record: dict, name: str, scale: float, unit: str) -> str:
    goal = record["goals"].get(name)
    if goal is None:
        return ""
    met = min(m["median"][name] for m in record["measured"]) <= goal
    return f"{'met' if met else 'MISSED'}: at most {goal * scale:g} {unit}"
