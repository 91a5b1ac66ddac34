# SPDX-License-Identifier: Apache-2.0
"""Complaint 4: imports and --help take seconds. Here: names load on use, verbs import on call; help never sees torch.
Times are CPU seconds of a child process, which other programs on the machine do not change much."""

import os
import subprocess
import sys

import pytest

import tiny

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "peft", "safetensors", "tensorboard", "jinja2")


def child(code: str, *arguments: str) -> tuple[float, subprocess.CompletedProcess]:
    """(CPU seconds, the finished process)."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4]), done  # user and system time of children


def imports(*argv: str) -> tuple[float, set[str]]:
    """CPU seconds of `fastpost ARGV`, and the heavy packages it imported."""
    code = (
        "import sys\nfrom fastpost.cli import main\nstatus = main(sys.argv[1:])\n"
        f"print('heavy:', *[m for m in {HEAVY} if m in sys.modules])\nsys.exit(status)"
    )
    seconds, done = child(code, *argv)
    assert done.returncode == 0, done.stderr
    return seconds, set(done.stdout.strip().splitlines()[-1].removeprefix("heavy:").split())


HELP = [
    line.split()
    for line in ("--help", "train --help", "data --help", "eval --help", "recipes ls", "--version", "train")
]


@pytest.mark.parametrize("argv", HELP, ids=" ".join)
def test_help_is_quick_and_imports_nothing_heavy(argv):
    runs = [imports(*argv) for _ in range(2)]
    assert runs[0][1] == set()
    assert min(seconds for seconds, _ in runs) <= 0.4


@pytest.mark.parametrize("verb", ["generate", "plot", "export"])
def test_help_of_argparse_verbs(verb):
    code = (
        "import sys\nfrom fastpost.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit: pass\n"
        f"sys.exit(any(m in sys.modules for m in {HEAVY}))"
    )
    seconds, done = child(code, verb, "--help")
    assert done.returncode == 0 and "usage: fastpost" in done.stdout and seconds <= 0.5


def test_import_fastpost_loads_no_torch_and_torch_alone_for_its_ops():
    seconds, done = child(f"import sys, fastpost; sys.exit(any(m in sys.modules for m in {HEAVY}))")
    assert done.returncode == 0 and seconds <= 0.3
    rest = tuple(m for m in HEAVY if m not in ("torch", "numpy", "jinja2"))  # torch itself may import these
    _, done = child(f"import sys, fastpost; fastpost.linear_logprob; sys.exit(any(m in sys.modules for m in {rest}))")
    assert done.returncode == 0, done.stderr


def test_the_mistake_would_be_seen():
    """One eager import at the top of the command, and the check speaks up."""
    code = "import sys, torch; sys.exit(any(m in sys.modules for m in ('torch',)))"
    seconds, done = child(code)
    assert done.returncode == 1 and seconds > 0.4


def test_first_step_within_fifteen_seconds(tmp_path):
    """From the shell to the end of a run of one step; SmolLM2-135M takes about two seconds more (CPU, one thread)."""
    tiny.folder(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "train.jsonl", tiny.preference_rows(16))
    recipe = tiny.recipe(
        tmp_path / "r.yaml", model={"path": tmp_path / "model"}, data={"train": tmp_path / "train.jsonl"},
        objective={"name": "simpo"}, train={"output_dir": tmp_path / "run", "max_steps": 1, "threads": 1},
        log={"plot": False},
    )  # fmt: skip
    code = "import sys; from fastpost.cli import main; sys.exit(main(sys.argv[1:]))"
    seconds, done = child(code, "train", str(recipe))
    assert done.returncode == 0 and "step  1/1 " in done.stdout, done.stderr
    assert seconds <= 15
