# SPDX-License-Identifier: Apache-2.0
"""Model + objective on one packed batch. Training, evaluation and the reference pass all go through here, by the same
kernels."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

import fastpost
from fastpost.data.collate import IGNORE, Batch
from fastpost.hf import folder
from fastpost.hf.model import backbone, head, verify
from fastpost.ops.preference_loss import schedule_of
from fastpost.parallel import fsdp_head_logprob

from .config import Config
from .optim import COMPUTE_DTYPE
from .recompute import recompute

SHARDED = "fastpost_forward"
"""Attribute of a model that sharding.py has cut over ranks: `compute` with FSDP's gathering around it."""


def forward(model: torch.nn.Module, batch: Batch, objective):
    """The objective's PreferenceOutput on `batch`: losses [P or S], logprob [S], rewards [S], length [S], all
    float32. Of a sharded model every rank must call it."""
    sharded = getattr(model, SHARDED, None)
    if sharded is None:
        return compute(model, batch, objective)
    output = sharded(batch, objective)
    if not torch.is_grad_enabled():  # no backward pass will let go of what was gathered, and it would be stale later
        model.reshard()
    return output


def compute(model: torch.nn.Module, batch: Batch, objective):
    h, hidden = head(model), backbone(model, batch)
    columns = {name: getattr(batch, name) for name in ("reference_logprob", "previous_logprob", "reward")}
    options = {"temperature": h.temperature, "softcap": h.softcap}
    if isinstance(h.weight, DTensor):
        logprob = fsdp_head_logprob(hidden, h.weight, batch.target, gradient="sum", **options)
        return fastpost.preference_loss_from_logprob(logprob, batch.target, batch.cu_seqlens, objective, **columns)
    return fastpost.preference_loss(
        hidden,
        h.weight,
        batch.target,
        batch.cu_seqlens,
        objective,
        bias=h.bias,
        low_rank=h.low_rank(hidden),
        **columns,
        **options,
    )


def schedule(model: torch.nn.Module, batch: Batch, objective):
    """How the head of `forward` computes this batch: fastpost.ops.preference_loss's Schedule."""
    h = head(model)
    hidden = h.weight.new_empty(batch.tokens, h.weight.shape[1]).requires_grad_()
    return schedule_of(hidden, h.weight, batch.target, batch.cu_seqlens, objective, softcap=h.softcap)


def lengths(batch: Batch) -> torch.Tensor:
    """Scored tokens of each sequence, int64 [S]; known before any forward."""
    scored = (batch.target != IGNORE).cumsum(0)
    ends = torch.cat([scored.new_zeros(1), scored])[batch.cu_seqlens.long()]
    return ends.diff()


def load_policy(cfg: Config, device: torch.device, *, move: bool = True) -> torch.nn.Module:
    """The model to train, in the precision its optimizer should start from: float32 if the files hold more than bf16
    does. It is set up for `device`; move=False leaves it on the CPU for now."""
    compute = COMPUTE_DTYPE[cfg.optim.precision]
    keep = cfg.optim.precision == "bf16" and wider_than_bf16(Path(cfg.model.path))
    model = folder.load_model(cfg.model.path, torch.float32 if keep else compute, cfg.model.attention, check=False)
    for name, p in model.named_parameters():
        if not math.isfinite(p.detach().sum(dtype=torch.float32)):
            raise ValueError(f"[train] {cfg.model.path}: {name} holds NaN or infinity. Fetch the folder again.")
    verify(model)
    recompute(model, cfg.train.gradient_checkpointing, device)
    return model.to(device) if move else model


def wider_than_bf16(path: Path) -> bool:
    """Whether a model folder stores weights in a format with more mantissa than bf16 (float16, float32, float64)."""
    for file in folder.weight_files(path):
        with safe_open(file, framework="pt") as stored:
            if any(stored.get_slice(key).get_dtype() in ("F16", "F32", "F64") for key in list(stored.keys())):
                return True
    return False
