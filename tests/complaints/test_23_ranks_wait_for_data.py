# SPDX-License-Identifier: Apache-2.0
"""Complaint 23: the other ranks run into a time-out while one of them tokenises.

(LLaMA-Factory #2814, speechbrain #1766, nanotron PR #280)"""

import os
import time
from datetime import timedelta

import launch
import runs
from fastpost.train import distributed, loop
from fastpost.train.loop import train


def codes(tmp, seconds, *, too_early=False):
    """Rank 1 takes so long to read its data; a collective may wait for 1 s."""
    cfg = runs.recipe(tmp, train={"max_steps": 1, "save_every": 0})

    def action():
        distributed.TIMEOUT = timedelta(seconds=1)
        load, connect, pick = loop.load_data, distributed.Ranks.connect, loop.pick_device

        def pick_and_connect(name, ranks):  # the mistake: groups before data, and a rank that waits in them
            connect(ranks, pick(name, ranks))
            distributed.Ranks.connect = lambda self, device: distributed.dist.barrier()
            return pick(name, ranks)

        def slow(*args):
            time.sleep(seconds * int(os.environ["RANK"]))
            return load(*args)

        loop.load_data = slow
        if too_early:
            loop.pick_device = pick_and_connect
        train(cfg)

    return launch.Forked(action, stderr=tmp / "stderr").wait()


def test_no_collective_before_all_have_read_their_data(tmp_path):
    assert codes(tmp_path, 3) == [0, 0]


def test_a_collective_before_would_be_seen(tmp_path):
    assert codes(tmp_path, 3, too_early=True) != [0, 0]


def test_that_it_is_the_time(tmp_path):
    """The same mistake does no harm to small data, which is why it is not noticed at once."""
    assert codes(tmp_path, 0, too_early=True) == [0, 0]
