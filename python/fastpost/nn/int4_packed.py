# SPDX-License-Identifier: Apache-2.0
"""What modules with four-bit weights have in common: how they hold the bytes.

The packed tensors are parameters that require no gradient, so that FSDP2 cuts them by rows like any other, they are in
the state_dict under their own names, and whoever counts or moves parameters finds them.
"""

from __future__ import annotations

import torch
from torch import nn

from fastpost.int4 import SCHEMES, SYMMETRIC_ZERO, Int4Weight, NestedScales, check_group_size, nest_scales

PACKED = ("codes", "scales", "zeros", "order", "nested_table", "nested_outer", "nested_offset")
"""Parameters of such a module, as far as its format has them."""


class Packed(nn.Module):
    """A module with one Int4Weight, `packed`, whose fields are its parameters. Moving it to another dtype (.to, .half,
    .float, .bfloat16) leaves them as they are."""

    packed_names: tuple[str, ...] = PACKED

    @property
    def packed(self) -> Int4Weight:
        """The weight as fastpost's ops take it; no copy."""
        nested = None
        if self.nested_table is not None:
            nested = NestedScales(self.nested_table, self.nested_outer, self.nested_offset[0])
        return Int4Weight(self.codes, self.scales, self.zeros, self.columns, self.group_size, self.scheme,
                          order=self.order, nested=nested)  # fmt: skip

    @property
    def qweight(self) -> torch.Tensor:
        """The codes, under the name by which peft finds the device of a layer whose weight is packed."""
        return self.codes

    def format_words(self) -> list[str]:
        """For extra_repr."""
        words = [self.scheme, f"group_size={self.group_size}"]
        words.append("scales nested" if self.nested_table is not None else f"scales {str(self.scales.dtype)[6:]}")
        return words + ["act_order"] * (self.order is not None)

    def _hold(self, weight: Int4Weight) -> None:
        self.columns, self.group_size, self.scheme = weight.columns, weight.group_size, weight.scheme
        nested = weight.nested
        tensors = [weight.codes, weight.scales, weight.zeros, weight.order]
        # One number has a dimension here, because FSDP2 cuts along one.
        tensors += [nested.table, nested.outer, nested.offset.view(1)] if nested else [None] * 3
        self.register_parameter("weight", None)
        for name, tensor in zip(PACKED, tensors, strict=True):
            held = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, held)

    def _apply(self, fn, recurse=True):
        kept = {id(self._parameters[name]) for name in self.packed_names}

        def moved(tensor):
            out = fn(tensor)
            return out if id(tensor) not in kept or out.dtype == tensor.dtype else tensor.to(out.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        for name in self.packed_names:  # copying would convert without a word
            own, given = self._parameters[name], state_dict.get(prefix + name)
            if own is not None and given is not None and own.dtype != given.dtype:
                errors.append(f"{prefix}{name}: expected {own.dtype}, got {given.dtype}: another four-bit format")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def nothing(
    who: str,
    rows: int,
    columns: int,
    *,
    group_size: int,
    scheme: str,
    scales_dtype: torch.dtype | None = None,
    double_quant: bool = False,
    act_order: bool = False,
    device=None,
) -> Int4Weight:
    """W = 0 [rows, columns], on the meta device without memory. Raises ValueError as int4_quantize, in the name of
    `who`."""
    if scheme not in SCHEMES:
        raise ValueError(f"[{who}] scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}.")
    if double_quant and scheme != "nf4":
        raise ValueError(f"[{who}] double_quant: expected the scheme nf4, got {scheme!r}.")
    group_size = check_group_size(who, group_size, columns)
    groups = -(-columns // group_size)
    zero = 7 if scheme == "nf4" else SYMMETRIC_ZERO  # the code that means 0
    with torch.device(device if device is not None else torch.get_default_device()):
        kind = scales_dtype or (torch.float32 if scheme == "nf4" else torch.bfloat16)
        scales, nested = torch.ones(rows, groups, dtype=torch.float32 if double_quant else kind), None
        if double_quant:
            scales, nested = _nothing_nested(scales)
        zeros = torch.full((rows, groups), zero, dtype=torch.uint8) if scheme == "asymmetric" else None
        codes = torch.full((rows, -(-columns // 128) * 64), zero * 17, dtype=torch.uint8)
        order = torch.arange(columns) if act_order else None
        return Int4Weight(codes, scales, zeros, columns, group_size, scheme, order=order, nested=nested)


def _nothing_nested(scales: torch.Tensor) -> tuple[torch.Tensor, NestedScales]:
    if not scales.is_meta:
        return nest_scales(scales)
    blocks = -(-scales.numel() // 256)
    return scales.to(torch.uint8), NestedScales(scales.new_empty(256), scales.new_empty(blocks), scales.new_empty(()))


def stands_for(model: nn.Module) -> dict[int, int]:
    """{id of a packed parameter: number of weights that it stands for}: N K for codes, 0 for what belongs to them."""
    layers = [m for m in model.modules() if isinstance(m, Packed)]
    found = {id(p): 0 for m in layers for name in m.packed_names if (p := getattr(m, name)) is not None}
    return found | {id(m.codes): m.codes.shape[0] * m.columns for m in layers}
