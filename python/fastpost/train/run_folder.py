# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: never overwritten, resumed only by the run that made it.

run/config.yaml  metrics.jsonl  timing.jsonl  loss.png  reference.safetensors  checkpoints/step-000010/  model/
or adapter/; with optim.ema also model-ema/ or adapter-ema/
"""

from __future__ import annotations

import fcntl
from pathlib import Path

import fastpost

from . import checkpoint
from .config import Config, dump, load_config, to_dict

FREE = ("log.", "train.output_dir", "train.resume", "train.keep_latest", "train.parallel", "data.cache")
"""Fields that a resume may differ in: they change no number of a run (train.parallel, like the number of ranks, no more
than rounding)."""


class RunFolder:
    """Opens the folder of `cfg`, creating it, or to resume. Holds a lock until `close` (or the end of the process).
    owner=False (a rank other than the first): knows the names, and touches nothing.

    Raises ValueError when the folder is in use, holds something else, or holds a run with other settings.
    """

    def __init__(self, cfg: Config, *, owner: bool = True):
        self.path = Path(cfg.train.output_dir)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.reference = self.path / "reference.safetensors"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.adapter = self.path / "adapter"
        self.plot = self.path / "loss.png"
        self._lock = None
        if not owner:
            return
        self._refuse_foreign()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._open(cfg)
        except BaseException:
            self.close()
            raise

    @property
    def finished(self) -> bool:
        return self.model.is_dir() or self.adapter.is_dir()

    @property
    def result(self) -> Path:
        """Where the trained model is, or adapter/ if that is what was trained."""
        return self.adapter if self.adapter.is_dir() else self.model

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def _began(self) -> bool:
        """Whether there is anything to lose: a metric, a checkpoint or a model."""
        metrics = self.metrics.is_file() and self.metrics.stat().st_size > 0
        return metrics or self.finished or checkpoint.latest(self.checkpoints) is not None

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(
                f"[train] train.output_dir: expected a folder, got the file {self.path}. Choose another name."
            )
        own = (".lock", ".unfinished-config.yaml")  # all that a start killed at once can leave
        content = sorted(p.name for p in self.path.iterdir() if p.name not in own) if self.path.exists() else []
        if content and not self.config.is_file():
            raise ValueError(
                f"[train] train.output_dir: {self.path} is not empty ({content[0]}, …) and no run of fastpost. Nothing "
                "is overwritten: choose another folder with --train.output_dir."
            )

    def _take_lock(self):
        lock = open(self.path / ".lock", "a")  # noqa: SIM115, held while the run lives; a kill frees it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ValueError(
                f"[train] train.output_dir: {self.path} is in use by another process. Wait or choose another folder."
            ) from None
        return lock

    def _open(self, cfg: Config) -> None:
        for folder in (self.path, self.checkpoints):
            checkpoint.clean(folder)
        if not self._began:  # new, or stopped by a mistake in settings or data that may be mended now
            self.reference.unlink(missing_ok=True)
            checkpoint.replace_text(self.config, f"# fastpost {fastpost.__version__}\n{dump(cfg)}")
            return
        if cfg.train.resume == "never":
            raise ValueError(
                f"[train] train.resume: {self.path} already holds a run and resume is 'never'. Choose another folder "
                "with --train.output_dir, or set train.resume to auto."
            )
        if changed := differences(load_config(self.config), cfg):
            listed = "; ".join(f"{name} is {old!r} there, {new!r} now" for name, old, new in changed[:4])
            more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
            raise ValueError(
                f"[train] train.output_dir: {self.path} holds a run with other settings: {listed}{more}. Nothing is "
                "overwritten: choose another folder with --train.output_dir, or take the old settings to resume."
            )


def differences(old: Config, new: Config) -> list[tuple[str, object, object]]:
    """(field, old, new) wherever two configs differ in a way that changes numbers."""
    a, b = _flat(to_dict(old)), _flat(to_dict(new))
    names = [n for n in {**a, **b} if not n.startswith(FREE)]
    return [(n, a.get(n), b.get(n)) for n in names if a.get(n) != b.get(n)]


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
