# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness tells the truth: wrong results get no ratio, providers take turns, every op's cases run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import machine, report, timing
from bench.__main__ import OPS, main
from bench.case import Case, Options, errors, worst
from bench.run import ratio, run, share

CPU = torch.device("cpu")


def case(**runs) -> Case:
    return Case(
        name="doubling",
        make=lambda: torch.arange(1.0, 9.0).view(2, 4),
        runs=runs,
        limits={"add": lambda x: x + x},
        reference=lambda x: {"out": 2 * x.double()},
        tolerance=1e-4,
        flops=8,
        bytes=64,
    )


def test_a_wrong_result_gets_no_speed_up():
    record = run("double", case(fastpost=lambda x: {"out": 2 * x}, right=lambda x: {"out": x + x},
                                wrong=lambda x: {"out": 2.001 * x}, nan=lambda x: {"out": x * float("nan")}),
                 Options(CPU), [1], 3)  # fmt: skip
    assert record["disagrees"] == ["wrong", "nan"]
    (measured,) = record["measured"]
    assert ratio(record, "right", measured) > 0 and share(record, "right", measured) > 0
    assert ratio(record, "wrong", measured) is None and share(record, "wrong", measured) is None
    lines = {line.split()[0]: line for line in report.table(record).splitlines() if line.strip()}
    assert "disagrees" in lines["wrong"] and "5.0e-04" in lines["wrong"] and "x" in lines["right"]


def test_when_ours_is_wrong_nobody_gets_a_ratio():
    tripled = case(fastpost=lambda x: {"out": 3 * x}, right=lambda x: {"out": x + x})
    record = run("double", tripled, Options(CPU), [1], 1)
    assert ratio(record, "right", record["measured"][0]) is None


def test_a_peer_that_fails_is_reported_and_ours_may_not():
    def broken(x):
        raise RuntimeError("no compiler here")

    record = run("double", case(fastpost=lambda x: {"out": 2 * x}, broken=broken), Options(CPU), [1], 1)
    assert "no compiler here" in report.table(record)
    with pytest.raises(RuntimeError):
        run("double", case(fastpost=broken), Options(CPU), [1], 1)


def test_errors_are_relative_and_name_the_worst_row():
    wanted = torch.tensor([[1000.0, 0.0], [0.0, 1.0]])
    found = errors({"g": wanted + torch.tensor([[0.0, 0.0], [0.0, 0.5]])}, {"g": wanted})
    assert found["g"]["worst_row"] == pytest.approx(0.5) and found["g"]["all"] == pytest.approx(5e-4, rel=1e-3)
    assert worst({}) == float("inf"), "nothing in common to compare is not agreement"


def test_providers_take_turns_in_alternating_order(monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "measure", lambda run, *_: seen.append(run(0)) or 1.0)
    timing.interleave({name: lambda i, n=name: n for name in "abc"}, 3, CPU)
    assert "".join(seen) == "abc" + "abc" + "cba" + "abc", "one warm-up, then rounds"


def test_a_slow_provider_is_spared_but_measured(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda run, *_: run(0))
    times = timing.interleave({"a": lambda i: 1.0, "b": lambda i: 20.0}, 5, CPU)
    assert len(times["a"]) == 5 and len(times["b"]) == 1


def test_short_runs_are_repeated_until_a_clock_can_tell():
    calls = []
    times = timing.interleave({"a": lambda i: calls.append(i)}, 1, CPU)
    assert len(calls) > 100 and 0 < times["a"][0] < 1e-4 and len(set(calls)) > 100, "each call gets its own number"


def test_verdict_names_a_shared_core_and_a_disturbance():
    quiet = {"one_thread_gflops": 100.0, "two_threads_gflops": 195.0}
    shared = {"one_thread_gflops": 100.0, "two_threads_gflops": 105.0}
    slowed = {"one_thread_gflops": 60.0, "two_threads_gflops": 118.0}
    assert len(machine.verdict(quiet, quiet)) == 1
    assert "share a core" in machine.verdict(quiet, shared)[1]
    assert "disturbed" in machine.verdict(quiet, slowed)[1]


@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_and_agrees(op, tmp_path, capsys):
    path, picture = tmp_path / "r.json", tmp_path / "r.png"
    arguments = [op, "--quick", "--repeat", "1", "--threads", "1", "--peers", "eager", "--json", str(path)]
    assert main([*arguments, *(["--plot", str(picture)] if op == "linear_logprob" else [])]) == 0
    result = json.loads(path.read_text())
    assert result["cases"] and result["versions"]["torch"] == torch.__version__ and result["commit"]
    assert picture.exists() == (op == "linear_logprob")
    out = capsys.readouterr().out
    for record in result["cases"]:
        assert record["case"] in out and not record["failed"] and "fastpost" not in record["disagrees"]
        assert all(t > 0 for m in record["measured"] for each in m["times"].values() for t in each)


BAD_ARGUMENTS = [
    (["linear_logprop"], "token_logprob"),
    (["--peers", "jax"], "trl"),
    (["--repeat", "0"], "at least 1"),
    (["--clock", "cpu"], "--threads 1"),
]


@pytest.mark.parametrize("arguments, said", BAD_ARGUMENTS)
def test_bad_arguments_name_the_good_ones(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err
