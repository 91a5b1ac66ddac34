# SPDX-License-Identifier: Apache-2.0
"""AWQ folders (AutoAWQ, llm-compressor's export to it), "gemm" packing: to and from Int4Weight, bit for bit.

A layer [N, K] with G groups is qweight int32 [K, N/8], qzeros int32 [G, N/8] and scales float16 [G, N]; the eight
neighbours in N of a word lie in the order 0 2 4 6 1 3 5 7, from the lowest bits. w = scale * (code - zero).
"""

from __future__ import annotations

import torch

from fastpost.hf.int4_gptq import OTHER_BITS, common_group_size, fits, half
from fastpost.hf.int4_tensors import Part, nibbles, words
from fastpost.int4 import SYMMETRIC_ZERO, Int4Weight, check_group_size, pack

METHOD = "awq"
ANCHOR = ".qweight"
SUFFIXES = (".qweight", ".qzeros", ".scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check(config: dict, where: str) -> None:
    """Raise ValueError for a quantization_config whose layers are not read."""
    version = str(config.get("version") or config.get("format") or config.get("checkpoint_format") or "gemm").lower()
    bits = config.get("bits", config.get("w_bit", 4))
    for field, good, wanted, got in (("bits", bits == 4, "4", bits), ("version", version == "gemm", "gemm", version)):
        if not good:
            raise ValueError(f"{where}: {field}: expected {wanted}, got {got!r}. Quantise the model again that way.")


def read(part: Part, config: dict) -> Int4Weight:
    """The weight of one layer. ValueError naming the tensor for what is no whole four-bit layer."""
    n, k = part.shape
    size = config.get("group_size", config.get("q_group_size", 128))
    try:
        group_size = check_group_size("awq", size, k)
    except ValueError:
        raise ValueError(
            f"{part.where('.scales')}: expected groups of 32, 64, 128, ... columns, got group_size {size!r}. Quantise "
            "the model again that way."
        ) from None
    groups, wide = -(-k // group_size), n // 8 if n % 8 == 0 else None
    codes = part.get(".qweight", torch.int32, None if wide is None else (k, wide), OTHER_BITS)
    scales = part.get(".scales", _FLOATS, (groups, n), "Another group size for this layer?")
    symmetric, zeros = not part.has(".qzeros"), None
    if not symmetric:
        zeros = part.get(".qzeros", torch.int32, (groups, codes.shape[1]), "Another group size for this layer?")
        zeros = nibbles(zeros, ORDER)[:, :n].t().contiguous()
        symmetric = bool((zeros == SYMMETRIC_ZERO).all())
    codes = nibbles(codes, ORDER)[:, :n].t().contiguous()
    weight = Int4Weight(
        pack(codes), scales.t().contiguous(), None if symmetric else zeros, k, group_size,
        "symmetric" if symmetric else "asymmetric",
    )  # fmt: skip
    return weight.check(part.where(".scales"))


def tensors(weights: dict[str, Int4Weight]) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a folder's layers by key, and its quantization_config.

    Raises ValueError naming the layer for what AWQ cannot hold: NF4, act-order, scales that float16 would round, sizes
    that are no multiple of 8 or of the group, layers of several group sizes."""
    size, out = common_group_size(METHOD, weights), {}
    for name, w in weights.items():
        n, k = w.shape
        fits(METHOD, name, w, w.order is None, "columns in their own order, not by act-order,")
        fits(METHOD, name, w, n % 8 == 0 and (size == -1 or k % size == 0), f"[N, K] of whole words and groups, "
             f"not {[n, k]},")  # fmt: skip
        zeros = torch.full_like(w.scales, SYMMETRIC_ZERO, dtype=torch.uint8) if w.zeros is None else w.zeros
        out |= {
            f"{name}.qweight": words(w.unpacked().t().contiguous(), ORDER),
            f"{name}.qzeros": words(zeros.t().contiguous(), ORDER),
            f"{name}.scales": half(METHOD, name, w.scales).t().contiguous(),
        }
    config = {"quant_method": METHOD, "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    return out, config
