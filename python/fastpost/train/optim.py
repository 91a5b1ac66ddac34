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

Bytes a weight besides the gradient: 12, 12, 6. The update is torch's fused AdamW on float32 pieces that fit the
cache, one parameter after the other, each gradient freed as soon as it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from .gradients import Gradients, local, pieces

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32, "pure-bf16": torch.bfloat16}


@dataclass
class _Slot:
    """A trained parameter and its state. `remainder` is int16 in bf16 mode, else None."""

    name: str
    parameter: torch.nn.Parameter
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    remainder: torch.Tensor | None
    weight_decay: float


class AdamW:
    """AdamW over the trainable parameters of `model`, whose weights it converts in place to the compute dtype.

    Give it the model with the precision of its files: float32 weights become bf16 plus remainder one parameter at a
    time, so a second copy of the model never exists. Weights shared by two modules (tied embeddings) are one
    parameter. Parameters with fewer than two dimensions (norms, biases) get no weight decay.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        precision: str = "bf16",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ):
        if precision not in COMPUTE_DTYPE:
            raise ValueError(f"[optim] precision: expected one of {', '.join(COMPUTE_DTYPE)}, got {precision!r}.")
        self.precision, self.betas, self.eps, self.seed = precision, betas, eps, seed
        self._slots: list[_Slot] = []
        self._random: dict[torch.device, torch.Generator] = {}
        moments = torch.bfloat16 if precision == "pure-bf16" else torch.float32
        for name, p in model.named_parameters():
            if p.requires_grad and not p.is_contiguous():
                raise ValueError(f"[optim] {name}: expected a contiguous parameter. Call .contiguous() on it first.")
            remainder = _narrow(p, COMPUTE_DTYPE[precision], keep=precision == "bf16" and p.requires_grad)
            if p.requires_grad:
                m, v = (torch.zeros_like(p, dtype=moments, requires_grad=False) for _ in range(2))
                self._slots.append(_Slot(name, p, m, v, remainder, weight_decay if p.ndim > 1 else 0.0))
        if not self._slots:
            raise ValueError("[optim] model: expected at least one trainable parameter, got none.")

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
            random = self._generator(slot.parameter.device, step, index) if self.precision == "pure-bf16" else None
            remainders = pieces(slot.remainder) if slot.remainder is not None else None
            parts = zip(*map(pieces, (slot.parameter, gradient, slot.exp_avg, slot.exp_avg_sq)), strict=True)
            for i, (weight, g, m, v) in enumerate(parts):
                # In fp32 mode .float() returns the piece itself, so the update is in place.
                wide = join(weight, remainders[i]) if remainders else weight.float()
                wide_m, wide_v = m.float(), v.float()
                self._update(wide, g.float() * scale, wide_m, wide_v, slot.weight_decay, step, lr)
                if remainders:
                    split(wide, weight, remainders[i])
                elif random is not None:
                    bits = torch.empty(wide.shape, dtype=torch.int32, device=wide.device).random_(generator=random)
                    weight.copy_(stochastic_round(wide, bits & 0xFFFF))
                    # The step of v, a thousandth, is below half a bf16 ulp too; that of m, a tenth, is not. random_
                    # makes 31 bits.
                    v.copy_(stochastic_round(wide_v, bits >> 15))
                    m.copy_(wide_m)

    def _update(self, weight, gradient, m, v, weight_decay: float, step: int, lr: float) -> None:
        done = torch.full((), float(step), device=weight.device)
        adamw(
            [weight], [gradient], [m], [v], [], [done], fused=True, amsgrad=False, maximize=False,
            beta1=self.betas[0], beta2=self.betas[1], lr=lr, weight_decay=weight_decay, eps=self.eps,
        )  # fmt: skip

    def _generator(self, device: torch.device, step: int, index: int) -> torch.Generator:
        """Random bits as a pure function of (seed, step, parameter), so that a resumed run draws the same ones."""
        generator = self._random.setdefault(device, torch.Generator(device))
        return generator.manual_seed(((self.seed * 1_000_003 + step) * 1_000_003 + index) % 2**63)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The optimizer's state by name, as live tensors: write them to save it, copy into them to restore it."""
        for s in self._slots:
            yield f"exp_avg.{s.name}", s.exp_avg
            yield f"exp_avg_sq.{s.name}", s.exp_avg_sq
            if s.remainder is not None:
                yield f"remainder.{s.name}", s.remainder

    @torch.no_grad()
    def widen(self) -> None:
        """Give the model its float32 master weights back, for saving in full precision. Ends training: the state is
        dropped."""
        for s in self._slots:
            s.exp_avg = s.exp_avg_sq = None
            if s.remainder is not None:
                parts = zip(pieces(s.parameter), pieces(s.remainder), strict=True)
                wide = torch.cat([join(w, r) for w, r in parts]).view(local(s.parameter).shape)
                _replace(s.parameter, wide)
        self._slots.clear()


def join(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """bf16 value + int16 remainder -> the float32 master weight."""
    wide = weight.float()
    wide.view(torch.int32).add_(remainder)
    return wide


def split(wide: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor) -> None:
    """Write the float32 `wide` into `weight` (bf16, to nearest) and `remainder` (int16). `join` gives it back to the
    bit.

    Half-way cases round away from zero, not to even: only so does the remainder, in [-2^15, 2^15), fit 16 bits.
    """
    bits = wide.view(torch.int32)
    kept = (bits + 0x8000).bitwise_and_(-65536)
    weight.copy_(kept.view(torch.float32))  # exact: the cut-off half is zero
    remainder.copy_(bits - kept)


def stochastic_round(wide: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """float32 -> float32 values that bf16 holds exactly, rounded away from zero with probability the fraction cut off.

    `bits`: int32, uniform in [0, 2^16). Adding them to the bit pattern carries into the kept half with just that
    probability.
    """
    return (wide.view(torch.int32) + bits).bitwise_and_(-65536).view(torch.float32)


def _narrow(parameter: torch.nn.Parameter, dtype: torch.dtype, keep: bool) -> torch.Tensor | None:
    """Convert a parameter in place; `keep`: return what bf16 cannot hold, as int16."""
    source = parameter.data
    if not keep:
        if source.dtype != dtype:
            _replace(parameter, local(source).to(dtype))
        return None
    weight = torch.empty_like(source, dtype=dtype)
    remainder = torch.empty_like(source, dtype=torch.int16)
    for wide, w, r in zip(*map(pieces, (source, weight, remainder)), strict=True):
        split(wide.float(), w, r)
    _replace(parameter, local(weight))
    return remainder


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
