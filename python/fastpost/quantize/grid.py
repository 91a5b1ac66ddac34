# SPDX-License-Identifier: Apache-2.0
"""Uniform grids of 1 to 8 bits, ``w = scale * (code - zero)``, and what a quantised matrix is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastpost.int4 import Int4Weight, pack


@dataclass(frozen=True)
class Quantized:
    """What a method made of one matrix.

    Fields:
        weight: [N, K] float32 (float64 if that came in), the values that it now stands for.
        bits: stored bits a weight with everything that is needed to read it: codes, scales, zeros, masks, orders.
        code_bits: the codes alone, which is what papers quote.
        int4: the same in four-bit groups, where the method makes such.
    """

    weight: torch.Tensor
    bits: float
    code_bits: float
    int4: Int4Weight | None = None


@dataclass(frozen=True)
class Grid:
    """How groups of weights become codes.

    symmetric: ``scale = 2 max|w| / (2^b - 1)``, zero 2^(b-1). Else ``scale = (max - min) / (2^b - 1)`` over a range
    that holds 0, ``zero = round(-min / scale)``. Rounding is half to even. What is rounded is w divided by the scale as
    it is stored, so a narrow scale costs range, not accuracy. With 4 bits it is int4_quantize to the bit.
    """

    bits: int
    symmetric: bool = False
    scales_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self):
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"[quantize] bits: expected 1 to 8, got {self.bits!r}.")

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    def parameters(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros [...] of groups [..., g], both in the groups' dtype; scales are values of scales_dtype.

        Raises:
            ValueError: a scale overflows scales_dtype.
        """
        largest = groups.abs().amax(-1)
        if self.symmetric:
            scales = largest * (2 / self.top)
        else:
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            scales = (high - low) / self.top
        scales = scales.to(self.scales_dtype)
        smallest = torch.finfo(self.scales_dtype).tiny
        floor = torch.where(largest == 0, 1.0, smallest).to(self.scales_dtype)  # zeros stay exact zeros
        scales = torch.where(scales < smallest, floor, scales).to(groups.dtype)
        if not torch.isfinite(scales).all():
            raise ValueError(f"[quantize] weight: a scale does not fit {self.scales_dtype}.")
        if self.symmetric:
            return scales, torch.full_like(scales, 2 ** (self.bits - 1))
        return scales, (-low / scales).round().clamp(0, self.top)

    def codes(self, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """The nearest codes, in the dtype of `values`; all three broadcast."""
        return ((values / scales).round() + zeros).clamp(0, self.top)

    def round(self, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        return (self.codes(values, scales, zeros) - zeros) * scales

    def group_bits(self, group_size: int) -> float:
        """Stored bits a weight."""
        scale = torch.finfo(self.scales_dtype).bits
        return self.bits + (scale + (0 if self.symmetric else self.bits)) / group_size

    def finish(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int,
        order: torch.Tensor | None = None,
    ) -> Quantized:  # fmt: skip
        """Put codes [N, K], scales and zeros [N, G] together; column i of them is column order[i] of W."""
        (n, k), group = codes.shape, torch.arange(codes.shape[1], device=codes.device) // group_size
        stored = scales[:, group] * (codes - zeros[:, group])
        weight = stored if order is None else torch.empty_like(stored).index_copy_(1, order, stored)
        whole_row = -(-k // 32) * 32
        int4 = None
        if self.bits == 4 and (group_size % 32 == 0 or group_size >= k):
            int4 = Int4Weight(
                pack(codes.to(torch.uint8)), scales.to(self.scales_dtype).contiguous(),
                None if self.symmetric else zeros.to(torch.uint8).contiguous(), k,
                whole_row if group_size >= k else group_size, "symmetric" if self.symmetric else "asymmetric", order,
            )  # fmt: skip
        return Quantized(weight, self.group_bits(group_size) + (0 if order is None else 32 / n), self.bits, int4)


def check_matrix(op: str, weight: torch.Tensor) -> torch.Tensor:
    """`weight` as float32 (float64 stays). ValueError for anything but a finite float matrix."""
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        got = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ValueError(f"[{op}] weight: expected a float matrix [N, K], got {got}.")
    if not torch.isfinite(weight).all():
        row = int((~torch.isfinite(weight).all(1)).nonzero()[0])
        raise ValueError(f"[{op}] weight: row {row} holds NaN or infinity; nothing was quantised.")
    return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()


def check_groups(op: str, group_size: int, columns: int) -> int:
    """The group size in columns; -1 is one group a row. ValueError where groups do not divide the columns."""
    if group_size == -1:
        return columns
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(
            f"[{op}] group_size: expected a number of columns or -1 (one scale a row), got {group_size!r}."
        )
    if columns % group_size:
        fitting = [str(g) for g in (256, 128, 64, 32, 16) if columns % g == 0 and g < group_size]
        raise ValueError(
            f"[{op}] group_size: {group_size} does not divide the {columns} columns of this matrix. "
            f"Take {', '.join([*fitting[:2], '-1 (one scale a row)'])}."
        )
    return group_size
