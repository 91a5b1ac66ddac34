# SPDX-License-Identifier: Apache-2.0
"""From padded batches, as other libraries have them, to the packed rows of fastpost's ops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """The N scored rows of S sequences, one sequence after the other."""

    hidden: Tensor  # [N, D]
    target: Tensor  # [N]
    cu_seqlens: Tensor  # [S + 1] int32
    rows: Tensor  # [N]: where each row was in the flattened batch


def pack(op: str, hidden: Tensor, target: Tensor, ignore_index: int = -100, order: Tensor | None = None,
         name: str = "_input") -> Packed:  # fmt: skip
    """hidden [S, T, D], target [S, T]; rows with `ignore_index` are left out. order [S]: which sequence comes when.

    Raises ValueError, in the name of `op` and its argument `name`, when the shapes do not fit.
    """
    if hidden.ndim != 3 or target.shape != hidden.shape[:2]:
        raise ValueError(
            f"[{op}] {name}: expected [sequences, T, D] and a target of [sequences, T], got {list(hidden.shape)} and "
            f"{list(target.shape)}."
        )
    s, t = target.shape
    order = torch.arange(s, device=target.device) if order is None else order
    scored = target[order] != ignore_index
    rows = (order[:, None] * t + torch.arange(t, device=target.device))[scored]
    cu_seqlens = torch.nn.functional.pad(scored.sum(1).cumsum(0), (1, 0)).int()
    return Packed(hidden.flatten(0, 1).index_select(0, rows), target.flatten()[rows], cu_seqlens, rows)
