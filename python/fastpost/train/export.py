# SPDX-License-Identifier: Apache-2.0
"""A run, one of its checkpoints or an adapter as a folder that others load, and proof that it loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from fastpost.hf import adapter, folder, int4_folder, int4_lora

from . import averaging, checkpoint
from .config import load_config
from .forward import load_policy, start_model, start_of
from .freezing import frozen_names
from .optim import AdamW
from .result import average as average_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
EXACT = 1e-4
"""Largest relative difference of logits that float32 arithmetic in another order may make."""


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    merge: bool = False,
    ema: bool = False,
    average: str | None = None,
    updates: bool = False,
    requantize: bool = False,
    original: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the result of `run` at checkpoint `step` (None: the final one, else the newest checkpoint) to `out`: a
    Hugging Face folder, or a peft folder for a run that trained an adapter. `run` may also be an adapter folder.

    merge: the base model with the adapter in its weights; upon a base in four bits, which training saw, these are its
    dequantised weights. requantize: merge, and put them in four bits again, each layer in its former format. original:
    merge into the base folder's own weights, from which model.quantize made those in four bits. ema: the moving average
    of the weights instead. average: the mean of several checkpoints, see averaging.sources. updates: also say how far
    each layer has moved from the start model. dtype None = as the files that training began with (float32 for an
    adapter). In bf16 training a checkpoint also holds what bf16 cannot, so fp32 is exact. What was written is loaded
    again and its logits are compared; `say` gets the largest difference.

    Raises ValueError when there is no such run or checkpoint, when `out` is not empty, when there is nothing to merge
    or to average, and when the written folder does not compute what the model did: then nothing is kept.
    """
    if original and requantize:
        raise ValueError("[export] --original: expected one of --original and --requantize, got both.")
    merge = merge or requantize or original
    kind = DTYPES[dtype] if dtype else None
    if average is not None and (ema or step is not None):
        raise ValueError("[export] --average: names its checkpoints itself. Leave --step and --ema out.")
    model, place, unchanged = _load(run, step, ema, average)
    adapted = adapter.is_adapted(model)
    if updates and adapted:
        raise ValueError("[export] --updates: an adapter leaves the layers as they are. Leave --updates out.")
    if updates:
        start = start_model(load_config(run / "config.yaml"), torch.float32)
        say(averaging.report(averaging.layer_updates(model, start)))
    if merge and not adapted:
        raise ValueError(f"[export] --merge: {run} is a whole model, there is no adapter to merge. Leave --merge out.")
    before, like = logits(model), int4_lora.formats(model)
    if requantize and not like:
        raise ValueError(f"[export] --requantize: expected a base model in four bits, {run} has none. Use --merge, "
                         "then fastpost quantize.")  # fmt: skip
    if original:
        if int4_lora.base_format(model).scheme == "none":
            raise ValueError(f"[export] --original: expected a run with model.quantize, {run} has its base as it is. "
                             "Use --merge.")  # fmt: skip
        trained = before
        model = adapter.moved(model, folder.load_model(place.base, torch.float32, check=False), quantize=False).eval()
        before = logits(model)
        say(f"check  upon the original weights: logits differ by {difference(before, trained):.4f} (relative) from the "
            "model that was trained, with its base in four bits")  # fmt: skip
    if merge:
        with adapter.off(model):
            effect = difference(logits(model), before)
        model = adapter.merged(model)
        off = difference(logits(model), before)
        # Rounding of the written weights can hide in it what a wrong merge does; this cannot, it is all in float32.
        say(f"check  merged: logits differ by {off:.1e} (relative), the adapter changes them by {effect:.1e}")
        if not off <= EXACT:
            raise ValueError(
                f"[export] --merge: merging changed the logits by {off:.1e}, expected at most {EXACT:.0e}. Nothing is "
                "written. Serve the adapter unmerged, and report its adapter_config.json."
            )
    if adapted and not merge:
        adapter.save(model, place.base, out, tokenizer=place.tokenizer, dtype=kind)
    elif requantize:
        error, size = int4_lora.requantized(model, like), difference(logits(model), before)
        say(f"check  four bits again: relative error of the weights {error:.4f}, of the logits {size:.4f}")
        if size > effect / 2:  # a small change of a weight mostly rounds back to the code that was there
            say(f"WARNING: the adapter changes the logits by {effect:.4f}: rounding undoes much of it. --merge keeps "
                "it, and so does the adapter upon the four-bit base.")  # fmt: skip
        four_bit = folder.is_quantized(place.base)
        kind = kind or (torch.bfloat16 if four_bit else folder.stored_dtype(place.base))
        before = logits(model)
        int4_folder.save_int4(model.to(kind), out, tokenizer=place.tokenizer)
    elif folder.is_quantized(place.base):  # its keys are not those of floats
        kind = kind or torch.bfloat16
        _save_plain(model.to(kind), out, place.tokenizer)
    else:
        folder.save_folder(model, place.base, out, kind, unchanged=unchanged)
        if place.tokenizer != place.base:
            folder.copy_tokenizer(place.tokenizer, out)
    del model
    try:
        _check(out, before, kind, say)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out


