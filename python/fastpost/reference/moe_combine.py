# SPDX-License-Identifier: Apache-2.0
"""moe_combine in plain torch; works in any float dtype. Its cases are moe_dispatch's."""

from __future__ import annotations

import torch

from fastpost.reference.moe_dispatch import Case, cases

__all__ = ["Case", "cases", "moe_combine"]


def moe_combine(y, plan, gate=None, *, reduce=True):
    """Same signature and meaning as :func:`fastpost.moe_combine`."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    place = plan.place.long()
    slots = y.to(wide).index_select(0, place.clamp(min=0).flatten()).view(*place.shape, y.shape[-1])
    slots = torch.where((place >= 0)[..., None], slots, 0)
    if gate is not None:
        slots = slots * gate.to(wide)[..., None]
    return (slots.sum(1) if reduce else slots).to(y.dtype)
