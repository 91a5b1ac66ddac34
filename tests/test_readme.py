# SPDX-License-Identifier: Apache-2.0
"""README and CONTRIBUTING say what is true: the Python runs as it stands, names exist, tables are what was measured."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from fastpost import cli, objectives
from fastpost.cli.recipes import recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def test_python_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """The model's name is a folder here, so that nothing is fetched."""
    code = blocks(README, "python")
    (name,) = re.findall(r'^name = "(.*)"$', code[0], re.M)
    tiny.folder(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(compile(code[0], "README.md", "exec"), space)
    loss, rewards = capsys.readouterr().out.split(" ", 1)
    assert math.isfinite(float(loss)) and len(eval(rewards)) == 2
    assert len(code[0].strip().splitlines()) <= 22

    # What it trains is what it says: mean log-probs of the replies, next tokens only, by plain torch in float64.
    tokenizer = space["tokenizer"]
    model = tiny.model().double()
    start = len(tokenizer(space["prompt"]).input_ids)
    means = []
    for reply in (space["chosen"], space["rejected"]):
        ids = torch.tensor([tokenizer(space["prompt"] + reply).input_ids])
        logp = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[start - 1 :]
        means.append(logp.mean())
    wanted = space["objective"].beta * (means[0] - means[1] - space["objective"].gamma_beta_ratio)
    assert space["out"].loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(wanted).item(), rel=1e-4)

    exec(compile(code[1], "README.md", "exec"), space)
    scored = space["target"].flatten() != -100
    torch.testing.assert_close(space["after"][scored], space["before"][scored], rtol=1e-5, atol=1e-5)
    assert not space["after"][~scored].any()
    for more in code[2:]:
        exec(compile(more, "README.md", "exec"), space)


def test_names_in_readme_exist():
    named = README[README.index("Objectives: ") :].split("\n\n")[0]
    given = {
        c.__name__ for c in vars(objectives).values() if isinstance(c, type) and issubclass(c, objectives.Objective)
    }
    assert set(re.findall(r"`([A-Z]\w+)`", named)) == given - {"Objective"}
    variants = re.search(r"`DPO` \((.*?),\s+plus", named, re.S).group(1).replace("\n", " ").split(", ")
    assert set(variants) == {*objectives.DPO_LOSS_TYPES, "label smoothing"}
    for verb, rest in re.findall(r"^fastpost (\w+) ?(\S*)", "\n".join(blocks(README, "sh")), re.M):
        assert cli.VERBS[verb][0], verb
        assert importlib.util.find_spec(cli.VERBS[verb][0]), verb
        assert not rest.endswith(".yaml") or rest.removesuffix(".yaml") in recipes()


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_files_that_are_named_exist(text):
    for path in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / path).exists(), path
    for path in set(re.findall(r"(?<![\w/.])((?:tools|tests|cpp|cuda|bench)/[\w./]*\w)", text)):
        assert (ROOT / path).exists() or "X" in path or path == "bench/results", path  # made by the first measurement
    for command in set(re.findall(r"^(tools/\w+)", "\n".join(blocks(text, "sh")), re.M)):
        assert os.access(ROOT / command, os.X_OK), command


def test_coming_from_another_trainer():
    """The table's conversions: TRL's IPO and its SimPO, whose margin is gamma / beta."""
    logprob, length, reference = torch.tensor([-3.0, -8.0]), torch.tensor([3, 4]), torch.tensor([-3.5, -7.0])
    beta, gamma = 2.5, 1.4
    (loss,) = objectives.SimPO(beta=beta, gamma_beta_ratio=gamma / beta)(logprob, length)
    assert loss == pytest.approx(-torch.nn.functional.logsigmoid(torch.tensor(beta * (-1.0 + 2.0) - gamma)).item())
    (loss,) = objectives.IPO(beta=0.1)(logprob, length, reference)
    assert loss == pytest.approx((0.5 / 3 + 1.0 / 4 - 1 / 0.2) ** 2)


