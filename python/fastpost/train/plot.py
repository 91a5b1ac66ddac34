# SPDX-License-Identifier: Apache-2.0
"""loss.png: what metrics.jsonl says, as a picture. Several runs are drawn over each other."""

from __future__ import annotations

from pathlib import Path

from .jsonl import read

PANELS = (
    ("loss", "loss"),
    ("rewards/margins", "reward margin"),
    ("rewards/accuracies", "reward accuracy"),
    ("learning_rate", "learning rate"),
)


def draw(runs: list[Path], out: Path) -> Path:
    """Draw loss, margin, accuracy and learning rate of `runs` (folders with metrics.jsonl) into `out` (.png, .svg,
    .pdf).

    Raises ValueError for a folder without metrics.
    """
    from matplotlib.figure import Figure  # the object, not pyplot: no global state, no display needed

    series = {}
    for run in map(Path, runs):
        series[run] = read(run / "metrics.jsonl")
        if not series[run]:
            raise ValueError(f"[plot] {run}: expected a run folder with metrics.jsonl, found none. Is the path right?")
    panels = [p for p in PANELS if any(p[0] in row for rows in series.values() for row in rows)]
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, (run, rows) in enumerate(series.items()):
            color = f"C{index}"
            steps, values = _points(rows, key)
            smooth = _smooth(values) if key != "learning_rate" else values
            if smooth is not values:
                axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(steps, smooth, color=color, linewidth=1.6, label=run.name or str(run))
            held_out = _points(rows, f"eval_{key}")
            if held_out[0]:
                axes.plot(
                    *held_out, color=color, linestyle="--", marker="o", markersize=4, label=f"{run.name}, held out"
                )
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.25)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(out, dpi=130)
    return Path(out)


def _points(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[key]) for row in rows if key in row]
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
