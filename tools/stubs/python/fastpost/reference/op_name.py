# SPDX-License-Identifier: Apache-2.0
"""op_name in plain torch; works in any float dtype, so float64 input gives the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def op_name(x):
    """Same signature and meaning as :func:`fastpost.op_name`."""
    return x.sum(1)  # FILL IN: the definition


@dataclass(frozen=True)
class Case:
    """One shape with its options; `inputs` draws the tensors."""

    name: str
    n: int
    d: int
    scale: float = 1.0

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        return ((torch.randn(self.n, self.d, generator=g) * self.scale).to(device, dtype),)


def cases() -> list[Case]:
    """FILL IN: every branch of the kernels; say why a size is here."""
    return [
        Case("empty", 0, 17),
        Case("one-row", 1, 1000),
        Case("one-column", 5, 1),
        Case("tail", 70, 4099),  # divides neither the register nor the block, more rows than a grain
        Case("tiny-scale", 8, 333, scale=1e-3),
        Case("huge-scale", 8, 333, scale=1e3),
    ]
