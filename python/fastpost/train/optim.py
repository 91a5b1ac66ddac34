# SPDX-License-Identifier: Apache-2.0
"""AdamW whose weights survive small learning rates, in little memory.

A bf16 weight keeps 8 bits: at lr 1e-6 an update of a weight near 0.1 is a thousandth of its last bit and rounds away.
Three ways out:

    bf16       the model computes in bf16; the float32 master weight is stored as that bf16 value plus an int16
               remainder, the difference of the two bit patterns. 4 bytes a weight hold both (a separate float32 copy
               would make it 6).
    fp32       float32 weights, nothing to be clever about.
    pure-bf16  weights and moments are bf16 alone, 6 bytes a weight in all. What the format cannot hold decides at
               random whether to round up or down, in proportion, so the expected update is right (stochastic
               rounding).

Bytes a trained weight besides the gradient: 12, 12, 6. With adamw8bit the moments take 2.03 together instead of 8 or 4:
6.03, 6.03, 4.03; embeddings and tensors of fewer than 4096 numbers keep wide ones. optim.ema adds 4. Frozen weights
are what the model computes in and nothing else. The update is torch's fused AdamW (or bitsandbytes' 8-bit one) on
float32 pieces that fit the cache, one parameter after the other, each gradient freed as soon as it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fastpost.nn.int4_packed import stands_for

from .config import Config, GroupConfig
from .ema import Ema
from .gradients import Gradients, local, pieces
from .moments import SMALLEST, EightBit, Moments, Update
from .parameters import Parameters
from .rounding import join, split, stochastic_round

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32, "pure-bf16": torch.bfloat16}


@dataclass
class _Slot:
    """A trained parameter and its state. `remainder` is int16 in bf16 mode, else None."""

    name: str
    parameter: torch.nn.Parameter
    moments: Moments | EightBit | None
    remainder: torch.Tensor | None
    weight_decay: float
    lr_ratio: float


class AdamW:
    """AdamW over the trainable parameters of `model`, whose weights it converts in place to the compute dtype.

    Give it the model with the precision of its files: float32 weights become bf16 plus remainder one parameter at a
    time, so a second copy of the model never exists. Weights shared by two modules (tied embeddings) are one
    parameter. Parameters with fewer than two dimensions (norms, biases) get no weight decay.

    `model`: a module or (name, parameter) pairs. Of DTensors (FSDP2) this rank's shards are trained, and state and
    `tensors` are DTensors as well.

    `groups`: {pattern: lr_ratio and weight_decay} for the parameters that match; the first match counts, see
    Parameters.select for patterns. `eight_bit`: moments in 8 bits, by bitsandbytes. `ema`: decay of an average of the
    weights, in `.ema`.
    """

    def __init__(
        self,
        model: torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]],
        *,
        precision: str = "bf16",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        groups: Mapping[str, GroupConfig] | None = None,
        eight_bit: bool = False,
        ema: float | None = None,
        seed: int = 0,
    ):
        if precision not in COMPUTE_DTYPE:
            raise ValueError(f"[optim] precision: expected one of {', '.join(COMPUTE_DTYPE)}, got {precision!r}.")
        self.precision, self.betas, self.eps, self.seed = precision, betas, eps, seed
        self._slots: list[_Slot] = []
        self._random: dict[torch.device, torch.Generator] = {}
        parameters = Parameters(model if isinstance(model, torch.nn.Module) else list(model))
        grouped = _resolve(parameters, groups or {})
        embeddings = _embeddings(model) if isinstance(model, torch.nn.Module) else set()
        packed = stands_for(model) if isinstance(model, torch.nn.Module) else {}
        for name, p in parameters.items():
            if id(p) in packed:  # four-bit layers: their scales have a dtype of their own
                continue
            if p.requires_grad and not p.is_contiguous():
                raise ValueError(f"[optim] {name}: expected a contiguous parameter. Call .contiguous() on it first.")
            remainder = _narrow(p, COMPUTE_DTYPE[precision], keep=precision == "bf16" and p.requires_grad)
            if p.requires_grad:
                if eight_bit and p.numel() >= SMALLEST and id(p) not in embeddings:
                    if local(p) is not p:
                        raise ValueError(
                            "[optim] optim.name: expected adamw where the model is sharded, got adamw8bit, whose "
                            "blocks of 256 do not fit shards. Set train.parallel to ddp, or optim.name to adamw."
                        )
                    moments = EightBit(p)
                else:
                    moments = Moments(p, torch.bfloat16 if precision == "pure-bf16" else torch.float32)
                group = grouped.get(name, GroupConfig())
                decay = weight_decay if group.weight_decay is None else group.weight_decay
                decay = decay if p.ndim > 1 else 0.0
                self._slots.append(_Slot(name, p, moments, remainder, decay, group.lr_ratio))
        if not self._slots:
            raise ValueError("[optim] model: expected at least one trainable parameter, got none.")
        self.ema = None if ema is None else Ema(self, ema, model if isinstance(model, torch.nn.Module) else None)

    @classmethod
    def from_config(cls, model: torch.nn.Module, cfg: Config) -> AdamW:
        """The optimizer that a run's configuration asks for."""
        o = cfg.optim
        return cls(
            model,
            precision=o.precision,
            betas=o.betas,
            eps=o.eps,
            weight_decay=o.weight_decay,
            groups=o.groups,
            eight_bit=o.name == "adamw8bit",
            ema=o.ema,
            seed=cfg.train.seed,
        )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [s.parameter for s in self._slots]

    @property
    def device(self) -> torch.device:
        return self._slots[0].parameter.device

    @torch.no_grad()
    def step(self, gradients: Gradients, *, step: int, lr: float, scale: float = 1.0) -> None:
        """Update number `step` (from 0) with `scale` times the gradients, which are consumed. The result depends on
        nothing else."""
        for index, slot in enumerate(self._slots):
            gradient = gradients.take(slot.parameter)
            if gradient is None:
                continue
            random = self._generator(slot.parameter, step, index) if self.precision == "pure-bf16" else None
            how = Update(step, lr * slot.lr_ratio, self.betas, self.eps, slot.weight_decay)
            remainders = pieces(slot.remainder) if slot.remainder is not None else None
            parts = zip(pieces(slot.parameter), pieces(gradient), slot.moments.pieces(), strict=True)
            for i, (weight, g, state) in enumerate(parts):
                # In fp32 mode .float() returns the piece itself, so the update is in place.
                wide, bits = join(weight, remainders[i]) if remainders else weight.float(), None
                if random is not None:  # random_ makes 31 bits: 16 for the weight, 15 for v
                    bits = torch.empty(wide.shape, dtype=torch.int32, device=wide.device).random_(generator=random)
                slot.moments.update(state, wide, g.float() * scale, how, None if bits is None else bits >> 15)
                if remainders:
                    split(wide, weight, remainders[i])
                elif bits is not None:
                    weight.copy_(stochastic_round(wide, bits & 0xFFFF))
        if self.ema is not None:
            self.ema.update(self)

    def _generator(self, parameter: torch.nn.Parameter, step: int, index: int) -> torch.Generator:
        """Random bits as a pure function of (seed, step, parameter, shard), so that a resumed run draws the same
        ones."""
        generator = self._random.setdefault(parameter.device, torch.Generator(parameter.device))
        number = (self.seed * 1_000_003 + step) * 1_000_003 + index + shard(parameter) * 1_000_000_007
        return generator.manual_seed(number % 2**63)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The optimizer's state by name, as live tensors: write them to save it, copy into them to restore it."""
        for s in self._slots:
            for kind, tensor in s.moments.tensors():
                yield f"{kind}.{s.name}", tensor
            if s.remainder is not None:
                yield f"remainder.{s.name}", s.remainder
        if self.ema is not None:
            yield from self.ema.tensors()

    def masters(self) -> Iterator[tuple[str, torch.nn.Parameter, Iterator[torch.Tensor]]]:
        """(name, parameter, its weights in float32, piece by piece), to be read at once and not written."""
        for s in self._slots:
            if s.remainder is None:
                yield s.name, s.parameter, (w.float() for w in pieces(s.parameter))
            else:
                yield s.name, s.parameter, map(join, pieces(s.parameter), pieces(s.remainder))

    @torch.no_grad()
    def widen(self, *, ema: bool = False) -> None:
        """Give the model its float32 master weights back, or their average, for saving in full precision, and `drop`
        the state."""
        for s in self._slots:
            s.moments = None
        averages = dict(self.ema.tensors()) if ema else {}
        self.ema = None
        for s, (name, p, wide) in zip(self._slots, self.masters(), strict=True):
            if ema:
                p.data = averages.pop(f"ema.{name}")
            elif s.remainder is not None:
                _replace(p, torch.cat(list(wide)).view(local(p).shape))
        self.drop()

    def drop(self) -> None:
        """Let go of all state. Ends training."""
        self.ema = None
        self._slots.clear()


