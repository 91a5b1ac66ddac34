# SPDX-License-Identifier: Apache-2.0
"""Four-bit layers whose groups are shifted: ``w = scale * NF4[code] + shift`` (IR-QLoRA's information calibration).

The container has no place for a shift, and needs none: ``x Wᵀ = int4_gemm(x) + s shiftᵀ`` with s [..., G], the sums of
x over the groups. That is one more product of 1/group_size of the operations, forward and backward, and nothing is
dequantised.
"""

from __future__ import annotations

import torch
from torch import nn

from fastpost.int4 import Int4Weight, check_group_size, nest_scales, pack
from fastpost.nn.int4_linear import Int4Linear
from fastpost.nn.int4_packed import PACKED


class ShiftedInt4Linear(Int4Linear):
    """Int4Linear with `shift` [out_features, G] bfloat16, one number for each group. Make it by `from_linear`."""

    packed_names = (*PACKED, "shift")

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int = 64,
        scheme: str = "nf4",
        *,
        scales_dtype=None,
        double_quant: bool = True,
    ) -> ShiftedInt4Linear:
        """NF4 of `linear` with the shift of each group that gives its codes most entropy (fastpost.quantize.ir_qlora).

        Shifts are rounded to bfloat16 before the codes are found. (The authors keep them in eight bits with a float32
        scale for each 256: 0.13 bits a weight instead of 0.25 in groups of 64.) A layer on the meta device gives one
        there.

        Raises:
            ValueError: another scheme, a group size that does not divide the columns, NaN or infinity.
        """
        if scheme != "nf4" or scales_dtype not in (None, torch.float32):
            raise ValueError(f"[ShiftedInt4Linear] scheme: expected nf4 with float32 scales, got {scheme!r}.")
        n, k = linear.out_features, linear.in_features
        group_size = check_group_size("ShiftedInt4Linear", group_size, k)
        block = min(group_size, k)  # one group of all columns may be longer than they are
        if k % block:
            raise ValueError(
                f"[ShiftedInt4Linear] group_size: expected a divisor of the {k} columns, got {group_size}."
            )
        weight = linear.weight.detach()
        if weight.is_meta:
            made = cls(k, n, False, group_size=group_size, scheme=scheme, double_quant=double_quant, device="meta")
            shifts = made.shift.data
        else:
            from fastpost.quantize.ir_qlora import best_shifts, shifted_codes

            if not torch.isfinite(weight).all():
                raise ValueError("[ShiftedInt4Linear] linear: expected finite weights, got NaN or infinity.")
            blocks = weight.float().reshape(-1, block)
            shifts = best_shifts(blocks).bfloat16()
            codes, scales = shifted_codes(blocks, shifts.float())
            scales, nested = torch.where(scales > 0, scales, 1.0).view(n, -1), None
            if double_quant:
                scales, nested = nest_scales(scales)
            packed = Int4Weight(pack(codes.view(n, k)), scales, None, k, group_size, "nf4", nested=nested)
            made = cls.from_int4(packed)
        made.register_parameter("shift", nn.Parameter(shifts.view(n, -1), requires_grad=False))
        made.bias = linear.bias
        return made.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        sums = x.to(out.dtype).unflatten(-1, (-1, min(self.group_size, self.in_features))).sum(-1)
        return out + nn.functional.linear(sums, self.shift.to(out.dtype))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        shift = self.shift.float().repeat_interleave(min(self.group_size, self.in_features), 1)
        return (super().dequantize() + shift).to(dtype)

    def replace_weight(self, weight: Int4Weight) -> None:
        raise ValueError(
            "[ShiftedInt4Linear] weight: its codes fit its shifts alone. Make a new layer with from_linear."
        )

    def _hold(self, weight: Int4Weight) -> None:
        super()._hold(weight)
        shift = torch.zeros(weight.scales.shape, dtype=torch.bfloat16, device=weight.codes.device)
        self.register_parameter("shift", nn.Parameter(shift, requires_grad=False))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shifted"
