# SPDX-License-Identifier: Apache-2.0
"""The training loop. Everything a run does, top to bottom."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path

import torch

from fastpost import objectives
from fastpost.data.loader import Dataset, load_dataset
from fastpost.hf import folder

from . import checkpoint, freezing, moments, plot, reference, result, routers, sharding, sinks
from .config import Config
from .device import pick_device
from .distributed import Ranks, join
from .evaluate import evaluate
from .flops import Flops, peak_flops
from .forward import load_policy, schedule, start_of
from .metrics import NoLog, RunLog, peak_memory_gb
from .mismatched import Mismatched, given
from .optim import COMPUTE_DTYPE, AdamW
from .plan import Plan
from .progress import progress, waiting
from .run_folder import RunFolder
from .samples import Samples
from .step import train_step
from .stop import Stop, Stopped


def train(cfg: Config) -> Path:
    """Train as `cfg` says and return the run folder, whose model/ is a Hugging Face folder (adapter/ a peft folder).
    Under torchrun all ranks call this.

    A run that was interrupted goes on from its newest checkpoint and gives, at one thread, the bits of an unbroken one.
    Raises ValueError for a mistake in settings or data, NotFinite when a loss or gradient is not a number,
    CheckpointError when the disk fails, Stopped after a SIGTERM or Ctrl-C.
    """
    with join() as ranks, RunFolder(cfg, owner=ranks.first) as run:
        if ranks.from_first(lambda: run.finished):
            print(
                f"{run.path} is finished: its model is {run.result}. For another run choose another --train.output_dir."
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
    sinks.check(cfg.log.to)
    if cfg.optim.name == "adamw8bit":
        moments.library()
    objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
    sources = reference.sources(cfg.model, objective)
    balance = routers.of_folder(start_of(cfg.model).base, *routers.asked(cfg.model))
    tokenizer = folder.load_tokenizer(cfg.model.path)
    data = load_data(cfg, tokenizer, objective, sources)
    others = Mismatched(cfg, objective, sources, data)
    samples = Samples(cfg.log, tokenizer, data["eval"].examples if "eval" in data else [])
    plan = Plan(cfg, data["train"], ranks.size)
    print(*plan.mixture.lines(), sep="\n", end="\n" * (not plan.mixture.whole), flush=True)
    ranks.connect(device)
    parts = {"train": plan.first_epoch()}
    if "eval" in data:
        parts["eval"] = plan.cut(data["eval"], list(range(len(data["eval"]))))

    model = load_policy(cfg, device, move=False)
    print(freezing.summary(model), *([balance.line()] if balance else []), sep="\n", flush=True)
    flops = Flops(model)
    model = sharding.place(model, device, cfg.train.parallel, ranks)
    if ranks.size > 1:
        print(f"ranks  {ranks.size} x {device.type}, {ranks.kind}", flush=True)
    optimizer = AdamW.from_config(model, cfg)
    reference.attach(
        cfg, sources, data | others.data, parts | others.parts(parts), run.reference, lambda: model, ranks=ranks
    )

    torch.manual_seed(cfg.train.seed + 1_000_003 * ranks.rank)  # ranks draw different dropout
    newest = ranks.from_first(lambda: str(checkpoint.latest(run.checkpoints) or ""))
    start = saved = checkpoint.load(Path(newest), model, optimizer, ranks=ranks) if newest else 0
    seen = sum(map(plan.tokens, range(start)))
    peak, temperature = peak_flops(device, compute), cfg.model.temperature
    run_log = partial(RunLog, run.path, finished=start, total=plan.steps, every=cfg.log.every)

    with (
        run_log(sinks=sinks.Sinks(cfg, run.path)) if ranks.first else NoLog() as log,
        Stop(speaks=ranks.first) as stop,
    ):

        def held_out(step: int) -> None:
            if "eval" not in data:
                return
            turns = ranks.deal(parts["eval"], data["eval"].examples)

            def measure() -> dict[str, float]:
                mine = map(data["eval"].batch, progress(turns.mine, "evaluate", unit="batches"))
                idle = map(data["eval"].batch, turns.idle)
                kl = others.estimate(model, "eval", turns, ranks)
                values = evaluate(model, objective, given(mine, kl), temperature, idle=idle, ranks=ranks)
                return values if kl is None else values | {"kl": kl}

            values = measure()
            if optimizer.ema is not None and step > 0:
                with optimizer.ema.applied():
                    values |= {f"ema/{name}": value for name, value in measure().items() if name != "rows"}
            log.evaluation(step, values)

        def sample(step: int) -> None:
            if samples and (ranks.first or ranks.sharded):
                log.samples(step, samples.answer(model))

        if newest:
            log.say(f"resume from {newest}{checkpoint.resharded(Path(newest), ranks)}")
        else:
            if cfg.train.save_every and (warning := checkpoint.space_warning(run.path, model, optimizer)):
                log.say(warning)
            held_out(0)
            sample(0)
        model.train()

        for step in range(start, plan.steps):
            if number := int(ranks.max(stop.signal)):
                if step > saved:
                    log.sync()
                    checkpoint.save(run.checkpoints, step, model, optimizer, keep=cfg.train.keep_latest, ranks=ranks)
                log.say(f"stopped after step {step}/{plan.steps}; the same command goes on from there")
                raise Stopped(128 + number)
            begin = time.perf_counter()
            mine, idle = turns = ranks.deal(plan.parts(step), data["train"].examples)
            batches = [data["train"].batch(part) for part in mine]
            ready = time.perf_counter()
            kl = others.estimate(model, "train", turns, ranks)
            batches = list(given(batches, kl))
            values = train_step(
                model, objective, optimizer, batches, step=step, lr=plan.lr(step),
                max_grad_norm=cfg.optim.max_grad_norm, temperature=temperature,
                idle=[data["train"].batch(part) for part in idle], ranks=ranks,
            )  # fmt: skip
            seconds = time.perf_counter() - begin

            tokens = plan.tokens(step)
            seen += tokens
            values |= {"epoch": plan.epoch(step + 1), "num_tokens": seen} | ({} if kl is None else {"kl": kl})
            timing = {
                "ms": 1e3 * seconds,
                "tps": tokens / seconds,
                "mfu": flops(batches) / seconds / peak if peak else None,
                "memory/peak_gb": peak_memory_gb(device),
                "data_wait": (ready - begin) / seconds,
            }
            if step == 0:
                own = values["loss"] - routers.share(model, values)
                log.say(initial_check(own, objective.initial_loss(), sources, cfg.optim.precision))
                if batches and not ranks.sharded:
                    log.say(f"head   {schedule(model, batches[0].to(device), objective)}")
            log.step(step + 1, values, timing)

            last = step + 1 == plan.steps
            if last or _due(step + 1, cfg.train.eval_every):
                held_out(step + 1)
            if last or _due(step + 1, cfg.log.sample_every or cfg.train.eval_every):
                sample(step + 1)
            if not last and _due(step + 1, cfg.train.save_every):
                log.sync()
                with waiting("save checkpoint"):
                    checkpoint.save(
                        run.checkpoints, step + 1, model, optimizer, keep=cfg.train.keep_latest, ranks=ranks
                    )
                saved = step + 1

    out = result.write(cfg, run, model, optimizer, ranks)
    if not ranks.first:
        return
    if cfg.log.plot:
        plot.draw([run.path], run.plot)
    print(f"saved {run.path}/{{config.yaml,metrics.jsonl,{'loss.png,' if cfg.log.plot else ''}{out.name}/}}")


def _due(finished: int, every: int) -> bool:
    return every > 0 and finished % every == 0


def load_data(cfg: Config, tokenizer, objective, sources: dict[str, str]) -> dict[str, Dataset]:
    """{"train": ..., "eval": ...} (eval when there is one), with one printed line on what was kept of each."""
    paths = {"train": cfg.data.train} | ({"eval": cfg.data.eval} if cfg.data.eval else {})
    data = {}
    for name, path in paths.items():
        data[name] = load_dataset(
            cfg.data, tokenizer, objective, path=path, require=reference.columns(objective, sources)
        )
        for line in data[name].lines():
            print(f"{name:5s}  {line}", flush=True)
    return data


def initial_check(loss: float, expected: float | None, sources: dict[str, str], precision: str) -> str:
    """Compare the loss before the first update with its closed form: a wrong reference, mask or sum shows here."""
    text = f"check  reference = {reference.describe(sources)}, loss at step 0: {loss:.6f}"
    if expected is None:
        return f"{text} (no closed form)"
    text += f" (expected {expected:.6f}, difference {loss - expected:+.1e})"
    if not reference.is_start(sources):
        return f"{text}   only meaningful if the reference is the starting model"
    if abs(loss - expected) <= (1e-4 if precision == "fp32" else 2e-2) * max(1.0, abs(expected)):
        return f"{text}   ok"
    return f"{text}   WARNING: policy and reference disagree before the first update (dropout?)"
