# SPDX-License-Identifier: Apache-2.0
"""GPTQ folders (GPTQModel, AutoGPTQ), four bits: to and from Int4Weight, bit for bit.

A layer [N, K] with G groups is qweight int32 [K/8, N] (eight rows of Wᵀ in a word), qzeros int32 [G, N/8] (eight
columns), scales float16 [G, N], and g_idx int32 [K], the group of each column. w = scale * (code - zero).

Version 1 ("gptq") stores qzeros - 0x11111111, whole words, as GPTQModel does it; version 2 ("gptq_v2") the zero points
themselves. With act-order (desc_act) groups are not neighbours; stored by group, they are: Int4Weight.order.
"""

from __future__ import annotations

import torch

from fastpost.hf.int4_tensors import Part, nibbles, words
from fastpost.int4 import SYMMETRIC_ZERO, Int4Weight, check_group_size, pack

METHOD = "gptq"
ANCHOR = ".qweight"
SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
ONES = 0x11111111
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
OTHER_BITS = "Another number of bits for this layer? Only four are read."


def check(config: dict, where: str) -> None:
    """Raise ValueError for a quantization_config whose layers are not read."""
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    expected = {
        "bits": (config.get("bits") == 4, "4", config.get("bits")),
        "checkpoint_format": (form in ("gptq", "gptq_v2"), "gptq or gptq_v2", form),
        "pack_dtype": (config.get("pack_dtype", "int32") in ("int32", None), "int32", config.get("pack_dtype")),
    }
    for field, (good, wanted, got) in expected.items():
        if not good:
            raise ValueError(f"{where}: {field}: expected {wanted}, got {got!r}. Quantise the model again that way.")


def read(part: Part, config: dict) -> Int4Weight:
    """The weight of one layer. ValueError naming the tensor for what is no whole four-bit layer."""
    n, k = part.shape
    size = config.get("group_size", 128)
    try:
        group_size = check_group_size("gptq", size, k)
    except ValueError:
        raise ValueError(
            f"{part.where('.scales')}: expected groups of 32, 64, 128, ... columns, got group_size {size!r}. Quantise "
            "the model again that way."
        ) from None
    groups = -(-k // group_size)
    codes = part.get(".qweight", torch.int32, (k // 8, n) if k % 8 == 0 else None, OTHER_BITS)
    wide = -(-n // 8)
    zeros = part.get(".qzeros", torch.int32, (groups, wide), "Another group size for this layer?")
    scales = part.get(".scales", _FLOATS, (groups, n), "Another group size for this layer?")
    if (config.get("checkpoint_format") or config.get("format") or "gptq") == "gptq":
        zeros = _whole(zeros.long() + ONES)
    zeros = nibbles(zeros)[:, :n].t().contiguous()
    codes = nibbles(codes.t().contiguous())
    order = part.group_order(".g_idx", k, group_size, "group_size")
    if order is not None:
        codes = codes[:, order]
    symmetric = bool((zeros == SYMMETRIC_ZERO).all())
    weight = Int4Weight(
        pack(codes), scales.t().contiguous(), None if symmetric else zeros, k, group_size,
        "symmetric" if symmetric else "asymmetric", order=order,
    )  # fmt: skip
    return weight.check(part.where(".scales"))


def tensors(weights: dict[str, Int4Weight]) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a folder's layers by key, and its quantization_config. Written as version 1; as version 2 where a
    zero point is 0, which version 1 has no place for.

    Raises ValueError naming the layer for what GPTQ cannot hold: NF4, scales that float16 would round, sizes that are
    no multiple of 8, layers of several group sizes."""
    size = common_group_size(METHOD, weights)
    second = any(w.zeros is not None and bool((w.zeros == 0).any()) for w in weights.values())
    out, acted = {}, False
    for name, w in weights.items():
        n, k = w.shape
        fits(METHOD, name, w, k % 8 == 0 and n % 8 == 0, "sizes that are multiples of 8")
        groups = torch.arange(k, dtype=torch.int32) // w.group_size
        codes = w.unpacked()
        if w.order is not None:
            acted = True
            codes = torch.empty_like(codes).index_copy_(1, w.order, codes)
            groups = torch.empty_like(groups).index_copy_(0, w.order, groups)
        zeros = torch.full_like(w.scales, SYMMETRIC_ZERO, dtype=torch.uint8) if w.zeros is None else w.zeros
        zeros = words(zeros.t().contiguous())
        out |= {
            f"{name}.qweight": words(codes).t().contiguous(),
            f"{name}.qzeros": zeros if second else _whole(zeros.long() - ONES),
            f"{name}.scales": half(METHOD, name, w.scales).t().contiguous(),
            f"{name}.g_idx": groups,
        }
    config = {
        "quant_method": METHOD, "bits": 4, "group_size": size, "desc_act": acted, "lm_head": False,
        "sym": all(w.scheme == "symmetric" for w in weights.values()),
        "checkpoint_format": "gptq_v2" if second else "gptq", "pack_dtype": "int32",
    }  # fmt: skip
    return out, config


# ---- what GPTQ and AWQ have in common --------------------------------------------------------------------------------


def common_group_size(method: str, weights: dict[str, Int4Weight]) -> int:
    """The group_size of a configuration that fits all layers; -1: one scale a row."""
    if all(w.scales.shape[1] == 1 for w in weights.values()):
        return -1
    size = max(w.group_size for w in weights.values() if w.scales.shape[1] > 1)
    for name, w in weights.items():
        fits(method, name, w, w.group_size == size or (w.scales.shape[1] == 1 and w.columns <= size),
             f"groups of {size} as in other layers, not {w.group_size},")  # fmt: skip
    return size


def fits(method: str, name: str, weight: Int4Weight, good: bool, what: str) -> None:
    if weight.scheme == "nf4":
        good, what = False, "symmetric or asymmetric codes, not nf4,"
    if not good:
        raise ValueError(f"[save {method}] {name}: expected {what} to fit the format. Save it as fastpost instead.")


def half(method: str, name: str, scales: torch.Tensor) -> torch.Tensor:
    """Scales as float16, exactly."""
    out = scales.half()
    if not torch.equal(out.float(), scales.float()):
        raise ValueError(
            f"[save {method}] {name}: expected scales that float16 holds exactly, got {str(scales.dtype)[6:]} ones "
            "that it would round. Quantise with scales_dtype=torch.float16, or save it as fastpost."
        )
    return out


def _whole(wide: torch.Tensor) -> torch.Tensor:
    """int64 -> int32, modulo 2^32."""
    return ((wide + 2**31) % 2**32 - 2**31).to(torch.int32)
