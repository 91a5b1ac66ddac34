# SPDX-License-Identifier: Apache-2.0
"""float32 numbers in 16 bits: a bf16 value plus an int16 remainder that together lose nothing, or a bf16 value drawn at
random."""

from __future__ import annotations

import torch


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
