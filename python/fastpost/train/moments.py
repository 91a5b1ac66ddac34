# SPDX-License-Identifier: Apache-2.0
"""AdamW's two moments of one parameter, and the update that reads and writes them, piece by piece.

Moments       float32, or bf16 with v rounded at random; torch's fused AdamW.
EightBit      one byte a number: 256 neighbours share a float32 scale, and the byte names one of 256 values between
              -1 and 1 that lie denser towards zero. bitsandbytes' blockwise AdamW (arXiv 2110.02861). Its
              CPU kernel takes 24 ns a weight on one thread, Moments 3: it is for GPUs and tight memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch.optim.adamw import adamw

from .gradients import pieces
from .rounding import stochastic_round

BLOCK = 256
"""Numbers that share a scale in EightBit; bitsandbytes' kernels know no other."""

SMALLEST = 4096
"""Parameters with fewer numbers keep wide moments: little to gain, and norms and biases need the precision."""


class Update(NamedTuple):
    """What one update needs besides weight, gradient and moments. `step` counts from 0."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class Moments:
    """exp_avg and exp_avg_sq in `dtype` (float32 or bfloat16), shaped like the parameter."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(weight, dtype=dtype, requires_grad=False) for _ in range(2))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "exp_avg", self.exp_avg
        yield "exp_avg_sq", self.exp_avg_sq

    def pieces(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """The state of each of the parameter's `pieces`."""
        return zip(pieces(self.exp_avg), pieces(self.exp_avg_sq), strict=True)

    @staticmethod
    def update(
        state: tuple[torch.Tensor, ...],
        weight: torch.Tensor,
        gradient: torch.Tensor,
        how: Update,
        bits: torch.Tensor | None,
    ) -> None:
        """Update a float32 piece `weight` and its state in place. `bits`: 15 random ones in an int32 each, for bf16."""
        m, v = state
        wide_m, wide_v = m.float(), v.float()  # float32 moments themselves: the update is in place
        done = torch.full((), float(how.step), device=weight.device)
        adamw(
            [weight], [gradient], [wide_m], [wide_v], [], [done], fused=True, amsgrad=False, maximize=False,
            beta1=how.betas[0], beta2=how.betas[1], lr=how.lr, weight_decay=how.weight_decay, eps=how.eps,
        )  # fmt: skip
        if bits is not None:
            # The step of v, a thousandth, is below half a bf16 ulp; that of m, a tenth, is not.
            v.copy_(stochastic_round(wide_v, bits))
            m.copy_(wide_m)


class EightBit:
    """exp_avg and exp_avg_sq as codes (uint8, shaped like the parameter) and scales (float32, one per 256 codes)."""

    def __init__(self, weight: torch.Tensor):
        codes = [torch.zeros_like(weight, dtype=torch.uint8, requires_grad=False) for _ in range(2)]
        scales = [torch.zeros(-(-weight.numel() // BLOCK), device=weight.device) for _ in range(2)]
        self.exp_avg, self.exp_avg_sq, self.scale, self.scale_sq = *codes, *scales

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "exp_avg", self.exp_avg
        yield "exp_avg_sq", self.exp_avg_sq
        yield "exp_avg_scale", self.scale
        yield "exp_avg_sq_scale", self.scale_sq

    def pieces(self) -> Iterator[tuple[torch.Tensor, ...]]:
        codes = pieces(self.exp_avg)
        blocks = -(-codes[0].numel() // BLOCK) or 1  # pieces are whole blocks, but for the last
        scales = (s.split(blocks) for s in (self.scale, self.scale_sq))
        return zip(codes, pieces(self.exp_avg_sq), *scales, strict=True)

    @staticmethod
    def update(
        state: tuple[torch.Tensor, ...],
        weight: torch.Tensor,
        gradient: torch.Tensor,
        how: Update,
        bits: torch.Tensor | None,
    ) -> None:
        """As Moments.update. The codes are rounded to nearest, so `bits` are not used."""
        codes, codes_sq, scale, scale_sq = state
        signed, unsigned = _maps(weight.device)
        library().optimizer_update_8bit_blockwise(
            "adam", gradient, weight, codes, codes_sq, how.betas[0], how.betas[1], 0.0, 0.0, how.eps, how.step + 1,
            how.lr, signed, unsigned, scale, scale_sq, weight_decay=how.weight_decay,
        )  # fmt: skip


@cache
def library() -> ModuleType:
    """bitsandbytes.functional. Raises ValueError that says what to install when it is missing."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # on import it warns about 4-bit kernels that nobody asked for
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError(
            f"[optim] optim.name: adamw8bit needs the package bitsandbytes, which cannot be imported ({error}). "
            "Install it with: pip install 'fastpost[adamw8bit]', or set optim.name to adamw."
        ) from None
    finally:
        log.setLevel(level)
    return functional


@cache
def _maps(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The 256 values that a code can mean, for exp_avg (signed) and exp_avg_sq."""
    make = library().create_dynamic_map
    return make(signed=True).to(device), make(signed=False).to(device)
