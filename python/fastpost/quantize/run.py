# SPDX-License-Identifier: Apache-2.0
"""A model through a quantiser, block by block: OUT.partial holds what is finished, OUT appears when all is."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from fastpost.hf import folder
from fastpost.train.progress import progress, waiting

from .awq import awq_move, awq_round, awq_scales
from .blocks import Blocks, Hidden, Inputs
from .fold import check_unchanged, places
from .grid import Quantized, check_groups
from .layer_files import Layer, read_hidden, read_layer, read_report, write_hidden, write_layer
from .methods import Settings, quantize_matrix
from .output import expect_plain, plain_dtype, write_folder
from .smoothquant import round_activations, smooth_block, smooth_weight

SEARCH_TOKENS = 4096
"""Calibration tokens on which AWQ tries its scales; its means are over all."""
SAMPLE_TOKENS = 512


@dataclass(frozen=True)
class Result:
    """What came of it.

    Fields:
        out: the folder.
        matrices: how many linear layers were quantised.
        bits, code_bits: stored bits a weight of these, with everything and the codes alone.
        error: ‖Ŵ - W‖ / ‖W‖ of all together.
        before, after: (sum of negative log-probs, tokens) of the held-out windows, or None without any.
        resumed: blocks that an earlier attempt had finished.
    """

    out: Path
    matrices: int
    bits: float
    code_bits: float
    error: float
    before: tuple[float, int] | None
    after: tuple[float, int] | None
    resumed: int


def quantize_model(
    source: str | Path, out: str | Path, how: Settings, rows: torch.Tensor | None = None,
    held_out: torch.Tensor | None = None, *, device: torch.device | str = "cpu",
) -> Result:  # fmt: skip
    """Quantise the linear layers in the decoder blocks of the model in `source` and write it to `out`.

    One block is in memory at a time, in float32, beside the hidden states of the calibration rows. A run that was ended
    goes on after its last finished block when it is called with the same arguments, and comes to the same bits.

    Args:
        source: a Hugging Face folder in full precision.
        out: a folder that does not exist or is empty.
        how: methods.settings(...).
        rows: calibration tokens [R, L] int64; methods that need none may be given None.
        held_out: [S, L] int64 for the perplexity before and after, or None.

    Raises:
        ValueError: a model that is quantised already; see expect_ready; NaN or infinity on the way. Nothing appears at
            `out` then.
    """
    out = Path(out)
    folder.expect_new(out)
    expect_plain(folder.locate(source).base)
    blocks = Blocks(source, device)
    expect_ready(blocks, how, rows, held_out)
    desk = _Desk(out, _identity(blocks, how, rows))
    done = desk.finished(len(blocks), rows is not None and how.needs != "nothing")
    _walk(blocks, how, rows, desk, done)
    total, reports = _Totals(), [desk.report(i) for i in range(len(blocks))]
    for report in reports:
        total.add(report)
    before = after = None
    if held_out is not None and len(held_out):
        before = streamed_losses(blocks, held_out, what="perplexity before")
        names = [list(report) for report in reports] if how.method == "smoothquant" else None
        after = streamed_losses(blocks, held_out, (desk.layer(i).state() for i in range(len(blocks))), names, how.bits,
                                what="perplexity after")  # fmt: skip
    note = _note(blocks, how, rows, total, before, after)
    ready = desk.path / "folder"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    with waiting(f"write {out}"):
        write_folder(blocks, lambda: map(desk.layer, range(len(blocks))), ready, how.format, note)
    folder.expect_new(out)
    if out.exists():
        out.rmdir()
    os.replace(ready, out)
    shutil.rmtree(desk.path)
    return Result(out, total.matrices, total.bits / total.weights, total.code_bits / total.weights, total.error, before,
                  after, done)  # fmt: skip


def expect_ready(
    blocks: Blocks, how: Settings, rows: torch.Tensor | None, held_out: torch.Tensor | None = None
) -> None:
    """Look for every mistake that can be seen before the work begins.

    Raises:
        ValueError: NaN or infinity in the model, groups that do not divide a layer, layers that do not fit the format,
            no calibration for a method that needs it, tokens that the model does not have, rows longer than it reads.
    """
    if how.needs != "nothing" and (rows is None or not rows.numel()):
        raise ValueError(f"quantize: {how.method} needs calibration text, got none. Give --calibration FILE.")
    if how.needs == "block":
        places(blocks.layers[0])
    for i, layer in enumerate(blocks.layers):
        for name, linear in blocks.linears(layer).items():
            if how.group_size is not None:
                try:
                    check_groups(how.method, how.group_size, linear.in_features)
                except ValueError as error:
                    raise ValueError(f"{blocks.prefix}{i}.{name}: {error}") from None
            if how.format in ("gptq", "awq") and (linear.in_features % 8 or linear.out_features % 8):
                raise ValueError(
                    f"{blocks.prefix}{i}.{name}: --format: {how.format} packs eight rows and columns, got "
                    f"{[linear.out_features, linear.in_features]}. Take fastpost or bf16."
                )
    vocabulary = blocks.model.get_input_embeddings().weight.shape[0]
    limit = getattr(blocks.config.get_text_config(), "max_position_embeddings", None)
    for tokens in (t for t in (rows, held_out) if t is not None and t.numel()):
        if (largest := int(tokens.max())) >= vocabulary:
            raise ValueError(
                f"{blocks.path}: its tokenizer makes token {largest}, but the model has {vocabulary}. Take the "
                "tokenizer that belongs to it."
            )
        if limit and tokens.shape[1] > limit:
            raise ValueError(
                f"quantize: --length: {blocks.path} reads {limit} tokens at most, got {tokens.shape[1]}. Take less."
            )
    for key in progress(list(blocks.stored.entries), "check weights", unit="tensors"):
        tensor = blocks.stored.get(key)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{blocks.path}: tensor {key} holds NaN or infinity; nothing was written. Fetch it again.")


@torch.no_grad()
def streamed_losses(
    blocks: Blocks, rows: torch.Tensor, states: Iterator[dict[str, torch.Tensor]] | None = None,
    names: list[list[str]] | None = None, bits: int = 8, *, what: str = "perplexity",
) -> tuple[float, int]:  # fmt: skip
    """(sum of negative log-probs, tokens) of rows [R, L], block by block. states: tensors of each block instead of the
    folder's; names: layers of each block whose inputs are rounded to `bits`."""
    hidden = blocks.start(rows)

    def step(i: int) -> None:  # a block ends with its step, before the next is made
        block = blocks.block(i, None if states is None else next(states))
        if names is not None:
            round_activations(block, bits, names[i])
        _advance(blocks, i, block, hidden)

    for i in progress(range(len(blocks)), what, unit="blocks"):
        step(i)
    return blocks.losses(hidden, rows)


