# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing through the model's own method: what the backward pass computes again instead of keeping."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


def recompute(model: torch.nn.Module, how: str, device: torch.device) -> None:
    """Switch on "none", "selective", "full" or "auto" (selective on a CPU, none elsewhere and where transformers cannot
    do it with the model). Raises ValueError for what it cannot do.

    selective keeps the results of matrix products and attention and recomputes the cheap rest (norms, rotations,
    activations, products), which is two thirds of what autograd would keep. Results are the same bits either way.
    """
    able = getattr(model, "supports_gradient_checkpointing", True)
    if how == "auto":
        how = "selective" if device.type == "cpu" and able else "none"
    if how == "none":
        return
    if not able:
        raise ValueError(
            f"[train] train.gradient_checkpointing: expected auto or none, because transformers cannot recompute "
            f"{type(model).__name__}, got {how}. Lower train.max_tokens_per_micro_batch to save memory."
        )
    options = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    if hasattr(model, "activation_checkpointing_enable"):  # its new name in transformers
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


_KEPT = ("int4_gemm", "mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_grouped_mm")


def _policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    name = op.overloadpacket.__name__
    keep = name in _KEPT or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
