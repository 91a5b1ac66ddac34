# SPDX-License-Identifier: Apache-2.0
"""The linear layers of a model that decodes on a CPU, a few rows at a time."""

from __future__ import annotations

from torch import nn

from fastpost.ops import _few_rows


class DecodeLinear(nn.Linear):
    """An nn.Linear whose products of up to 32 bfloat16 rows on a CPU, without gradient, read the weights as fast as
    memory gives them. Everything else goes as in nn.Linear; parameters and their names are the same."""

    def forward(self, x):
        if _few_rows.fits(x, self.weight):
            return _few_rows.linear(x, self.weight, self.bias)
        return super().forward(x)


def use_decode_linear(model: nn.Module) -> int:
    """Make each plain nn.Linear of `model` a DecodeLinear, in place, by its class alone: no weight is copied or
    renamed. Returns how many. Does nothing to layers that are something else already (quantised, with an adapter)."""
    return _change(model, nn.Linear, DecodeLinear)


def restore_linear(model: nn.Module) -> int:
    """Undo use_decode_linear."""
    return _change(model, DecodeLinear, nn.Linear)


def _change(model: nn.Module, old: type, new: type) -> int:
    found = [module for module in model.modules() if type(module) is old]
    for module in found:
        module.__class__ = new
    return len(found)