# ---- block by block --------------------------------------------------------------------------------------------------


@torch.no_grad()
def _walk(blocks: Blocks, how: Settings, rows: torch.Tensor | None, desk: _Desk, done: int) -> None:
    hidden: Hidden | None = None
    if how.needs != "nothing" and done < len(blocks):
        hidden = blocks.start(rows)
        if done:
            hidden = desk.hidden(done)
    for i in progress(range(done, len(blocks)), "quantize", unit="blocks"):
        desk.keep(i, _one(blocks, i, how, hidden), hidden)


def _one(blocks: Blocks, i: int, how: Settings, hidden: Hidden | None) -> Layer:
    """Block i, quantised; `hidden`, if any, becomes what the next block is given. All that is large ends here."""
    block = blocks.block(i)
    if how.needs == "block":
        return _moved_scales(blocks, i, block, how, hidden)
    inputs, made = Inputs(block), {}
    if hidden is not None:
        with inputs.gathered():
            for _ in blocks.run(i, block, hidden):
                pass
    for name, linear in blocks.linears(block).items():
        hessian = None if hidden is None else inputs.of(name).hessian
        quantized = quantize_matrix(how, f"{blocks.prefix}{i}.{name}", linear.weight, hessian)
        made[name] = (linear.weight.clone(), quantized)
    layer = _layer(blocks, i, block, how, made)
    if hidden is not None:
        # What the next block is given comes from the weights as they are stored.
        block.load_state_dict({name: t.float() for name, t in layer.state().items()})
        _advance(blocks, i, block, hidden)
    return layer


