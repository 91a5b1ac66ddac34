# SPDX-License-Identifier: Apache-2.0
"""Complaint 23: ranks wait in a collective while rank 0 tokenises, and the wait times out.

Here loading needs no process group: one process makes the cache, the others wait for its file lock, which the system
frees should that process die."""

import multiprocessing
import time

import pytest
import torch.distributed as dist

import tiny
from fastpost import objectives
from fastpost.data import loader
from fastpost.data.loader import load_dataset
from fastpost.train import loop
from fastpost.train.config import DataConfig
from train import runs

COLLECTIVES = ("init_process_group", "barrier", "broadcast", "all_reduce", "broadcast_object_list", "all_gather_object")


def never(*args, **kwargs):
    raise AssertionError("a collective while data is loaded")


def load(pipe, path: str, folder: str, slow: float) -> None:
    """One rank: says "reads" when it reads the file, then how its cache was found, and a sum over its tokens."""
    for name in COLLECTIVES:
        setattr(dist, name, never)
    read = loader.read_rows

    def slowly(*args):
        pipe.send("reads")
        time.sleep(slow)
        yield from read(*args)

    loader.read_rows = slowly
    data = load_dataset(DataConfig(train=path, cache=folder), tiny.tokenizer(), objectives.DPO())
    pipe.send((data.parts[0].cache.split()[2], sum(t for e in data.examples for s in e.sequences for t in s.ids)))


@pytest.fixture
def rank(tmp_path):
    """rank(slow) starts a process that takes `slow` seconds to read; returns it and the pipe that it reports to."""
    path, started = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.preference_rows(8)), []

    def rank(slow: float):
        ours, theirs = multiprocessing.Pipe()
        arguments = (theirs, str(path), str(tmp_path / "cache"), slow)
        started.append(multiprocessing.get_context("fork").Process(target=load, args=arguments, daemon=True))
        started[-1].start()
        return started[-1], ours

    yield rank
    for process in started:
        process.kill()
        process.join()


def heard(pipe, limit_s: float = 60):
    assert pipe.poll(limit_s), "nothing came"
    return pipe.recv()


def test_one_rank_tokenises_and_the_others_read(rank):
    _, first = rank(0.5)
    assert heard(first) == "reads"
    _, second = rank(0.5)
    made, hit = heard(first), heard(second)
    assert (made[0], hit[0]) == ("made", "hit") and made[1] == hit[1]


def test_when_the_rank_that_tokenises_dies_another_does_it(rank):
    process, first = rank(600)
    assert heard(first) == "reads"
    _, second = rank(0)
    assert not second.poll(0.5)  # it waits
    process.kill()
    assert heard(second) == "reads" and heard(second)[0] == "made"


def test_ranks_without_a_cache_tokenise_each_for_itself(tmp_path):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.preference_rows(8))
    a, b = (load_dataset(DataConfig(train=str(path), cache=None), tiny.tokenizer(), objectives.DPO()) for _ in range(2))
    assert a.examples == b.examples


def test_training_joins_no_process_group_before_its_data_is_loaded(tmp_path, monkeypatch):
    """Whatever joins it (the loop, or a launcher) comes after load_data."""
    events = []
    real = loop.load_data
    monkeypatch.setattr(loop, "load_data", lambda *a, **k: (events.append("load"), real(*a, **k))[1])
    init = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: (events.append("init"), init(*a, **k))[1])
    loop.train(runs.recipe(tmp_path, "--train.max_steps", "1"))
    assert events[0] == "load"
