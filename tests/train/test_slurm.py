# SPDX-License-Identifier: Apache-2.0
"""tools/slurm/train.sbatch with stand-ins for srun and scontrol: SIGTERM to the batch script leaves a checkpoint and
queues the job again."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import launch
import runs

SCRIPT = Path(__file__).parents[2] / "tools/slurm/train.sbatch"


def stand_in(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.slow
def test_out_of_time(tmp_path):
    runs.recipe(tmp_path, train={"save_every": 0, "eval_every": 0, "epochs": 8})
    programs = tmp_path / "bin"
    stand_in(programs, "srun", 'shift\nexec "$@"')
    stand_in(programs, "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    stand_in(programs, "scontrol", f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {tmp_path}/asked; fi')
    environment = launch.environment() | {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "4711", "FASTPOST_PORT": str(launch.free_port()),
    }  # fmt: skip
    command = ["bash", str(SCRIPT), str(tmp_path / "recipe.yaml"), "--train.parallel", "ddp"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    launch.wait_for_step(tmp_path / "run", 3, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert "the same command goes on from there" in out, out + err
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert len(os.listdir(tmp_path / "run/checkpoints")) == 1 and process.returncode != 0


def test_it_is_a_script_that_runs():
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr
