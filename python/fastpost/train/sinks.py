# SPDX-License-Identifier: Apache-2.0
"""Trackers beside metrics.jsonl: TensorBoard, wandb, trackio. None is needed, none is on unless log.to names it.

Metrics have the names that TRL's runs have there: train/loss, train/rewards/margins, eval/rewards/margins, … A run
keeps one name and id (run/tracking.json) through every resume, and a step stands there once: TensorBoard is told to
forget what an interrupted run wrote after its checkpoint, and the others, which cannot forget, are not sent again what
they have (a resumed run makes the same numbers). Nothing here asks a question or fails a run: a tracker that breaks is
left out from then on, and one line says so.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from .checkpoint import replace_text
from .config import Config, dump, to_dict
from .jsonl import read


def check(to: list[str]) -> None:
    """Raise ValueError for a tracker that cannot work: its package is not installed (the message has the pip command),
    or wandb is told to be online and has no login."""
    for name in to:
        if find_spec(name) is None:
            raise ValueError(
                f"[log] log.to: expected installed packages, got {name}, which is not. Install it with: "
                f"pip install {name}; or leave it out of log.to."
            )
    mode = os.environ.get("WANDB_MODE")
    if "wandb" in to and mode in ("online", "shared") and not _logged_in():
        raise ValueError(
            f"[log] log.to: expected a login for wandb because WANDB_MODE is {mode}, got none. Run `wandb login`, or "
            "unset WANDB_MODE to keep the run offline."
        )


class Sinks:
    """Every tracker of log.to as one. `open` in a run that has `finished` steps and of whose lines in metrics.jsonl
    `replayed` will be written a second time."""

    # Each tracker says in `has` up to which step it holds this run's numbers already.

    def __init__(self, cfg: Config, run: Path):
        self.cfg, self.run = cfg, run
        self._open: dict[str, object] = {}
        self._replayed = 0

    def open(self, finished: int, replayed: int) -> None:
        self._replayed = replayed
        if self.cfg.log.to:
            identity = _identity(self.run)
            for name in self.cfg.log.to:
                self._try(name, lambda name=name: self._start(name, identity, finished))

    def _start(self, name: str, identity: dict[str, str], finished: int) -> None:
        sink = self._open[name] = KINDS[name](self.cfg, self.run, identity, finished)
        if isinstance(sink, Trackio):  # the one that says what it has and may have lost something
            timing = {row["step"]: row for row in read(self.run / "timing.jsonl")}
            for row in read(self.run / "metrics.jsonl"):
                if row["step"] > sink.has:
                    sink.log(row["step"], full_names(row, timing.get(row["step"], {})))

    def sync(self) -> None:
        """Before a checkpoint: what was logged until now must not get lost."""
        for name, sink in list(self._open.items()):
            if isinstance(sink, TensorBoard):
                self._try(name, sink.writer.flush)

    def log(self, step: int, values: dict) -> None:
        """Numbers by their full names at `step`; other values are left out."""
        values = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        again = self._replayed > 0
        self._replayed -= again
        for name, sink in list(self._open.items()):
            if not again or step > sink.has:
                self._try(name, lambda sink=sink: sink.log(step, values))

    def close(self, failed: bool = False) -> None:
        for name, sink in list(self._open.items()):
            self._try(name, lambda sink=sink: sink.close(failed))
        self._open = {}

    def _try(self, name: str, action) -> None:
        try:
            action()
        except Exception as error:
            self._open.pop(name, None)
            what = f"{type(error).__name__}: {error}"
            print(f"WARNING: {name} failed and is left out from here on: {what}", file=sys.stderr, flush=True)


def full_names(row: dict, timing: dict) -> dict[str, float]:
    """A line of metrics.jsonl, and of timing.jsonl for the same step, under the names that trackers get."""
    if any(name.startswith("eval_") for name in row):
        return {f"eval/{name[5:]}": value for name, value in row.items() if name != "step"}
    return {f"train/{name}": value for name, value in (row | timing).items() if name != "step" and value is not None}


def _identity(run: Path) -> dict[str, str]:
    """{"id", "name"} of the run for every tracker, made once and kept in the run folder."""
    file = run / "tracking.json"
    if not file.is_file():
        made = secrets.token_hex(4)
        # trackio knows runs by their names alone, so two folders of the same name need two.
        replace_text(file, json.dumps({"id": made, "name": f"{run.resolve().name}-{made}"}) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))


class TensorBoard:
    """run/tensorboard. Steps from `finished` + 1 on that an interrupted run left there are forgotten."""

    has = -1

    def __init__(self, cfg: Config, run: Path, identity: dict[str, str], finished: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        files = sorted(folder.glob("events.out.tfevents.*"))
        if not finished:
            while files:
                files.pop().unlink()
        if files:  # readers order files by the second in their names
            time.sleep(max(0.0, 1.01 - (time.time() - files[-1].stat().st_ctime)))
        self.writer = SummaryWriter(str(folder), purge_step=finished + 1 if files else None, flush_secs=10)
        if not finished:
            self.writer.add_text("config", f"```yaml\n{dump(cfg)}```", 0)

    def log(self, step: int, values: dict) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """Offline without a login: never a question. WANDB_MODE and the like are the user's and are left alone."""

    def __init__(self, cfg: Config, run: Path, identity: dict[str, str], finished: int):
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not _logged_in():
            mode = "offline"
            print(f"wandb  not logged in: kept offline in {run / 'wandb'}; `wandb sync` sends it later", flush=True)
        self.run = wandb.init(
            project=cfg.log.project, id=identity["id"], name=identity["name"], resume="allow", mode=mode, dir=str(run),
            config=to_dict(cfg), settings=wandb.Settings(console="off"),
        )  # fmt: skip
        # Offline it does not know what it had. (A kill can cost it the last rows, which it keeps in memory.)
        self.has = self.run.step - 1 if getattr(self.run, "resumed", False) else sys.maxsize

    def log(self, step: int, values: dict) -> None:
        self.run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def _logged_in() -> bool:
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # before 0.31
        return bool(wandb.api.api_key)


class Trackio:
    """A local database (TRACKIO_DIR); `trackio show` draws it."""

    def __init__(self, cfg: Config, run: Path, identity: dict[str, str], finished: int):
        import trackio

        self.run = trackio.init(
            project=cfg.log.project, name=identity["name"], resume="allow", config=to_dict(cfg), embed=False
        )
        # It writes half a second late, so a kill loses rows; the next step by its own count tells which.
        self.has = getattr(self.run, "_next_step", sys.maxsize) - 1

    def log(self, step: int, values: dict) -> None:
        self.run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
