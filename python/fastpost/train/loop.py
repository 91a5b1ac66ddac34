# SPDX-License-Identifier: Apache-2.0
"""The training loop. Everything a run does, top to bottom."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from fastpost import objectives
from fastpost.data.loader import Dataset, load_dataset
from fastpost.hf import folder

from . import checkpoint, plot, reference, sharding
from .config import Config
from .device import pick_device
from .distributed import Ranks, join
from .evaluate import evaluate
from .flops import peak_flops, step_flops
from .forward import load_policy, schedule, wider_than_bf16
from .metrics import NoLog, RunLog, peak_memory_gb
from .optim import COMPUTE_DTYPE, AdamW
from .plan import Plan
from .run_folder import RunFolder
from .step import train_step
from .stop import Stop, Stopped


def train(cfg: Config) -> Path:
    """Train as `cfg` says and return the run folder, whose model/ is a Hugging Face folder. Under torchrun all ranks
    call this.

    A run that was interrupted goes on from its newest checkpoint and gives, at one thread, the bits of an unbroken one.
    Raises ValueError for a mistake in settings or data, NotFinite when a loss or gradient is not a number,
    CheckpointError when the disk fails, Stopped after a SIGTERM or Ctrl-C.
    """
    with join() as ranks, RunFolder(cfg, owner=ranks.first) as run:
        if ranks.from_first(lambda: run.finished):
            print(
                f"{run.path} is finished: its model is {run.model}. For another run choose another --train.output_dir."
            )
        else:
            _train(cfg, run, ranks)
    return run.path


def _train(cfg: Config, run: RunFolder, ranks: Ranks) -> None:
    device, compute = pick_device(cfg.train.device, ranks), COMPUTE_DTYPE[cfg.optim.precision]
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    random.seed(cfg.train.seed)
    torch.manual_seed(cfg.train.seed)

    # What can be wrong with settings and data is found before any weight is read.
    objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
    source = reference.source(cfg.model.reference, objective)
    data = load_data(cfg, objective, source)
    plan = Plan(cfg, data["train"], ranks.size)
    ranks.connect(device)
    parts = {"train": plan.first_epoch()}
    if "eval" in data:
        parts["eval"] = plan.cut(data["eval"], list(range(len(data["eval"]))))

    model = sharding.place(load_policy(cfg, device, move=False), device, cfg.train.parallel, ranks)
    if ranks.size > 1:
        print(f"ranks  {ranks.size} x {device.type}, {ranks.kind}", flush=True)
    turns = {name: ranks.deal(parts[name], data[name].examples) for name in parts}
    optimizer = AdamW(
        model,
        precision=cfg.optim.precision,
        betas=cfg.optim.betas,
        eps=cfg.optim.eps,
        weight_decay=cfg.optim.weight_decay,
        seed=cfg.train.seed + ranks.shard,
    )
    if source == "start":
        reference.attach(data, turns, run.reference, lambda: model, ranks)
    elif source not in ("none", "columns"):
        frozen = partial(folder.load_model, source, compute, cfg.model.attention)
        reference.attach(data, turns, run.reference, lambda: sharding.place(frozen(), device, ranks.kind, ranks), ranks)

    torch.manual_seed(cfg.train.seed + 1_000_003 * ranks.rank)  # ranks draw different dropout
    newest = ranks.from_first(lambda: str(checkpoint.latest(run.checkpoints) or ""))
    start = saved = checkpoint.load(Path(newest), model, optimizer, ranks=ranks) if newest else 0
    seen = sum(map(plan.tokens, range(start)))
    peak = peak_flops(device, compute)
    run_log = partial(RunLog, run.path, finished=start, total=plan.steps, every=cfg.log.every)

    with run_log() if ranks.first else NoLog() as log, Stop(speaks=ranks.first) as stop:

        def held_out(step: int) -> None:
            if "eval" in data:
                mine, idle = (map(data["eval"].batch, rows) for rows in turns["eval"])
                log.evaluation(step, evaluate(model, objective, mine, idle=idle, ranks=ranks))

        if newest:
            log.say(f"resume from {newest}{checkpoint.resharded(Path(newest), ranks)}")
        else:
            if cfg.train.save_every and (warning := checkpoint.space_warning(run.path, model, optimizer)):
                log.say(warning)
            held_out(0)
        model.train()

        for step in range(start, plan.steps):
            if number := int(ranks.max(stop.signal)):
                if step > saved:
                    log.sync()
                    checkpoint.save(run.checkpoints, step, model, optimizer, keep=cfg.train.keep_latest, ranks=ranks)
                log.say(f"stopped after step {step}/{plan.steps}; the same command goes on from there")
                raise Stopped(128 + number)
            begin = time.perf_counter()
            mine, idle = ranks.deal(plan.parts(step), data["train"].examples)
            batches = [data["train"].batch(part) for part in mine]
            ready = time.perf_counter()
            values = train_step(
                model,
                objective,
                optimizer,
                batches,
                step=step,
                lr=plan.lr(step),
                max_grad_norm=cfg.optim.max_grad_norm,
                idle=[data["train"].batch(part) for part in idle],
                ranks=ranks,
            )
            seconds = time.perf_counter() - begin

            tokens = plan.tokens(step)
            seen += tokens
            values |= {"epoch": plan.epoch(step + 1), "num_tokens": seen}
            timing = {
                "ms": 1e3 * seconds,
                "tps": tokens / seconds,
                "mfu": step_flops(model, batches) / seconds / peak if peak else None,
                "memory/peak_gb": peak_memory_gb(device),
                "data_wait": (ready - begin) / seconds,
            }
            if step == 0:
                log.say(initial_check(values["loss"], objective.initial_loss(), source, cfg.optim.precision))
                if batches and not ranks.sharded:
                    log.say(f"head   {schedule(model, batches[0].to(device), objective)}")
            log.step(step + 1, values, timing)

            last = step + 1 == plan.steps
            if last or _due(step + 1, cfg.train.eval_every):
                held_out(step + 1)
            if not last and _due(step + 1, cfg.train.save_every):
                log.sync()
                checkpoint.save(run.checkpoints, step + 1, model, optimizer, keep=cfg.train.keep_latest, ranks=ranks)
                saved = step + 1

    if wider_than_bf16(Path(cfg.model.path)):
        optimizer.widen()
    del optimizer
    if not ranks.first:
        folder.give_parts(model, cfg.model.path)
        return
    try:
        folder.save_folder(model, cfg.model.path, run.model)
    except (OSError, SafetensorError) as error:
        begin = checkpoint.latest(run.checkpoints) or "the beginning (train.save_every is 0)"
        raise checkpoint.CheckpointError(
            f"[train] {run.model}: the final model could not be written: {error}. Free some space and start the same "
            f"command again: it goes on from {begin}."
        ) from error
    if cfg.log.plot:
        plot.draw([run.path], run.plot)
    print(f"saved {run.path}/{{config.yaml,metrics.jsonl,{'loss.png,' if cfg.log.plot else ''}model/}}")


def _due(finished: int, every: int) -> bool:
    return every > 0 and finished % every == 0


def load_data(cfg: Config, objective, source: str) -> dict[str, Dataset]:
    """{"train": ..., "eval": ...} (eval when there is one), with one printed line on what was kept of each."""
    tokenizer = folder.load_tokenizer(cfg.model.path)
    paths = {"train": cfg.data.train} | ({"eval": cfg.data.eval} if cfg.data.eval else {})
    data = {}
    for name, path in paths.items():
        data[name] = load_dataset(
            cfg.data, tokenizer, objective, path=path, require=reference.columns(objective, source)
        )
        print(f"{name:5s}  {data[name].report.line()}", flush=True)
    return data


def initial_check(loss: float, expected: float | None, source: str, precision: str) -> str:
    """Compare the loss before the first update with its closed form: a wrong reference, mask or sum shows here."""
    text = f"check  reference = {source}, loss at step 0: {loss:.6f}"
    if expected is None:
        return f"{text} (no closed form)"
    text += f" (expected {expected:.6f}, difference {loss - expected:+.1e})"
    if source != "start":
        return f"{text}   only meaningful if the reference is the starting model"
    if abs(loss - expected) <= (1e-4 if precision == "fp32" else 2e-2) * max(1.0, abs(expected)):
        return f"{text}   ok"
    return f"{text}   WARNING: policy and reference disagree before the first update (dropout in the model?)"