def shard(parameter: torch.Tensor) -> int:
    """Which part of a DTensor this rank holds, from 0; ranks that hold the same part (replicas) have the same number.
    0 for any other tensor."""
    index, mesh = 0, getattr(parameter, "device_mesh", None)
    for dim, placement in enumerate(parameter.placements if mesh is not None else ()):
        if not placement.is_replicate():
            index = index * mesh.size(dim) + mesh.get_local_rank(dim)
    return index


def _narrow(parameter: torch.nn.Parameter, dtype: torch.dtype, keep: bool) -> torch.Tensor | None:
    """Convert a parameter in place; `keep`: return what bf16 cannot hold, as int16."""
    source = parameter.data
    if not keep:
        if source.dtype != dtype:
            _replace(parameter, local(source).to(dtype))
        return None
    if source.dtype == dtype:  # nothing was cut off, so there is nothing to look for
        return torch.zeros_like(source, dtype=torch.int16)
    weight = torch.empty_like(source, dtype=dtype)
    remainder = torch.empty_like(source, dtype=torch.int16)
    for wide, w, r in zip(*map(pieces, (source, weight, remainder)), strict=True):
        split(wide.float(), w, r)
    _replace(parameter, local(weight))
    return remainder


def _embeddings(model: torch.nn.Module) -> set[int]:
    """Input embeddings, by id: their gradients differ so much from row to row that the authors of 8-bit AdamW keep
    their moments wide, as transformers' Trainer does."""
    return {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}


