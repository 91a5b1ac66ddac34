# SPDX-License-Identifier: Apache-2.0
"""An exponential moving average of the weights, in float32, beside the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .gradients import local, pieces

if TYPE_CHECKING:
    from .optim import AdamW


class Ema:
    """a_0 = w_0, a_t = decay · a_(t-1) + (1 - decay) · w_t after update t, of every trained parameter.

    w is the float32 master weight (with pure-bf16: the bf16 weight). 4 bytes a weight. The average has no warm-up: with
    decay d it looks back over about 1 / (1 - d) steps, and w_0 keeps the share d^t.
    """

    def __init__(self, optimizer: AdamW, decay: float, model: torch.nn.Module | None = None):
        if not 0 < decay < 1:
            raise ValueError(f"[optim] optim.ema: expected a decay between 0 and 1, e.g. 0.999, got {decay}.")
        self.decay = decay
        self._model = model
        self._averages: dict[str, tuple[torch.nn.Parameter, torch.Tensor]] = {}
        for name, parameter, master in optimizer.masters():
            average = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
            for part, wide in zip(pieces(average), master, strict=True):
                part.copy_(wide)
            self._averages[name] = parameter, average

    @torch.no_grad()
    def update(self, optimizer: AdamW) -> None:
        """After each update of the weights."""
        for name, _, master in optimizer.masters():
            for part, wide in zip(pieces(self._averages[name][1]), master, strict=True):
                part.lerp_(wide, 1 - self.decay)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, (_, average) in self._averages.items():
            yield f"ema.{name}", average

    @contextmanager
    def applied(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Inside, the model's weights are the average, in their own dtype or in `dtype`; afterwards what they were.

        Do not train inside. Takes memory for one copy of the trained weights (none with dtype float32).
        """
        self._reshard()
        kept = []
        try:
            for parameter, average in self._averages.values():
                if local(parameter) is not parameter:  # FSDP holds on to a shard's memory: write into that
                    kept.append(local(parameter).clone())
                    local(parameter).copy_(local(average))
                else:
                    kept.append(parameter.data)
                    parameter.data = average.to(dtype or parameter.dtype)
            yield
        finally:
            self._reshard()
            for (parameter, _), data in zip(self._averages.values(), kept):
                if local(parameter) is not parameter:
                    local(parameter).copy_(data)
                else:
                    parameter.data = data

    def _reshard(self) -> None:
        """After a forward pass alone FSDP keeps what it gathered and would go on computing with that."""
        for module in self._model.modules() if self._model is not None else ():
            if hasattr(module, "reshard"):
                module.reshard()
