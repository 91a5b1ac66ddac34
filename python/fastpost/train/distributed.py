# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: who they are, what they agree on, and how one that fails ends them all.

    torchrun --nproc-per-node 2 -m fastpost train recipe.yaml      # a process for each GPU, or 2 on a CPU: ranks 0, 1

    with join() as ranks:                  # reads what torchrun set; no collective yet
        data = load()                      # may take as long as it likes
        ranks.connect(device)              # from here on: gloo on CPU tensors, NCCL on GPU tensors
        denominator = ranks.sum(count)

Only the first rank prints and writes. Every rank reads the same recipe, data and model, and the run folder is on a file
system that all of them see. A process started without torchrun is `ALONE`: every method is then trivial.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=20)
"""How long a collective waits for a rank that is slow. Longer than any write to a disk, shorter than a night."""
GRACE_S = 5.0
"""Seconds that a rank has for a message of its own after another one has failed."""
LOOK_S = 0.5
"""How often a rank looks whether another one has failed."""


class RankLost(OSError):
    """Another rank ended without a word (killed, out of memory, machine gone)."""


class Elsewhere(SystemExit):
    """Another rank failed and says why; this one has nothing to add. It leaves last: launchers stop all ranks at the
    first that ends, the one that speaks included."""


class Turns(NamedTuple):
    """The micro-batches of one rank, as lists of rows."""

    mine: list[list[int]]
    idle: list[list[int]]  # computed and thrown away, so that sharded ranks make the same number of collective calls


class Ranks:
    """This process among those of its run. `sharded`: each holds a part of the model (FSDP2) instead of a copy."""

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, store: dist.Store | None = None):
        self.rank, self.size, self.local = rank, size, local
        self.sharded = False
        self._store, self._told = store, 0
        # torchrun's agent outlives its ranks and holds the store; without it the first rank does.
        self._holds_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._other_failed, self._over = False, threading.Event()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def replicated(self) -> bool:
        """Several ranks with a whole copy of the model each (DDP)."""
        return self.size > 1 and not self.sharded

    @property
    def shard(self) -> int:
        """Which part of the model this rank holds; 0 where each has all."""
        return self.rank if self.sharded else 0

    @property
    def kind(self) -> str:
        return "fsdp" if self.sharded else "ddp" if self.size > 1 else "alone"

    # ---- before the groups exist: through the store alone -------------------------------------------------------

    def from_first(self, make: Callable[[], object]):
        """What `make()` returns on the first rank, on every rank; only there is it called. A JSON value."""
        if self.size == 1:
            return make()
        self._told += 1
        key = f"told/{self._told}"
        if self.first:
            value = make()
            self._store.set(key, json.dumps(value))
            return value
        self._wait(lambda: self._store.check([key]))
        return json.loads(self._store.get(key))

    def connect(self, device: torch.device) -> None:
        """Wait, without a limit, until all ranks are here; then open the groups. Nothing before this line can time out
        because a rank is still tokenising."""
        if self.size == 1:
            return
        self._store.add("here", 1)
        self._wait(lambda: self._store.add("here", 0) >= self.size)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.PrefixStore("groups", self._store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=TIMEOUT)
        threading.Thread(target=self._watch, args=(self._store.clone(),), daemon=True).start()

    def _wait(self, ready: Callable[[], bool]) -> None:
        while not ready():
            if self._store.check(["failed"]):
                raise Elsewhere(1)
            time.sleep(0.02)

    # ---- agreements: small numbers, over gloo -------------------------------------------------------------------

    def sum(self, value: float) -> float:
        """The sum over ranks, float64, the same bits on each."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        return self._reduce(value, dist.ReduceOp.MAX)

    def _reduce(self, value: float, op) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op)
        return tensor.item()

    def gather(self, value) -> list:
        """`value` of every rank, in order of rank, on every rank. Small Python objects."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    # ---- work ---------------------------------------------------------------------------------------------------

    def deal(self, parts: list[list[int]], examples: Sequence) -> Turns:
        """This rank's share of the micro-batches `parts`, rows of `examples`: a pure function of them.

        The largest go round first, so those that are computed at the same time are about equal. One rank: `parts` as
        they are."""
        if self.size == 1:
            return Turns(parts, [])
        tokens = [sum(examples[row].computed for row in part) for part in parts]
        turn = sorted(range(len(parts)), key=lambda i: -tokens[i])  # stable, so the same on every rank
        mine = [parts[i] for i in turn[self.rank :: self.size]]
        missing = -(-len(parts) // self.size) - len(mine) if self.sharded else 0
        smallest = min((examples[row].computed, row) for part in parts for row in part)[1] if missing else None
        return Turns(mine, [[smallest]] * missing)

    # ---- the end ------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """The run is over on this rank. The one that holds the store stays until it is over on all."""
        self._over.set()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._store.add("left", 1)
        if self._holds_store:
            self._wait(lambda: self._store.add("left", 0) >= self.size)

    def failed(self, error: BaseException) -> BaseException | None:
        """Tell the others that this rank ends by `error`. Returns what to raise instead: nothing to print when another
        rank has said the same, or has failed before and so broke the connection; None = the error itself."""
        leave = threading.Timer(2 * GRACE_S, os._exit, (1,))  # a group with a dead member may never close by itself
        leave.daemon = True
        leave.start()
        self._over.set()
        before, repeated = self._other_failed, False
        try:
            before |= self._store.check(["failed"])
            self._store.set("failed", str(self.rank))
            text = f"{type(error).__name__}: {error}"
            repeated = self._store.add(f"said/{hashlib.sha1(text.encode()).hexdigest()}", 1) > 1
            if self._holds_store:
                time.sleep(2 * LOOK_S)  # the others need it to learn of this
        except dist.DistError:
            pass  # the process that held the store is gone
        if repeated or (before and isinstance(error, RuntimeError)):
            return Elsewhere(1)
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            return RankLost(
                f"[train] rank {self.rank} of {self.size}: another rank ended without a word (killed? out of memory?). "
                "Start the same command again: it goes on from the newest checkpoint."
            )
        return None

    def _watch(self, store: dist.Store) -> None:
        """End this process soon after another one failed: a GPU that waits in NCCL for a dead rank never notices."""
        try:
            while not (self._over.is_set() or store.check(["failed"])):
                self._over.wait(LOOK_S)
        except dist.DistError:
            return  # the process that held the store is gone, and with it all connections
        if not self._over.is_set():
            self._other_failed = True
            if not self._over.wait(GRACE_S):
                os._exit(1)


ALONE = Ranks()


@contextmanager
def join() -> Iterator[Ranks]:
    """The ranks that torchrun (or srun with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set) started, or one alone.

    Inside, ranks other than the first print nothing to stdout. An error on one rank ends them all, and each different
    message is printed once."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    ranks = Ranks(rank, size, int(os.environ.get("LOCAL_RANK", rank)), dist.PrefixStore("fastpost", store))
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if ranks.first else nowhere):
        try:
            yield ranks
        except Elsewhere:
            time.sleep(3 * LOOK_S)
            raise
        except SystemExit:  # asked to stop, all ranks at the same step
            ranks.leave()
            raise
        except BaseException as error:
            if (other := ranks.failed(error)) is None:
                raise
            if isinstance(other, Elsewhere):
                time.sleep(3 * LOOK_S)
            raise other from error
        ranks.leave()
