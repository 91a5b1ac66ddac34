# SPDX-License-Identifier: Apache-2.0
"""Complaint 23: ranks wait in a collective while rank 0 tokenises, and the wait times out.

Here loading needs no process group: one process makes the cache, the others wait for its file lock, which the system
frees should that process die."""

import os
import signal
import subprocess
import sys
import time

import pytest

import tiny
from fastpost import objectives
from fastpost.data.loader import load_dataset
from fastpost.train.config import DataConfig

RANK = """
import sys, time
import torch.distributed as dist
def never(*args, **kwargs):
    raise AssertionError("a collective while data is loaded")
for name in ("init_process_group", "barrier", "broadcast", "all_reduce", "broadcast_object_list", "all_gather_object"):
    setattr(dist, name, never)

import tiny
from fastpost import objectives
from fastpost.data import loader
from fastpost.train.config import DataConfig

slow, path, folder = float(sys.argv[1]), sys.argv[2], sys.argv[3]
read = loader.read_rows
def slowly(*args):
    print("reads", flush=True)
    time.sleep(slow)
    yield from read(*args)
loader.read_rows = slowly
tokenizer = tiny.tokenizer()
print("begin", flush=True)
data = loader.load_dataset(DataConfig(train=path, cache=folder), tokenizer, objectives.DPO())
tokens = sum(t for e in data.examples for s in e.sequences for t in s.ids)
print(data.parts[0].cache.split()[2], tokens, flush=True)
"""


@pytest.fixture
def rank(tmp_path):
    path, started = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.preference_rows(8)), []

    def rank(k: int, slow: float):
        environment = {"RANK": str(k), "WORLD_SIZE": "2", "MASTER_ADDR": "203.0.113.1", "MASTER_PORT": "1"}
        paths = os.pathsep.join([os.path.dirname(tiny.__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(slow), str(path), str(tmp_path / "cache")], text=True,
                stdout=subprocess.PIPE, env=os.environ | environment | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            )
        )  # fmt: skip
        assert started[-1].stdout.readline() == "begin\n"
        return started[-1]

    yield rank
    for process in started:
        process.kill()
        process.wait()


def test_one_rank_tokenises_and_the_others_read(rank, tmp_path):
    first = rank(0, 1.0)
    assert first.stdout.readline() == "reads\n"
    second = rank(1, 1.0)
    out = [p.communicate(timeout=60)[0].split() for p in (first, second)]
    assert first.returncode == second.returncode == 0
    assert [o[0] for o in out] == ["made", "hit"] and out[0][1] == out[1][1]


def test_when_the_rank_that_tokenises_dies_another_does_it(rank, tmp_path):
    first = rank(0, 600)
    assert first.stdout.readline() == "reads\n"
    second = rank(1, 0)
    time.sleep(0.3)
    assert second.poll() is None  # it waits
    first.send_signal(signal.SIGKILL)
    out, _ = second.communicate(timeout=60)
    assert out.split()[:2] == ["reads", "made"] and second.returncode == 0


def test_ranks_without_a_cache_tokenise_each_for_itself(tmp_path):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.preference_rows(8))
    a, b = (load_dataset(DataConfig(train=str(path), cache=None), tiny.tokenizer(), objectives.DPO()) for _ in range(2))
    assert a.examples == b.examples


def test_training_joins_no_process_group_before_its_data_is_loaded(tmp_path, monkeypatch):
    """Whatever joins it (the loop, or a launcher) comes after load_data."""
    import torch.distributed as dist

    from fastpost.train import loop
    from train import runs

    events = []
    real = loop.load_data
    monkeypatch.setattr(loop, "load_data", lambda *a, **k: (events.append("load"), real(*a, **k))[1])
    init = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: (events.append("init"), init(*a, **k))[1])
    loop.train(runs.recipe(tmp_path, "--train.max_steps", "1"))
    assert events[0] == "load"