def _resolve(parameters: Parameters, groups: Mapping[str, GroupConfig]) -> dict[str, GroupConfig]:
    """{parameter name: its group}. Raises ValueError for a group that nothing is in or that changes nothing."""
    named, found = dict(parameters.items()), {}
    for pattern, group in groups.items():
        names = parameters.select(pattern, "optim.groups")
        mine = [name for name in names if name not in found]
        if not mine:
            raise ValueError(
                f"[optim] optim.groups: everything that '{pattern}' matches ({names[0]}, {len(names)} in all) is in an "
                "earlier group, and the first one counts. Put it before them, or leave it out."
            )
        if group.weight_decay and all(named[name].ndim < 2 for name in mine):
            raise ValueError(
                f"[optim] optim.groups: '{pattern}' matches norms and biases alone ({mine[0]}, {len(mine)} in all), "
                "which get no weight decay. Leave weight_decay out there."
            )
        found |= dict.fromkeys(mine, group)
    return found


def _replace(parameter: torch.nn.Parameter, data: torch.Tensor) -> None:
    """Give a parameter other data; `data` is this rank's part, which for a DTensor goes with the old layout."""
    if local(parameter) is parameter:
        parameter.data = data
        return
    from torch.distributed.tensor import DTensor

    layout = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    new = DTensor.from_local(data, parameter.device_mesh, parameter.placements, **layout)
    # .data of a wrapper cannot be set; this is what nn.Module.to does with one.
    torch.utils.swap_tensors(parameter, torch.nn.Parameter(new, requires_grad=parameter.requires_grad))
