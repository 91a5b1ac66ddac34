# SPDX-License-Identifier: Apache-2.0
"""A picture of the records: for each case, time of every provider as a multiple of the limit's."""

from __future__ import annotations

from pathlib import Path

from bench.run import OURS


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [r for r in result["cases"] if r["limits"]]
    if not records:
        raise ValueError("[bench] --plot: expected an op with a limit to draw, got ops without. Add linear_logprob.")
    sizes = [sum(n not in r["limits"] for n in r["measured"][0]["median"]) for r in records]
    height = 0.6 + 0.55 * len(records) + 0.25 * sum(sizes)  # inches
    figure, axes = plt.subplots(len(records), 1, figsize=(9, height), squeeze=False, height_ratios=sizes)
    for ax, record in zip(axes[:, 0], records):
        _bars(ax, record)
    shades = ", ".join(f"{s} {n} threads" for s, n in zip(("dark", "light"), result["threads"]) if n) or "GPU"
    figure.suptitle(f"{result['gpu'] or result['cpu']}: time ÷ time of the limit, shorter is better ({shades})")
    figure.subplots_adjust(left=0.22, right=0.97, top=1 - 0.75 / height, bottom=0.25 / height)
    figure.subplots_adjust(hspace=0.5 * len(records) / (0.25 * sum(sizes)))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(ax, record: dict) -> None:
    limit = record["limits"][0]
    names = [n for n in record["measured"][0]["median"] if n not in record["limits"]][::-1]
    thickness = 0.8 / len(record["measured"])
    ours = max(m["median"][OURS] / m["median"][limit] for m in record["measured"])
    right = max(3.0, 2 * ours)  # peers that are many times slower run out of the picture
    for k, m in enumerate(record["measured"]):
        relative = [m["median"][n] / m["median"][limit] for n in names]
        places = [i + thickness * (len(record["measured"]) / 2 - 0.5 - k) for i in range(len(names))]
        colours = [_colour(n, n in record["disagrees"], k) for n in names]
        ax.barh(places, relative, thickness, color=colours)
        for x, y in zip(relative, places):
            inside = x > 0.93 * right
            ax.text(min(x, right), y, f" {x:.2f} ", va="center", ha="right" if inside else "left", fontsize=7,
                    color="white" if inside else "black")  # fmt: skip
    ax.axvline(1, color="black", linewidth=0.8)
    labels = [n + (" (disagrees)" if n in record["disagrees"] else "") for n in names]
    ax.set_yticks(range(len(names)), labels, fontsize=8)
    ax.set_xlim(0, right)
    ax.set_title(f"{record['op']}  {record['case']}", fontsize=8, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def _colour(name: str, disagrees: bool, k: int) -> str:
    orange, blue, grey = ("#d9480f", "#ff922b"), ("#3b5b92", "#8fa8d3"), ("#c9c9c9", "#dddddd")
    return (grey if disagrees else orange if name == OURS else blue)[min(k, 1)]
