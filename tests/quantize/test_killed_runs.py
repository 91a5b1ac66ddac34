# SPDX-License-Identifier: Apache-2.0
"""A run that is killed between any two instructions goes on to the same bits."""

import os
import signal
import subprocess
import sys
import time

import pytest

import tiny

pytestmark = pytest.mark.slow


def test_killed_by_force(tmp_path):
    tiny.folder(tmp_path / "model", layers=8)
    text = " ".join(f"There are {i} apples and the answer is {i * 7}." for i in range(300))
    (tmp_path / "text.txt").write_text(text)
    command = [sys.executable, "-m", "fastpost", "quantize", str(tmp_path / "model"), "--method", "gptq",
               "--group-size", "16", "--calibration", str(tmp_path / "text.txt"), "--rows", "12", "--length", "64",
               "--threads", "1"]  # fmt: skip
    whole = subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "out.partial/layer-00002.safetensors").is_file():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0 and "blocks were there from an earlier attempt" in done.stdout, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["model", "out", "text.txt", "whole"]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