def _advance(blocks: Blocks, i: int, block: nn.Module, hidden: Hidden) -> None:
    """Put what the block gives in the place of what it was given; there is never a second set of hidden states."""
    for row, out in enumerate(blocks.run(i, block, hidden)):
        hidden[row] = out


def _moved_scales(blocks: Blocks, i: int, block: nn.Module, how: Settings, hidden: Hidden) -> Layer:
    """A block by AWQ or SmoothQuant. `hidden` becomes what the block gave before: the next is calibrated on the exact
    model."""
    awq, dtype = how.method == "awq", folder.stored_dtype(blocks.path)
    length, first = hidden[0].shape[1], hidden[0]
    inputs = Inputs(block, hessian=False, every=max(1, len(hidden) * length // SAMPLE_TOKENS) if awq else 0)
    folds, calls, handles = places(block, between=awq), {}, []
    searched = max(1, SEARCH_TOKENS // length) if awq else 0
    for name in {fold.inspect for fold in folds} if awq else ():
        calls[name] = []

        def note(module, args, kwargs, name=name):
            if len(calls[name]) < searched:
                calls[name].append((args, kwargs))

        handles.append(block.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True))
    with inputs.gathered():
        _advance(blocks, i, block, hidden)
    for handle in handles:
        handle.remove()
    linears, made = blocks.linears(block), {}
    if awq:
        mean_abs = {name: inputs.of(name).mean_abs for name in linears}
        sample = {name: inputs.sample[inputs.leader[name]] for name in linears}
        scales = awq_scales(block, folds, calls, mean_abs, how.grid(), how.group_size)
        calls.clear()
        awq_move(block, folds, scales, sample, dtype)
    else:
        smooth_block(block, folds, {name: inputs.of(name).max_abs for name in linears}, how.alpha, dtype)
    check_unchanged(block, hidden[0], next(blocks.run(i, block, [first])), how.method)
    for name, linear in linears.items():
        full = f"{blocks.prefix}{i}.{name}"
        try:
            if awq:
                quantized = awq_round(name, linear.weight, sample[name], how.grid(), how.group_size)
            else:
                quantized = smooth_weight(linear.weight, how.bits)
        except ValueError as error:
            raise ValueError(f"{full}: {error}") from None
        made[name] = (linear.weight.clone(), quantized)
    return _layer(blocks, i, block, how, made)


def _layer(
    blocks: Blocks, i: int, block: nn.Module, how: Settings, made: dict[str, tuple[torch.Tensor, Quantized]]
) -> Layer:
    """What is stored of a block. `made`: linear layer -> (the weight that was rounded, what became of it)."""
    plain, layer = plain_dtype(blocks.path), Layer({})
    for name, tensor in block.state_dict().items():
        kind = folder._dtype(blocks.stored.entries[f"{blocks.prefix}{i}.{name}"])
        layer.tensors[name] = tensor.to("cpu", kind, copy=True)
    for name, (weight, quantized) in made.items():
        values = layer.tensors.pop(f"{name}.weight")
        if how.format == "bf16":
            layer.tensors[f"{name}.weight"] = values = quantized.weight.to("cpu", plain)
        else:
            layer.int4[name], values = quantized.int4.to("cpu"), quantized.weight
        error = float((values.to(weight.device).float() - weight).norm() / weight.norm().clamp(min=1e-30))
        layer.report[name] = {"bits": quantized.bits, "code_bits": quantized.code_bits, "error": error,
                              "norm": float(weight.norm()), "weights": weight.numel()}  # fmt: skip
    return layer


class _Totals:
    def __init__(self):
        self.matrices = self.weights = 0
        self.bits = self.code_bits = self._lost = self._all = 0.0

    def add(self, report: dict[str, dict]) -> None:
        for row in report.values():
            self.matrices, self.weights = self.matrices + 1, self.weights + row["weights"]
            self.bits += row["bits"] * row["weights"]
            self.code_bits += row["code_bits"] * row["weights"]
            self._lost += (row["error"] * row["norm"]) ** 2
            self._all += row["norm"] ** 2

    @property
    def error(self) -> float:
        return (self._lost / self._all) ** 0.5 if self._all else 0.0


def _note(blocks: Blocks, how: Settings, rows, total: _Totals, before, after) -> dict:
    note = {"method": how.method, "bits": round(total.bits / total.weights, 4),
            "code_bits": round(total.code_bits / total.weights, 4), "quantized_weights": total.weights,
            "relative_error": round(total.error, 6), "settings": asdict(how)}  # fmt: skip
    if before is not None:
        note["perplexity"] = {"before": _perplexity(before), "after": _perplexity(after), "tokens": before[1]}
    if how.method == "smoothquant":
        note["activation_bits"] = how.bits
        note["activations"] = "rounded by `fastpost eval`; other programs see the rounded weights alone"
        note["activation_layers"] = [name for i in range(len(blocks)) for name in blocks.names(i)]
    if how.format == "bf16":
        note["stored"] = "dequantised: the weights of this folder take as much room as before"
    if how.method == "db-llm":
        note["left_out"] = "training of the scales and deviation-aware distillation: two binary planes without data"
    if how.method == "ir-qlora":
        note["left_out"] = "the adapter with averaged inputs: information calibration of NF4 alone"
    if rows is not None and how.needs != "nothing":
        note["calibration"] = {"rows": len(rows), "length": rows.shape[1]}
    return note


def _perplexity(found: tuple[float, int]) -> float:
    return round(math.exp(min(found[0] / found[1], 700)), 6)


def _identity(blocks: Blocks, how: Settings, rows: torch.Tensor | None) -> dict:
    """What must be the same for a run to go on."""
    tokens = None if rows is None or how.needs == "nothing" else hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in folder.weight_files(blocks.path)]
    return asdict(how) | {"source": str(blocks.path.resolve()), "weights": files, "calibration": tokens}


class _Desk:
    """OUT.partial: run.json says of what it is, layer-N the finished blocks, hidden-N what block N is given."""

    def __init__(self, out: Path, identity: dict):
        self.path = out.with_name(out.name + ".partial")
        note = self.path / "run.json"
        if note.is_file():
            before = json.loads(note.read_text())
            changed = [k for k in identity if identity[k] != before.get(k)]
            if changed:
                raise ValueError(
                    f"{self.path}: holds a run that was ended, with another {', '.join(changed)}. Call it again as it "
                    "was to go on, or delete that folder, or choose another --out."
                )
        elif self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path}: is in the way and not from a run of this command. Choose another --out.")
        self.path.mkdir(parents=True, exist_ok=True)
        aside = self.path / "run.json.new"
        aside.write_text(json.dumps(identity))
        os.replace(aside, note)

    def _layer(self, i: int) -> Path:
        return self.path / f"layer-{i:05d}.safetensors"

    def _hidden(self, i: int) -> Path:
        return self.path / f"hidden-{i:05d}.safetensors"

    def finished(self, count: int, calibrated: bool) -> int:
        """How many blocks need not be done again."""
        done = next((i for i in range(count) if not self._layer(i).is_file()), count)
        while calibrated and 0 < done < count and not self._hidden(done).is_file():
            done -= 1
        return done

    def keep(self, i: int, layer: Layer, hidden: Hidden | None) -> None:
        write_layer(self._layer(i), layer)
        if hidden is not None:
            write_hidden(self._hidden(i + 1), hidden)
            self._hidden(i).unlink(missing_ok=True)

    def layer(self, i: int) -> Layer:
        return read_layer(self._layer(i))

    def report(self, i: int) -> dict[str, dict]:
        return read_report(self._layer(i))

    def hidden(self, i: int) -> Hidden:
        return read_hidden(self._hidden(i))