# ---- tools/readme.py ----


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools/readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_what_was_measured():
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


MACHINE = {
    "machine": "some-cpu", "cpu": "Some CPU", "hardware_threads": 2, "gpu": None, "date": "2026-11-22T10:00:00+00:00",
    "commit": "0123456789abcdef", "versions": {"torch": "2.13.0", "fastpost": "0.1.0", "trl": None},
}  # fmt: skip


def bench_result(**changes) -> dict:
    median = {
        "plain GEMMs": 0.09,
        "fastpost": 0.1,
        "eager": 0.2,
        "eager float32": 0.15,
        "compile": 0.3,
        "trl chunked": 0.01,
    }
    case = {
        "op": "token_logprob", "case": "N=1 forward+backward", "limits": ["plain GEMMs"], "failed": {"liger x": "no"},
        "errors": {name: {} for name in median if name != "plain GEMMs"}, "disagrees": ["trl chunked"],
        "measured": [{"threads": 1, "median": median}],
    }  # fmt: skip
    only_forward = case | {"case": "N=1 forward"}
    return MACHINE | {"threads": [1], "cases": [case | changes, only_forward], "probe": {"verdict": ["Quiet."]}}


def test_generator_quotes_the_best_right_peer_and_no_wrong_one(generator):
    (table,) = generator.measured(bench_result())
    assert "| op | case | ms | share of limit | torch eager | torch.compile | TRL |" in table
    assert "| `token_logprob` | N=1 | 100 | 0.90 | 1.50 × | 3.00 × | disagrees |" in table
    assert "Some CPU, 2 hardware threads; torch 2.13.0; 2026-11-22, commit 0123456789ab, 1 thread" in table
    assert table.count("N=1") == 1 and "Quiet." in table
    (wrong,) = generator.measured(bench_result(disagrees=["fastpost"]))
    assert "| N=1 | 100 | disagrees | – | – | – |" in wrong


def test_generator_writes_between_the_markers_only(generator):
    before, after = README.split("<!-- gpu:")[0], README.split("<!-- end of gpu -->")[1]
    runs = [{"side": "fastpost", "threads": 1, "seconds": [9.0, 2.0, 3.0, 2.5], "peak_gb": 1.5, "loss": [0.9]}]
    step = MACHINE | {"rows": "GSM8K", "runs": runs}
    gpu = bench_result() | {"gpu": "H100", "tests": {"token_logprob": {"passed": 7, "failed": 0}}}
    gpu["sanitizer"] = {"memcheck": "nothing found"}
    kernels = {"token_logprob": ["forward_kernel"], "int4_gemm": ["gemm_kernel"]}
    text = generator.render(README, [step, gpu], kernels)
    assert text.startswith(before.split("<!-- measured:")[0]) and text.endswith(after)
    assert "| 1 | fastpost | 2.50 | 1.50 | 0.90000 |" in text
    stamp = "(2026-11-22, 0123456789ab)"
    assert f"| `forward_kernel` | 7 tests passed, 0 failed {stamp}; 2 benchmarks, 0 wrong {stamp} |" in text
    assert "| `int4_gemm` | `gemm_kernel` | not yet run |" in text
    assert "compute-sanitizer on H100: memcheck: nothing found." in text
    assert generator.render(text, [step, gpu], kernels) == text
    assert generator.NOTHING in generator.render(text, [], kernels)
    with pytest.raises(ValueError, match="markers of 'gpu' once"):
        generator.render(README.replace("<!-- end of gpu -->", ""), [], kernels)


def test_generator_finds_every_kernel(generator):
    found = generator.kernels(ROOT / "cuda/ops")
    count = sum(p.read_text().count("__global__") for p in (ROOT / "cuda/ops").glob("*.cu"))
    assert sum(map(len, found.values())) == count > 0
    assert all(op in README.split("<!-- gpu:")[1] for op in found)
