# SPDX-License-Identifier: Apache-2.0
"""`fastpost train RECIPE --dry-run`: everything a run would trip over or cost, in seconds, and nothing is written.

Settings, data with one row as it is trained, parameters, steps, tokens, FLOPs, memory; then forward and backward of the
longest micro-batch without an update. Without weights (a folder with config.json and tokenizer alone) the step goes
through shapes only.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch

from fastpost import objectives
from fastpost.cli.account import account
from fastpost.cli.data import colour, describe, show
from fastpost.data.loader import Dataset
from fastpost.hf import folder
from fastpost.nn.int4_packed import stands_for
from fastpost.train import checkpoint, memory, reference, routers, sinks
from fastpost.train.config import Config, load_config
from fastpost.train.device import pick_device
from fastpost.train.flops import Flops
from fastpost.train.forward import forward, lengths, load_policy, start_of
from fastpost.train.gradients import Gradients
from fastpost.train.loop import initial_check, load_data
from fastpost.train.optim import COMPUTE_DTYPE, AdamW
from fastpost.train.plan import Plan
from fastpost.train.run_folder import differences
from fastpost.train.samples import Samples

LOOK = 256
"""Micro-batches that are laid out to estimate FLOPs; more are taken as like these."""


def dry_run(cfg: Config, overrides: list[str]) -> None:
    """Print the account. Raises ValueError for whatever would stop `train` before its first step."""
    device, compute = pick_device(cfg.train.device), COMPUTE_DTYPE[cfg.optim.precision]
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    torch.manual_seed(cfg.train.seed)
    sinks.check(cfg.log.to)
    objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
    sources, start = reference.sources(cfg.model, objective), start_of(cfg.model)
    changed = f", {' '.join(overrides)}" if overrides else ""
    balance = routers.of_folder(start.base, *routers.asked(cfg.model))
    print(f"config  {objective}, reference {reference.describe(sources)}{changed}")
    print(f"output  {output(cfg)}")

    tokenizer = folder.load_tokenizer(cfg.model.path)
    data = load_data(cfg, tokenizer, objective, sources)
    Samples(cfg.log, tokenizer, data["eval"].examples if "eval" in data else [])
    facts = account(cfg, data["train"], tokenizer)
    for line in [*describe(facts)[2:], *show(data["train"].examples[0], facts.kind, tokenizer, colour())]:
        print(f"  {line}")

    plan = Plan(cfg, data["train"])
    model = memory.shape_policy(cfg, compute)
    print(f"model   {parameters(model)}, {str(compute).removeprefix('torch.')} on {device}")
    if balance:
        print(balance.line())
    longest, most, flops = survey(plan, data["train"], Flops(model))
    print(schedule(cfg, plan, longest, most, flops))
    batch = data["train"].batch(longest)
    expected = memory.estimate(model, cfg, batch, most, device)
    print(f"memory  {expected.line()} of {memory.available(device) / 1e9:.0f} GB, about")
    if expected.total > memory.available(device):
        print("  WARNING: that is more than there is. Lower train.max_tokens_per_micro_batch, or set "
              "train.gradient_checkpointing full or optim.precision pure-bf16.")  # fmt: skip
    del model
    if cfg.model.from_scratch or folder.has_weights(start.base):
        print(fake_step(cfg, objective, data["train"], longest, most, expected, sources, device))
    else:
        print(f"step    not computed: {start.base} has no weights yet; its shapes went through")
    print("nothing was written")


def output(cfg: Config) -> str:
    """What a run would find in its folder. Raises ValueError where it would refuse."""
    path = Path(cfg.train.output_dir)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return f"{path} (new)"
    if not (path / "config.yaml").is_file():
        raise ValueError(
            f"[train] train.output_dir: expected a new folder or one of a run, got {path}, which holds something else. "
            "Choose another with --train.output_dir."
        )
    if changed := differences(load_config(path / "config.yaml"), cfg):
        listed = "; ".join(f"{name} is {old!r} there, {new!r} now" for name, old, new in changed[:4])
        return f"{path} holds a run with other settings ({listed}): choose another with --train.output_dir"
    newest = checkpoint.latest(path / "checkpoints")
    if (path / "model").is_dir() or (path / "adapter").is_dir():
        return f"{path} (finished: there is nothing left to train)"
    return f"{path} (a run: goes on from {newest})" if newest else f"{path} (a run without a checkpoint: starts over)"


def parameters(model: torch.nn.Module) -> str:
    packed = stands_for(model)
    total = sum(packed.get(id(p), p.numel()) for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = model.config.get_text_config().num_hidden_layers
    return f"{type(model).__name__}, {total / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained), {layers} layers"


def survey(plan: Plan, data: Dataset, flops: Flops) -> tuple[list[int], int, float]:
    """(the longest micro-batch of the run, most micro-batches in a step, FLOPs of all steps)."""

    def tokens(part: list[int]) -> int:
        return sum(data.examples[i].computed if data.share_prompt else data.examples[i].tokens for i in part)

    steps = [plan.parts(step) for step in range(min(plan.steps, plan.steps_per_epoch))]
    parts = [part for step in steps for part in step]
    sample = random.Random(0).sample(parts, min(LOOK, len(parts)))
    each = sum(flops([data.batch(part)]) for part in sample) / sum(map(tokens, sample))
    return max(parts, key=tokens), max(map(len, steps)), each * sum(map(tokens, parts)) * plan.steps / len(steps)


def schedule(cfg: Config, plan: Plan, longest: list[int], most: int, flops: float) -> str:
    tokens = sum(map(plan.tokens, range(min(plan.steps, plan.steps_per_epoch))))
    tokens *= plan.steps / min(plan.steps, plan.steps_per_epoch)
    size = sum(plan.data.examples[i].computed for i in longest)
    return (
        f"steps   {plan.steps} of {cfg.train.batch_size} rows in up to {most} micro-batches (the longest: "
        f"{len(longest)} rows, {size} tokens), {tokens:.3g} tokens, {flops:.2g} FLOPs"
    )


def fake_step(cfg, objective, data: Dataset, rows: list[int], most: int, expected, sources: dict, device) -> str:
    """Load, forward, backward; what it took and what the loss was. Where the run would use log-probs of a reference,
    the model's own stand in."""
    begin = time.perf_counter()
    model = load_policy(cfg, device)
    optimizer = AdamW.from_config(model, cfg)  # also converts the weights
    loaded = time.perf_counter() - begin
    batch = data.batch(rows).to(device)
    for column in sources:
        if getattr(batch, column) is None:
            with torch.no_grad():
                setattr(batch, column, forward(model, batch, objectives.SFT(), cfg.model.temperature).logprob)
    model.train()
    held, begin = memory.reset_peak(device), time.perf_counter()
    with Gradients(optimizer.parameters, most) as gradients:
        output = forward(model, batch, objective, cfg.model.temperature)
        loss = output.losses.sum() / float(objective.count(lengths(data.batch(rows))))
        loss.backward()
        norm = gradients.norm()
    seconds = time.perf_counter() - begin
    lines = [
        f"step    forward and backward of the longest micro-batch: {seconds:.2f} s, {batch.tokens / seconds:.0f} "
        f"tokens/s, loss {loss.item():.4f}, gradient norm {norm:.3g}; weights loaded in {loaded:.1f} s"
    ]
    if held is not None:
        used = memory.peak(device)
        several = f", of {most} micro-batches" if most > 1 else ""
        lines.append(f"memory  {used / 1e9:.2f} GB measured (one micro-batch), {expected.total / 1e9:.2f} GB estimated "
                     f"(a step{several})")  # fmt: skip
    if objective.initial_loss() is not None and reference.is_start(sources):
        lines.append(initial_check(loss.item(), objective.initial_loss(), sources, cfg.optim.precision))
    return "\n".join(lines)
