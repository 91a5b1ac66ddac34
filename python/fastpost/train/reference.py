# SPDX-License-Identifier: Apache-2.0
"""Log-probs under frozen models (the reference, the previous policy): computed once before training, one float32 per
sequence, so no second model stays in memory; kept for other runs, so a sweep computes them once.

    sources = reference.sources(cfg.model, objective)  # {"reference_logprob": "start", "previous_logprob": "columns"}
    data = load_dataset(..., require=reference.columns(objective, sources))
    reference.attach(cfg, sources, {"train": data}, {"train": parts}, run.reference, lambda: model)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastpost.data.loader import Dataset
from fastpost.hf import adapter, folder
from fastpost.hf.int4_lora import BaseFormat
from fastpost.objectives import SFT

from . import logprob_cache as cache
from . import sharding
from .config import Config, ModelConfig
from .device import pick_device
from .distributed import ALONE, Ranks
from .forward import base_format, forward, has_masters, start_of
from .optim import COMPUTE_DTYPE
from .progress import progress

FIELDS = {"previous_logprob": "previous", "reference_logprob": "reference"}
"""Column of an example -> the field of ModelConfig that says where it comes from."""


def sources(cfg: ModelConfig, objective) -> dict[str, str]:
    """Where each column that the objective needs comes from: start | base | columns | previous | a path; "auto" is
    resolved. Empty for an objective without a reference.

    Raises ValueError when the objective needs a reference and gets none, when a path is no model, and for `base` where
    the adapter that is trained did not start there. No weight is read.
    """
    found = {}
    reference = "none" if not objective.needs_reference else "start" if cfg.reference == "auto" else cfg.reference
    if objective.needs_reference and reference == "none":
        raise ValueError(
            f"[train] model.reference: {objective.name} needs log-probs of a reference, got 'none'. Use start (the "
            "model as loaded), base (without its adapter), columns (reference_* columns of the data), previous or the "
            "path of a model, adapter or run folder."
        )
    if objective.needs_previous or reference == "previous":
        found["previous_logprob"] = cfg.previous
    if reference != "none":
        found["reference_logprob"] = reference
    for column, source in found.items():
        _check(cfg, FIELDS[column], source)
    return found


def columns(objective, sources: dict[str, str]) -> tuple[str, ...]:
    """The numbers that every row of the data must bring along."""
    stored = tuple(column for column, source in sources.items() if source == "columns")
    # Single replies may have a label instead of a reward.
    return stored + ("reward",) * (objective.needs_reward and objective.paired)


def describe(sources: dict[str, str]) -> str:
    """For the check before the first step: "start", "base, previous = columns", "none"."""
    words = [sources["reference_logprob"]] if "reference_logprob" in sources else []
    words += [f"previous = {sources['previous_logprob']}"] if "previous_logprob" in sources else []
    return ", ".join(words) or "none"


def is_start(sources: dict[str, str]) -> bool:
    """Whether every frozen model equals the policy before its first step, so that the loss has its closed form. `base`
    does: it is refused where it does not."""
    return bool(sources) and {*sources.values()} - {"previous"} <= {"start", "base"}


def attach(
    cfg: Config,
    sources: dict[str, str],
    data: dict[str, Dataset],
    parts: dict[str, list[list[int]]],
    table: Path | None,
    start: Callable[[], torch.nn.Module],
    say: Callable[[str], None] = print,
    ranks: Ranks = ALONE,
) -> None:
    """Set the columns of `sources` on every example of `data`: from `table` (the run's own file, so that a resumed run
    needs nothing else), from the cache, or computed and then written to both.

    `start` gives the model as loaded, in the precision of training. `parts`: the micro-batches to compute in, covering
    each dataset once; ranks share them. Taking those of the first epoch makes the policy's first log-probs equal the
    reference to the last bit, because both see the same packing. `say` gets one line for each dataset, made or reused.

    Raises ValueError when `table` was made for other rows or another model.
    """
    computed = {c: s for c, s in sources.items() if s not in ("columns", "previous")}
    values, contents = {}, {}
    rows = {name: cache.rows_digest(dataset) for name, dataset in data.items()} if computed else {}
    for column, source in computed.items():
        model = cache.model_digest(*_files(cfg.model, source)) + _base_format(cfg, source)
        for name in data:
            contents[_entry(column, name)] = cache.content(model, rows[name], cfg.model.temperature)
    if computed and table is not None and ranks.from_first(table.exists):
        values = _own(table, contents, {_entry(c, n): len(d) for c in computed for n, d in data.items()})
    elif computed:
        for column, source in computed.items():
            values |= _find_or_make(cfg, column, source, data, parts, contents, start, say, ranks)
        if table is not None:
            if ranks.first:
                draft = table.with_name(f".unfinished-{table.name}")
                save_file(values, draft, metadata=contents)
                os.replace(draft, table)
            ranks.gather(None)  # it is there
    for column in computed:
        for name, dataset in data.items():
            fill(dataset, values[_entry(column, name)], column)
    if sources.get("reference_logprob") == "previous":
        for dataset in data.values():
            fill(dataset, torch.tensor([e.previous_logprob for e in dataset.examples]), "reference_logprob")


def fill(dataset: Dataset, values: torch.Tensor, column: str) -> None:
    """Set `column` of each example from a row of `values` [examples, sequences of each]."""
    dataset.examples.put(column, values)


@torch.no_grad()
def logprobs(
    model: torch.nn.Module, dataset: Dataset, parts: list[list[int]], temperature: float = 1.0,
    idle: list[list[int]] = (), ranks: Ranks = ALONE,
) -> torch.Tensor:  # fmt: skip
    """Summed log-probs, float32 [examples, sequences of each], computed in the micro-batches `parts` of all ranks.
    `idle`: see train_step. A row in no micro-batch is NaN."""
    device = next(model.parameters()).device
    model.eval()
    out = torch.full((len(dataset), len(dataset.examples[0].sequences)), torch.nan)
    for part in progress(parts, "log-probs", unit="batches"):
        logprob = forward(model, dataset.batch(part).to(device), SFT(), temperature).logprob
        out[part] = logprob.float().cpu().view(len(part), -1)
    for part in idle:
        forward(model, dataset.batch(part).to(device), SFT(), temperature)
    own = sorted(row for part in parts for row in part)
    for rows, values in ranks.gather((own, out[own])):
        out[rows] = values
    return out


def _check(cfg: ModelConfig, field: str, source: str) -> None:
    if source == "base" and (place := start_of(cfg)).adapter is not None:
        raise ValueError(
            f"[train] model.{field}: expected start, because this run goes on training the adapter {place.adapter}, "
            "got 'base'. The model without it is not what training starts from: the loss would begin away from its "
            "closed form and pull back to what was before that adapter (this mistake: TRL #1193, PR #6591). "
            "start is that adapter as it is now, frozen. If you do mean the model without it, name it by its path: "
            f"--model.{field} {place.base}"
        )
    if source in ("start", "base") and cfg.from_scratch:
        raise ValueError(
            f"[train] model.{field}: expected columns or the folder of a model, because model.from_scratch starts from "
            f"random weights, which are no reference, got '{source}'. Name a trained model."
        )
    words = ("start", "base", "columns", *(("previous",) if field == "reference" else ()))
    if source not in words:
        path = Path(source).expanduser()
        if not path.is_dir():
            raise ValueError(
                f"[train] model.{field}: expected {', '.join(words)} or the folder of a model, an adapter or a run; "
                f"got '{source}', and there is no such folder. Correct the path."
            )
        folder.locate(path)


def _files(cfg: ModelConfig, source: str) -> tuple[Path, Path | None]:
    """(base, adapter) whose files decide the numbers. A new adapter begins as no change, so it counts as none."""
    place = start_of(cfg) if source in ("start", "base") else folder.locate(source)
    return place.base, None if source == "base" else place.adapter


def _route(cfg: Config, source: str) -> str:
    """What sets the last bits apart where the files are the same. A new adapter on the head changes no number at first,
    but which kernel computes it; float32 masters round half-way cases to another bf16 than a folder that is loaded."""
    new = cfg.model.lora
    head = f"{new.rank} {new.targets}" if source == "start" and new.rank and new.targets != ["all-linear"] else ""
    return f"{head} {source in ('start', 'base') and has_masters(cfg)}"


def _base_format(cfg: Config, source: str) -> str:
    """How the base is quantised on loading, where it is; other numbers come from the same files then."""
    base = base_format(cfg.model) if source in ("start", "base") else BaseFormat()
    return "" if base.scheme == "none" else f" {base}"


def _entry(column: str, name: str) -> str:
    return name if column == "reference_logprob" else f"{FIELDS[column]}.{name}"


def _own(table: Path, contents: dict[str, str], rows: dict[str, int]) -> dict[str, torch.Tensor]:
    """The run's own values. ValueError when they were made for something else."""
    with safe_open(table, framework="pt") as file:
        stored, values = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, content in contents.items():
        found = len(values.get(name, ()))
        if found != rows[name]:
            raise ValueError(
                f"[train] {table}: expected {rows[name]} rows for '{name}', got {found}. The data changed since this "
                "run began: start it in another folder."
            )
        if stored.get(name) != content:
            raise ValueError(
                f"[train] {table}: '{name}' holds log-probs of other tokens or of another model. The data or the "
                "model's files changed since this run began: start it in another folder."
            )
    return values


