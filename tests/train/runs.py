# SPDX-License-Identifier: Apache-2.0
"""A small run on a tiny model, and processes that are killed in the middle of one."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import torch

import tiny
from fastpost.train.config import Config, load_config
from fastpost.train.loop import train


def recipe(tmp: Path, *overrides: str, rows: int = 22, model: dict | None = None, **groups: dict) -> Config:
    """A DPO run of 6 steps in 2 epochs (8 + 8 + 6 rows) over micro-batches of up to 300 tokens."""
    if not (tmp / "model").exists():
        tiny.folder(tmp / "model", **(model or {}))
        tiny.write_jsonl(tmp / "train.jsonl", tiny.preference_rows(rows))
        tiny.write_jsonl(tmp / "eval.jsonl", tiny.preference_rows(6, seed=7))
    tree = {
        "model": {"path": tmp / "model"},
        "data": {"train": tmp / "train.jsonl", "eval": tmp / "eval.jsonl"},
        "objective": {"name": "dpo"},
        "optim": {"lr": 1e-3},
        "train": {
            "output_dir": tmp / "run", "epochs": 2, "batch_size": 8, "max_tokens_per_micro_batch": 300,
            "save_every": 2, "eval_every": 4,
        },
        "log": {"plot": False},
    }  # fmt: skip
    for group, keys in groups.items():
        tree[group] = tree[group] | keys
    return load_config(tiny.recipe(tmp / "recipe.yaml", **tree), overrides)


def one_thread():
    torch.set_num_threads(1)


def in_child(action, limit_s: float = 60) -> int:
    """Run `action()` in a fork of this process and return its wait status: 0, or the signal that ended it.

    A fork has torch imported already, so a test can afford to kill many.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(int(limit_s))
            torch.set_num_threads(1)
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killed_at(cfg: Config, module, name: str, call: int, *, after: bool = False):
    """An action: train, and die by SIGKILL at call number `call` (from 1) of `module.name`, before it or right after
    it."""

    def action():
        original, calls = getattr(module, name), 0

        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, wrapped)
        train(cfg)

    return action


def outcome(run: Path) -> dict[str, bytes]:
    """What must not depend on interruptions: metrics and final weights, as bytes."""
    return {name: (run / name).read_bytes() for name in ("metrics.jsonl", "model/model.safetensors")}


def stored(path, kind: str) -> dict:
    """The tensors of a checkpoint by name: "model", "optimizer" or "random"."""
    from fastpost.train import checkpoint

    names = [name for name in checkpoint.contents(path) if name.startswith(f"{kind}.")]
    return dict(zip((name.partition(".")[2] for name in names), checkpoint.read(path, names), strict=True))
