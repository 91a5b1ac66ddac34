# SPDX-License-Identifier: Apache-2.0
"""How ranks hold the model: a whole copy each (ddp), or a part of every tensor each (fsdp, torch's FSDP2).

ddp: nothing is wrapped. Gradients are summed in float32 and added up over ranks once per optimizer step (gradients.py).
fsdp: `fully_shard` on each transformer layer and on the whole. A layer's weights are gathered when it runs, forward
and backward, and its gradients are summed over ranks in float32 after each micro-batch. Weights are gathered in the
dtype that they compute in: with precision bf16 the shards are the bf16 weights and AdamW keeps what float32 has more
beside them, so a step costs the same bytes a weight as in one process, divided by the number of ranks.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from fastpost.hf import lora

from . import forward
from .distributed import Ranks

REPLICA_BYTES = 16e9
"""parallel = auto copies the model up to this size, with 16 bytes a trained weight (bf16 weight, remainder, two float32
moments, float32 gradient) and the stored ones of a frozen weight; above it is sharded."""


def choose(parallel: str, model: torch.nn.Module, ranks: Ranks) -> str:
    """auto | ddp | fsdp -> alone | ddp | fsdp."""
    if ranks.size == 1:
        return "alone"
    if parallel != "auto":
        return parallel
    copy = sum(p.numel() * (16 if p.requires_grad else p.element_size()) for p in model.parameters())
    return "ddp" if copy <= REPLICA_BYTES else "fsdp"


def place(model: torch.nn.Module, device: torch.device, parallel: str, ranks: Ranks) -> torch.nn.Module:
    """`model` (on the CPU) where this rank computes with it. Sets ranks.sharded."""
    ranks.sharded = choose(parallel, model, ranks) == "fsdp"
    return shard(model, device, ranks) if ranks.sharded else model.to(device)


def shard(model: torch.nn.Module, device: torch.device, ranks: Ranks) -> torch.nn.Module:
    """Cut the parameters of `model`, a causal LM of transformers or peft's wrapper of one, over all ranks, in place.

    They become DTensors, Shard(0). They are moved to the device layer by layer, so a GPU never holds the whole.
    `forward` then runs through FSDP's hooks. Raises ValueError for a model that does not name its layers."""
    inner = lora.inner(model)
    kinds = set(getattr(inner, "_no_split_modules", None) or ())
    layers = [m for m in inner.modules() if type(m).__name__ in kinds]
    if not layers:
        raise ValueError(
            f"[train] train.parallel: {type(inner).__name__} does not say which of its modules are layers, so it "
            "cannot be sharded. Use ddp."
        )
    options = {
        "mesh": init_device_mesh(device.type, (ranks.size,)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    for layer in layers:
        fully_shard(layer, **options)
    if head := _separate_head(model):
        fully_shard(head, **options)
    # What is left (embedding, norms, a tied head) stays gathered from forward to backward.
    fully_shard(model, **options, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the global count already
            module.set_force_sum_reduction_for_comms(True)  # an exact sum, and gloo has no other
    if hasattr(model, "set_reduce_scatter_unused_params"):  # newer torch: an expert that one rank did not use is zero
        model.set_reduce_scatter_unused_params(True)
    setattr(model, forward.SHARDED, MethodType(forward.compute, model))
    register_fsdp_forward_method(model, forward.SHARDED)
    register_fsdp_forward_method(model, "generate")
    return model


def _separate_head(model: torch.nn.Module) -> torch.nn.Linear | None:
    """The head, if fastpost.parallel.fsdp_head_logprob can use its shards as they are: a linear layer alone."""
    layer = model.get_output_embeddings()
    tied = layer is None or layer.weight is model.get_input_embeddings().weight
    return layer if type(layer) is torch.nn.Linear and layer.bias is None and not tied else None
