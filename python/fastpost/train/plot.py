# SPDX-License-Identifier: Apache-2.0
"""loss.png: what metrics.jsonl says, as a picture. Several runs are drawn over each other."""

from __future__ import annotations

from pathlib import Path

from .jsonl import read
from .strict import suggest

PANELS = (
    ("loss", "loss"),
    ("rewards/margins", "reward margin"),
    ("rewards/accuracies", "reward accuracy"),
    ("learning_rate", "learning rate"),
)
EXACT = ("learning_rate", "epoch", "num_tokens")
"""Not averaged: these have no noise."""


def draw(runs: list[Path], out: Path, metrics: list[str] | None = None) -> Path:
    """Draw `metrics` (default: loss, margin, accuracy and learning rate, as far as they were logged) of `runs` (folders
    with metrics.jsonl) over each other into `out` (.png, .svg or .pdf). Held-out values are dashed. A run that lacks a
    metric, or is shorter, simply has less of a line.

    Raises ValueError for a folder without metrics, a metric that no run has, or a picture that cannot be written.
    """
    out = _writable(Path(out))
    series = {}
    for run in dict.fromkeys(map(Path, runs)):
        series[run] = read(run / "metrics.jsonl") + read(run / "timing.jsonl")
        if not series[run]:
            raise ValueError(f"[plot] {run}: expected a run folder with metrics.jsonl, found none. Is the path right?")
    known = {name for rows in series.values() for row in rows for name in row} - {"step"}
    titles = dict(PANELS)
    for name in metrics or []:
        if not {name, f"eval_{name}"} & known:
            choices = sorted(n for n in known if not n.startswith("eval_"))
            raise ValueError(f"[plot] --metric: expected one that was logged, got {name!r}.{suggest(name, choices)}")
    panels = metrics or [name for name, _ in PANELS if {name, f"eval_{name}"} & known]
    if not panels:
        raise ValueError(f"[plot] {next(iter(series))}: expected a loss in metrics.jsonl, found none yet. Wait for a "
                         "step, or name a metric with --metric.")  # fmt: skip

    from matplotlib.figure import Figure  # the object, not pyplot: no global state, no display needed
    from matplotlib.ticker import MaxNLocator

    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns + 0.2, 3.5 * rows + 0.3), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, name in zip(grid, panels):
        for index, (label, found) in enumerate(zip(labels(list(series)), series.values())):
            _curve(axes, found, name, f"C{index % 10}", label)
        axes.set_title(titles.get(name, name), fontsize=11)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=min(4, len(handles)),
        fontsize=8,
        frameon=False,
    )
    figure.savefig(out, dpi=130)
    return out


def labels(runs: list[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]

    def tail(p: tuple[str, ...]) -> str:
        length = 1
        while length < len(p) and any(q[-length:] == p[-length:] for q in parts if q != p):
            length += 1
        return "/".join(p[-length:])

    return list(map(tail, parts))


def _writable(out: Path) -> Path:
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"[plot] --out: expected a name in .png, .svg or .pdf, got {out}. Add one of them.")
    if not out.parent.is_dir():
        raise ValueError(f"[plot] --out: expected an existing folder, got {out.parent}. Make it first.")
    return out


def _curve(axes, rows: list[dict], name: str, color: str, label: str) -> None:
    """One run in one panel: every step pale and its running mean on top, held-out values dashed."""
    steps, values = _points(rows, name)
    smooth = values if name in EXACT else _smooth(values)
    if steps:
        if smooth is not values:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
        marker = "o" if len(steps) == 1 else None  # a line of one point cannot be seen
        axes.plot(steps, smooth, color=color, linewidth=1.6, label=label, marker=marker, markersize=4)
    held_out = _points(rows, f"eval_{name}")
    if held_out[0]:
        axes.plot(
            *held_out, color=color, linestyle="--", linewidth=1.1, marker="o", markersize=4, markerfacecolor="white",
            label=f"{label}, held out",
        )  # fmt: skip


def _points(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [s for s, _ in found], [v for _, v in found]


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a twentieth of the run, unbiased at the start; short runs stay as they are."""
    if len(values) < 40:
        return values
    decay = 1 - 20 / len(values)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight)
    return out
