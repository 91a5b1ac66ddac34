# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import time

import pytest

from fastpost import cli


def run(capsys, *argv) -> tuple[int, str, str]:
    status = cli.main(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


def test_help_is_quick_and_needs_no_torch():
    code = "import sys; from fastpost.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    best = 9.0
    for _ in range(3):  # the best of three: other processes may be busy
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        best = min(best, time.perf_counter() - start)
        assert done.returncode == 0
    assert all(verb in done.stdout for verb in cli.VERBS)
    assert best < 0.3


def test_verb_help_needs_no_torch():
    code = "import sys; from fastpost.cli import main; main(['data', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--optim.lr [1e-06]" in done.stdout


def test_verbs_that_do_not_exist(capsys):
    assert run(capsys, "trian") == (2, "", "fastpost: there is no verb 'trian'. Did you mean 'train'?\n")
    status, _, err = run(capsys, "zzz")
    assert status == 2 and "Known: train, data, eval" in err


def test_a_verb_without_a_module_says_so(capsys, monkeypatch):
    monkeypatch.setitem(cli.VERBS, "plot", ("fastpost.cli.no_such_module", "", ""))
    assert run(capsys, "plot") == (
        2,
        "",
        "fastpost: plot is not in this version yet. `fastpost --help` lists the verbs that are.\n",
    )


def test_users_mistakes_have_no_traceback(capsys, monkeypatch, tmp_path):
    status, out, err = run(capsys, "data", str(tmp_path / "none.yaml"))
    assert (status, out) == (1, "") and err.startswith(f"fastpost: {tmp_path}/none.yaml: no such recipe.")
    monkeypatch.setenv("FASTPOST_TRACEBACK", "1")
    with pytest.raises(ValueError):
        cli.main(["data", str(tmp_path / "none.yaml")])


def test_version(capsys):
    import fastpost

    assert run(capsys, "--version") == (0, f"{fastpost.__version__}\n", "")
