# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors folders (llm-compressor), "pack-quantized" with int4 weights: to Int4Weight, bit for bit.

A layer [N, K] with G groups is weight_packed int32 [N, ceil(K/8)] (value + 8 in each nibble), weight_scale [N, G],
weight_shape int64 [2], for asymmetric ones weight_zero_point int32 [ceil(N/8), G] (eight rows in a word, + 8), and with
activation ordering by group weight_g_idx int32 [K]. w = scale * (value - zero point).
"""

from __future__ import annotations

import torch

from fastpost.hf.int4_tensors import Part, nibbles
from fastpost.int4 import SYMMETRIC_ZERO, Int4Weight, check_group_size, pack

METHOD = "compressed-tensors"
ANCHOR = ".weight_packed"
SUFFIXES = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check(config: dict, where: str) -> None:
    """Raise ValueError for a quantization_config whose layers are not read."""

    def expect(good: bool, field: str, wanted: str, got) -> None:
        if not good:
            raise ValueError(f"{where}: {field}: expected {wanted}, got {got!r}. Quantise the model again that way.")

    form = config.get("format")
    expect(form in ("pack-quantized", None), "format", "pack-quantized", form)
    status = config.get("quantization_status", "compressed")
    expect(status in ("compressed", "frozen"), "quantization_status", "compressed", status)
    for name, group in (config.get("config_groups") or {}).items():
        weights = group.get("weights") or {}
        field = f"config_groups.{name}"
        kind = group.get("format")
        expect(kind in ("pack-quantized", None), f"{field}.format", "pack-quantized", kind)
        expect(weights.get("num_bits") == 4, f"{field}.weights.num_bits", "4", weights.get("num_bits"))
        expect(weights.get("type", "int") == "int", f"{field}.weights.type", "int", weights.get("type"))
        strategy = weights.get("strategy")
        expect(strategy in ("group", "channel", None), f"{field}.weights.strategy", "group or channel", strategy)
        expect(not group.get("input_activations"), f"{field}.input_activations", "none", group["input_activations"]
               if group.get("input_activations") else None)  # fmt: skip


def read(part: Part, config: dict) -> Int4Weight:
    """The weight of one layer. ValueError naming the tensor for what is no whole int4 layer."""
    n, k = part.shape
    shape = part.get(".weight_shape", (torch.int64, torch.int32), (2,)).tolist()
    if shape != [n, k]:
        raise ValueError(f"{part.where('.weight_shape')}: expected {[n, k]}, got {shape}. It fits another model.")
    packed = part.get(".weight_packed", torch.int32, (n, -(-k // 8)), "Another number of bits? Only four are read.")
    scales = part.get(".weight_scale", _FLOATS, None)
    groups = scales.shape[1] if scales.ndim == 2 and scales.shape[0] == n else 0
    sizes = {(g.get("weights") or {}).get("group_size") for g in (config.get("config_groups") or {}).values()}
    # The number of scales decides; the configuration says which size gives it where the last group is not whole.
    size = -1 if groups == 1 else next((s for s in sizes if s and s > 0 and -(-k // s) == groups), 0)
    if groups > 1 and not size and k % groups == 0:
        size = k // groups
    try:
        group_size = check_group_size("compressed-tensors", size, k)
    except ValueError:
        raise ValueError(
            f"{part.where('.weight_scale')}: expected a scale a row or groups of 32, 64, 128, ... of the {k} columns, "
            f"got {list(scales.shape)}. Quantise the model again that way."
        ) from None
    codes, zeros = nibbles(packed)[:, :k], None
    if part.has(".weight_zero_point"):
        zeros = _zeros(part, n, groups)
    order = part.group_order(".weight_g_idx", k, group_size, "the scales", unset=-1)  # -1: no order at all
    if order is not None:
        codes = codes[:, order]
    symmetric = zeros is None or bool((zeros == SYMMETRIC_ZERO).all())
    weight = Int4Weight(
        pack(codes.contiguous()), scales.contiguous(), None if symmetric else zeros, k, group_size,
        "symmetric" if symmetric else "asymmetric", order=order,
    )  # fmt: skip
    return weight.check(part.where(".weight_scale"))


def _zeros(part: Part, n: int, groups: int) -> torch.Tensor:
    """[N, G] uint8, 0 to 15; older files have them as int8 [N, G], -8 to 7."""
    found = part.get(".weight_zero_point", (torch.int32, torch.int8), None)
    if found.dtype == torch.int8:
        found = part.get(".weight_zero_point", torch.int8, (n, groups))
        return (found.to(torch.int16) + 8).to(torch.uint8)
    found = part.get(".weight_zero_point", torch.int32, (-(-n // 8), groups))
    return nibbles(found.t().contiguous())[:, :n].t().contiguous()
