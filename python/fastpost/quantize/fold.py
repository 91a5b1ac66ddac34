# SPDX-License-Identifier: Apache-2.0
"""Scales moved from a layer's inputs into its weight: ``(x / s) (W · s)ᵀ = x Wᵀ``, with 1/s put into what makes x."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Fold:
    """One place in a block where a scale can be moved.

    Fields:
        previous: the norm or linear layer that makes x.
        linears: names of the layers that are given x.
        inspect: the module whose output shows what rounding these layers does.
    """

    previous: str
    linears: tuple[str, ...]
    inspect: str


NEEDED = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def places(block: nn.Module, *, between: bool = True) -> list[Fold]:
    """The folds of a Llama-like block. v to o is left out where their shapes differ: with fewer key-value heads than
    query heads one value channel feeds several columns of o.

    between: also v to o and up to down, which are no norms (AWQ has them, SmoothQuant does not).

    Raises:
        ValueError: not such a block.
    """
    modules = dict(block.named_modules())
    missing = [name for name in NEEDED if name not in modules]
    if missing:
        raise ValueError(
            f"[quantize] {type(block).__name__}: expected a block like Llama's with {missing[0]}. This method moves "
            "scales between layers that it must know; take gptq or rtn."
        )
    norm = "pre_feedforward_layernorm" if "pre_feedforward_layernorm" in modules else "post_attention_layernorm"
    q, k, v, o = (f"self_attn.{x}_proj" for x in "qkvo")
    gate, up, down = (f"mlp.{x}_proj" for x in ("gate", "up", "down"))
    found = [Fold("input_layernorm", (q, k, v), "self_attn")]
    if between and modules[v].weight.shape == modules[o].weight.shape:
        found.append(Fold(v, (o,), o))
    found.append(Fold(norm, (gate, up), "mlp"))
    if between:
        found.append(Fold(up, (down,), down))
    return found


@torch.no_grad()
def apply(block: nn.Module, fold: Fold, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Move `scale` [K] > 0 in place; returns the scale that was really moved.

    A norm's weight will be stored in `dtype`. It is rounded here and now, and what the rounding changes goes to the
    layers behind it, so that the product stays what it was."""
    modules = dict(block.named_modules())
    previous = modules[fold.previous]
    if isinstance(previous, nn.Linear):
        previous.weight.div_(scale[:, None])
        if previous.bias is not None:
            previous.bias.div_(scale)
    else:
        rounded = (previous.weight / scale).to(dtype).float()
        scale = torch.where(rounded != 0, previous.weight / torch.where(rounded != 0, rounded, 1.0), scale)
        previous.weight.copy_(rounded)
        if getattr(previous, "bias", None) is not None:
            previous.bias.div_(scale)
    for name in fold.linears:
        modules[name].weight.mul_(scale)
    return scale


def check_unchanged(block: nn.Module, before: torch.Tensor, after: torch.Tensor, method: str) -> None:
    """Raise ValueError when a fold has changed what a block computes, as with norms that add one to their weight."""
    change = float((after - before).norm() / before.norm().clamp(min=1e-30))
    if not change < 1e-3:
        raise ValueError(
            f"[{method}] {type(block).__name__}: moving scales into its norms changes its output (by {change:.1e}), so "
            "they are not plain scales. Take gptq or rtn for this model."
        )
