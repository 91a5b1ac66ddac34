# SPDX-License-Identifier: Apache-2.0
"""Folders as other libraries write them, from their published layouts, with shifts and sums; and what they compute.

Each writer takes a tiny model's folder and returns {layer: W}, the dequantised weights by the arithmetic that the
library itself uses, in its dtype."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tiny

LAYERS = [f"model.layers.{i}.{n}" for i in range(2) for n in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj")]  # fmt: skip
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def plain(path: Path, **options) -> Path:
    return tiny.folder(path, tie=False, **SIZES | options)


def shifted(values: torch.Tensor, dim: int, order=range(8)) -> torch.Tensor:
    """Eight neighbours of dimension `dim` in an int32: value order[i] of the eight at bits 4 i."""
    values = values.long().movedim(dim, -1)
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % 8)).unflatten(-1, (-1, 8))
    word = sum(values[..., o] << 4 * i for i, o in enumerate(order))
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32).movedim(-1, dim).contiguous()


def drawn(n, k, groups, seed, sym):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=g)
    zeros = torch.full((n, groups), 8) if sym else torch.randint(1, 16, (n, groups), generator=g)
    scales = (torch.rand(n, groups, generator=g) * 0.05 + 0.01).half()
    return codes, zeros, scales


def rewrite(path: Path, make, config: dict, shards: int = 1) -> dict[str, torch.Tensor]:
    """Replace each layer's weight by the tensors that make(name, n, k, index) gives with it."""
    tensors, wanted = load_file(path / "model.safetensors"), {}
    for index, name in enumerate(LAYERS):
        n, k = tensors.pop(f"{name}.weight").shape
        new, wanted[name] = make(name, n, k, index)
        tensors |= {f"{name}.{key}": value for key, value in new.items()}
    (path / "model.safetensors").unlink()
    keys = sorted(tensors)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        names = {key: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(keys)}
        for file in set(names.values()):
            save_file({k: tensors[k] for k in keys if names[k] == file}, path / file, metadata={"format": "pt"})
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    tree = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(tree | {"quantization_config": config}))
    return wanted


def gptq(path: Path, *, group_size=32, sym=True, version=1, desc_act=False, shards=1, zero_points=None):
    def make(name, n, k, index):
        size = k if group_size == -1 else group_size
        codes, zeros, scales = drawn(n, k, -(-k // size), index, sym)
        zeros = zeros if zero_points is None else torch.full_like(zeros, zero_points)
        group = torch.arange(k) // size
        if desc_act:
            group = group[torch.randperm(k, generator=torch.Generator().manual_seed(index))]
        stored = shifted(zeros.t(), 1)
        if version == 1:  # whole words, so that a zero point of 0 borrows from its neighbour
            stored = (stored.long() - 0x11111111 + 2**31) % 2**32 - 2**31
        tensors = {
            "qweight": shifted(codes.t(), 0), "qzeros": stored.to(torch.int32), "scales": scales.t().contiguous(),
            "g_idx": group.to(torch.int32),
        }  # fmt: skip
        return tensors, scales[:, group] * (codes - zeros[:, group]).half()

    config = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": sym, "desc_act": desc_act,
              "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "lm_head": False}  # fmt: skip
    return rewrite(path, make, config, shards)


def awq(path: Path, *, group_size=32, sym=False):
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def make(name, n, k, index):
        codes, zeros, scales = drawn(n, k, k // group_size, index, sym)
        tensors = {"qweight": shifted(codes.t(), 1, order), "qzeros": shifted(zeros.t(), 1, order),
                   "scales": scales.t().contiguous()}  # fmt: skip
        group = torch.arange(k) // group_size
        return tensors, (codes - zeros[:, group]) * scales[:, group]

    return rewrite(path, make, {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True,
                                "version": "gemm", "modules_to_not_convert": None})  # fmt: skip


def compressed(path: Path, *, strategy="group", group_size=32, sym=True, dtype=torch.bfloat16, actorder=False,
               unpacked_zeros=False):  # fmt: skip
    def make(name, n, k, index):
        size = group_size if strategy == "group" else k
        codes, zeros, scales = drawn(n, k, k // size, index, sym)
        scales, group = scales.to(dtype), torch.arange(k) // size
        if actorder:
            group = group[torch.randperm(k, generator=torch.Generator().manual_seed(index))]
        tensors = {"weight_packed": shifted(codes, 1), "weight_scale": scales, "weight_shape": torch.tensor([n, k])}
        if not sym:
            tensors["weight_zero_point"] = (zeros - 8).to(torch.int8) if unpacked_zeros else shifted(zeros, 0)
        if actorder:
            tensors["weight_g_idx"] = group.to(torch.int32)
        values = (codes - 8).to(dtype) - (zeros - 8).to(dtype)[:, group]
        return tensors, values * scales[:, group]

    weights = {"num_bits": 4, "type": "int", "symmetric": sym, "strategy": strategy,
               "group_size": group_size if strategy == "group" else None}  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return rewrite(path, make, {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
                                "quantization_status": "compressed", "config_groups": {"group_0": group}})  # fmt: skip


def bitsandbytes(path: Path, *, nested=False, block=32, storage=torch.uint8, dtype=torch.bfloat16, kind="nf4"):
    """With the library itself, from random weights; needs it."""
    import bitsandbytes.functional as bnb

    def make(name, n, k, index):
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(index)).to(dtype)
        packed, state = bnb.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind,
                                          quant_storage=storage)  # fmt: skip
        tensors = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        return tensors | {"weight": packed}, bnb.dequantize_4bit(packed, state)

    return rewrite(path, make, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
                                "bnb_4bit_use_double_quant": nested})  # fmt: skip
