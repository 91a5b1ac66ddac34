# SPDX-License-Identifier: Apache-2.0
"""Curves of several runs: unequal lengths, missing metrics, held-out values, names, and clear errors."""

import json
import subprocess
import sys

import pytest

from fastpost.cli import main
from fastpost.train.plot import draw, labels


def run(path, steps, *, pairs=True, held_out=True):
    path.mkdir(parents=True)
    rows = []
    for step in range(steps + 1):
        if held_out and step % 10 == 0:
            rows.append({"step": step, "eval_loss": 1 / (step + 1)})
        if step:
            rows.append({"step": step, "loss": 1 / step, "learning_rate": 1e-6})
            if pairs:
                rows[-1] |= {"rewards/margins": step * 0.1, "rewards/accuracies": 0.5}
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    timing = [{"step": s, "tps": 100.0 + s, "mfu": None} for s in range(1, steps + 1)]
    (path / "timing.jsonl").write_text("".join(json.dumps(r) + "\n" for r in timing))
    return path


@pytest.fixture
def seen(monkeypatch):
    """The figure as it was saved: {title: {label: ([x], [y])}}."""
    from matplotlib.figure import Figure

    found = {}
    real = Figure.savefig

    def savefig(figure, *args, **kwargs):
        for axes in figure.axes:
            if axes.get_visible():
                lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
                found[axes.get_title()] = {k: v for k, v in lines.items() if not k.startswith("_")}
        found["legend"] = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
        return real(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def test_runs_of_unequal_length_and_kind(tmp_path, seen):
    a, b, c = (
        run(tmp_path / "a/run", 60),
        run(tmp_path / "b/run", 25, held_out=False),
        run(tmp_path / "s", 1, pairs=False),
    )
    draw([a, b, c], tmp_path / "out.png")
    assert list(seen["loss"]) == ["a/run", "a/run, held out", "b/run", "s", "s, held out"] == seen["legend"]
    assert {name: line[0] for name, line in seen["loss"].items()} == {
        "a/run": list(range(1, 61)), "a/run, held out": list(range(0, 61, 10)), "b/run": list(range(1, 26)), "s": [1],
        "s, held out": [0],
    }  # fmt: skip
    assert list(seen["reward margin"]) == ["a/run", "b/run"]
    assert seen["reward margin"]["b/run"][1] == [s * 0.1 for s in range(1, 26)]  # short runs are not averaged
    assert set(seen) == {"loss", "reward margin", "reward accuracy", "learning rate", "legend"}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_chosen_metrics_of_both_files(tmp_path, seen, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "r", 5)
    assert main(["plot", "r", "--metric", "tps", "--metric", "loss"]) == 0
    assert capsys.readouterr().out == "compare.png\n"  # loss.png stays what it is
    assert list(seen) == ["tps", "loss", "legend"] and seen["tps"]["r"][1] == [101.0, 102.0, 103.0, 104.0, 105.0]
    assert main(["plot", "r", "--metric", "mfu"]) == 0  # known, and nowhere measured: an empty panel
    assert seen["mfu"] == {}


def test_one_run_twice_is_one_run(tmp_path, seen):
    draw([run(tmp_path / "r", 3)] * 2, tmp_path / "x.svg")
    assert seen["legend"] == ["r", "r, held out"]


def test_labels_are_as_long_as_they_must(tmp_path):
    paths = [tmp_path / p for p in ("x/one/run", "y/one/run", "z")]
    assert labels(paths) == ["x/one/run", "y/one/run", "z"] and labels(paths[:1]) == ["run"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["r", "--metric", "lss"], "[plot] --metric: expected one that was logged, got 'lss'. Did you mean 'loss'?"),
        (["r", "nowhere"], "[plot] nowhere: expected a run folder with metrics.jsonl, found none. Is the path right?"),
        (["r", "--out", "x.gif"], "[plot] --out: expected a name in .png, .svg or .pdf, got x.gif."),
        (["r", "--out", "no/x.png"], "[plot] --out: expected an existing folder, got no. Make it first."),
        (["young"], "[plot] young: expected a loss in metrics.jsonl, found none yet."),
    ],
)
def test_mistakes(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "r", 3)
    (tmp_path / "young").mkdir()
    (tmp_path / "young/metrics.jsonl").write_text('{"step": 0, "rows": 3}\n{"step": 1, "lo')
    assert main(["plot", *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"fastpost: {said}")


def test_plotting_needs_no_torch(tmp_path):
    run(tmp_path / "r", 3)
    code = "import sys; from fastpost.cli import main; main(['plot', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], capture_output=True).returncode == 0