def _save_plain(model: torch.nn.Module, out: Path, tokenizer: Path) -> None:
    with folder.written_aside(out) as aside:
        model.save_pretrained(aside)
        folder.copy_tokenizer(tokenizer, aside)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Float32 logits [2, 16, V] of two fixed rows of tokens, one of them of frequent (low) ids."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = [[(7 * i + 3) % vocabulary for i in range(16)], [(104729 * i + 11) % vocabulary for i in range(16)]]
    model.eval()
    return model(torch.tensor(rows, device=model.device), use_cache=False).logits.float()


@torch.no_grad()
def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of a row of logits, relative to the row: max |a - b| / |b|, norms over the vocabulary."""
    tiny = torch.finfo(b.dtype).tiny  # a model whose weights are all 0
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=tiny)).max())


def bound(dtype: torch.dtype) -> float:
    """What rounding every weight once to `dtype` may change: 8 units in the last place."""
    return max(EXACT, 8 * torch.finfo(dtype).eps)


def _check(out: Path, before: torch.Tensor, kind: torch.dtype | None, say) -> None:
    written = kind or folder.stored_dtype(out)
    after = logits(adapter.load(out, torch.float32, check=False))
    largest, relative, most = float((after - before).abs().max()), difference(after, before), bound(written)
    name = str(written).removeprefix("torch.")
    text = f"loaded again: largest logit difference {largest:.1e}, relative {relative:.1e}, bound {most:.1e} ({name})"
    if not relative <= most:
        raise ValueError(
            f"[export] {out}: {text}. The folder does not compute what the model did; it is removed. If --dtype fp32 "
            "passes, rounding alone does this to the model, and it should not be stored in less."
        )
    say(f"check  {text}")


def _load(run: Path, step: int | None, ema: bool, average: str | None):
    """The model in float32, the folders that it began with, and the names of weights to take from there."""
    if (run / adapter.CONFIG).is_file():
        for name, got in (("--step", step), ("--ema", ema or None), ("--average", average)):
            if got is not None:
                raise ValueError(
                    f"[export] {name}: expected none for an adapter folder, got {got}. It holds one state; name a run."
                )
        return adapter.load(run, torch.float32, check=False), folder.locate(run), set()
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"[export] {run}: expected a run folder with config.yaml or an adapter folder, found none. Give the "
            "folder that `fastpost train` wrote."
        )
    cfg = load_config(run / "config.yaml")
    if ema and cfg.optim.ema is None:
        raise ValueError(f"[export] --ema: {run} kept no average of its weights (optim.ema is none). Leave --ema out.")
    finished = next((p for p in (run / "model", run / "adapter") if p.is_dir()), None)
    if step is None and finished and average is None:
        finished = average_of(finished) if ema else finished
        model = adapter.load(finished, torch.float32, check=False)
        return model, folder.locate(finished), frozen_names(model)
    model = load_policy(cfg, torch.device("cpu"))
    optimizer = AdamW.from_config(model, cfg)
    if average is not None:
        averaging.fill(model, averaging.sources(run, average))
    else:
        checkpoint.load(_checkpoint(run, step), model, optimizer)
        optimizer.widen(ema=ema)
    place, unchanged = start_of(cfg.model), frozen_names(model)
    if adapter.is_adapted(model):  # its frozen weights were rounded for training; those that count are in the files
        model = adapter.moved(model, folder.load_model(place.base, torch.float32, check=False))
    else:
        _restore(model, unchanged, place.base)
    return model.float().eval(), place, unchanged


def _restore(model: torch.nn.Module, unchanged: set[str], base: Path) -> None:
    """Frozen weights as the files have them; in bf16 training the model holds them rounded."""
    if unchanged:
        start = dict(folder.load_model(base, torch.float32, check=False).named_parameters(remove_duplicate=False))
        for name, p in model.named_parameters(remove_duplicate=False):
            if name in unchanged:
                p.data = start[name].data


def _checkpoint(run: Path, step: int | None) -> Path:
    found = {int(p.name[5:]): p for p in checkpoint.checkpoints(run / "checkpoints")}
    if not found:
        raise ValueError(
            f"[export] {run}: expected a model/, an adapter/ or a checkpoint, found none yet. Let it train to one."
        )
    step = max(found) if step is None else step
    if step not in found:
        raise ValueError(
            f"[export] --step: expected one of {', '.join(map(str, sorted(found)))}, got {step}. Choose one of these."
        )
    return found[step]
