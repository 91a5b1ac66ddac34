# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes folders, NF4 with plain or nested absmax: to Int4Weight, bit for bit.

A layer [N, K] is weight, uint8 (or other bytes), two codes in a byte, the first in the high half, row by row;
weight.absmax float32, one for each block of so many weights; weight.quant_map [16], the values; and
weight.quant_state.bitsandbytes__nf4, JSON with shape, blocksize and dtype. Nested (double quantisation): absmax is
uint8 codes of weight.nested_quant_map [256], with weight.nested_absmax for each 256 of them and an offset in the JSON.
"""

from __future__ import annotations

import json
import math

import torch

from fastpost.hf.int4_tensors import AGAIN, Part
from fastpost.int4 import NESTED_BLOCK, NF4, Int4Weight, NestedScales, pack

METHOD = "bitsandbytes"
STATE = ".weight.quant_state.bitsandbytes__"
ANCHOR = f"{STATE}nf4"
SUFFIXES = (".weight", ".weight.absmax", ".weight.quant_map", ANCHOR, ".weight.nested_absmax",
            ".weight.nested_quant_map")  # fmt: skip
REFUSED = {f"{STATE}fp4": "FP4", ".SCB": "LLM.int8()"}
"""Endings of keys that belong to formats of bitsandbytes which are not read."""


def check(config: dict, where: str) -> None:
    """Raise ValueError for a quantization_config whose layers are not read."""
    kind = config.get("bnb_4bit_quant_type", "nf4")
    if not config.get("load_in_4bit", config.get("_load_in_4bit", True)) or kind != "nf4":
        got = kind if kind != "nf4" else "8 bits"
        raise ValueError(
            f"{where}: expected bitsandbytes in 4 bits with bnb_4bit_quant_type nf4, got {got}. Quantise the original "
            "model again that way."
        )


def read(part: Part, config: dict) -> Int4Weight:
    """The weight of one layer. ValueError naming the tensor for what is no whole NF4 layer."""
    n, k = part.shape
    state = _state(part)
    block = state["blocksize"]
    if list(state["shape"] or ()) != [n, k]:
        raise ValueError(f"{part.where(ANCHOR)}: shape: expected {[n, k]}, got {state['shape']}. {AGAIN}")
    if not isinstance(block, int) or block % 32 or k % block:
        raise ValueError(
            f"{part.where(ANCHOR)}: blocksize: expected a multiple of 32 that divides the {k} columns, so that no "
            f"block goes on in the next row, got {block}. Quantise the original model again with another blocksize."
        )
    table = part.get(".weight.quant_map", torch.float32, (16,))
    if not torch.equal(table, torch.tensor(NF4)):
        raise ValueError(f"{part.where('.weight.quant_map')}: expected the 16 values of NF4, got others. {AGAIN}")
    raw = part.tensors.get(f"{part.name}.weight").contiguous().view(torch.uint8).flatten()
    if len(raw) * 2 != n * k:
        raise ValueError(f"{part.where('.weight')}: expected {n * k // 2} bytes, got {len(raw)}. {AGAIN}")
    codes = torch.stack([raw >> 4, raw & 15], 1).view(n, k)
    groups, nested = k // block, None
    if "nested_offset" in state:
        scales = part.get(".weight.absmax", torch.uint8, (n * groups,))
        if state.get("nested_blocksize") != NESTED_BLOCK:
            raise ValueError(
                f"{part.where(ANCHOR)}: nested_blocksize: expected {NESTED_BLOCK}, got "
                f"{state.get('nested_blocksize')}. Quantise the original model again."
            )
        outer = part.get(".weight.nested_absmax", torch.float32, (math.ceil(n * groups / NESTED_BLOCK),))
        inner = part.get(".weight.nested_quant_map", torch.float32, (256,))
        nested = NestedScales(inner, outer, torch.tensor(float(state["nested_offset"])))
    else:
        scales = part.get(".weight.absmax", torch.float32, (n * groups,))
    weight = Int4Weight(pack(codes), scales.view(n, groups), None, k, block, "nf4", nested=nested)
    return weight.check(part.where(".weight.absmax"))


def _state(part: Part) -> dict:
    raw = part.get(ANCHOR, torch.uint8, None)
    try:
        state = json.loads(bytes(raw.tolist()))
        return {"shape": state["shape"], "blocksize": state["blocksize"]} | state
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{part.where(ANCHOR)}: expected JSON with shape and blocksize, got {error}. {AGAIN}"
        ) from None