def _find_or_make(
    cfg: Config, column, source, data, parts, contents, start, say, ranks: Ranks
) -> dict[str, torch.Tensor]:
    """The values of one column for each dataset, from the cache or computed, with one printed line for each."""
    store, device, dtype = cache.cache_folder(cfg.data.cache), pick_device(cfg.train.device, ranks), _dtype(cfg)
    files, values = {}, {}
    for name, dataset in data.items():
        entry, what = _entry(column, name), f"{FIELDS[column]} = {source}: log-probs of {len(dataset)} {name} rows"
        if store is not None:
            route = f"{_route(cfg, source)} {ranks.sharded}"  # a sharded head sums in another order
            how = (device, dtype, cfg.model.attention, route, dataset.share_prompt, parts[name])
            files[name] = store / cache.file_name(contents[entry], *how)
            values[entry] = cache.read(files[name], len(dataset))
        if not all(ranks.gather(values.get(entry) is not None)):  # they may look at different moments
            values[entry] = None
        else:
            say(f"{what} reused from {files[name]}")
    missing = [name for name in data if values.get(_entry(column, name)) is None]
    if not missing:
        return values
    with _frozen(cfg, source, start, ranks) as model:
        for name in missing:
            begin = time.perf_counter()
            mine, idle = ranks.deal(parts[name], data[name].examples)
            result = logprobs(model, data[name], mine, cfg.model.temperature, idle, ranks)
            text = f"computed in {time.perf_counter() - begin:.1f} s"
            if store is not None and ranks.first:
                kept = cache.write(files[name], result)
                text += f", kept in {files[name]}" if kept else f" ({store} cannot be written, so they are not kept)"
            say(f"{FIELDS[column]} = {source}: log-probs of {len(data[name])} {name} rows {text}")
            values[_entry(column, name)] = result
    return values


@contextlib.contextmanager
def _frozen(cfg: Config, source: str, start: Callable[[], torch.nn.Module], ranks: Ranks) -> Iterator[torch.nn.Module]:
    if source == "start":
        yield start()
    elif source == "base":
        with adapter.off(start()) as model:
            yield model
    else:
        model, device = adapter.load(source, _dtype(cfg), cfg.model.attention), pick_device(cfg.train.device, ranks)
        yield sharding.place(model, device, ranks.kind, ranks)


def _dtype(cfg: Config) -> torch.dtype:
    return COMPUTE_DTYPE[cfg.optim.precision]
