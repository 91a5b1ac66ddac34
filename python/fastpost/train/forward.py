# SPDX-License-Identifier: Apache-2.0
"""Model + objective on one packed batch. Training, evaluation and the reference pass all go through here, by the same
kernels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

import fastpost
from fastpost.data.collate import IGNORE, Batch
from fastpost.hf import adapter, folder, lora
from fastpost.hf.int4_lora import BaseFormat
from fastpost.hf.model import head, outputs, verify
from fastpost.ops.preference_loss import schedule_of
from fastpost.parallel import fsdp_head_logprob

from . import routers
from .config import Config, ModelConfig
from .freezing import freeze
from .optim import COMPUTE_DTYPE
from .recompute import recompute

SHARDED = "fastpost_forward"
"""Attribute of a model that sharding.py has cut over ranks: `compute` with FSDP's gathering around it."""


class Output(NamedTuple):
    """fastpost.PreferenceOutput (P: pairs, or sequences for objectives without; S: sequences), all float32 but length,
    and the losses of the routers, without their weights: None where none is wanted."""

    loss: torch.Tensor  # []
    losses: torch.Tensor  # [P]
    logprob: torch.Tensor  # [S]
    rewards: torch.Tensor  # [S]
    length: torch.Tensor  # [S] int32
    aux_loss: torch.Tensor | None  # []
    z_loss: torch.Tensor | None  # []
    chosen: torch.Tensor | None  # [routers, experts] int32: tokens of each expert


def forward(model: torch.nn.Module, batch: Batch, objective, temperature: float = 1.0) -> Output:
    """The objective on `batch`. Log-probs are those of logits / temperature. Of a sharded model every rank must call
    it."""
    sharded = getattr(model, SHARDED, None)
    if sharded is None:
        return compute(model, batch, objective, temperature)
    output = sharded(batch, objective, temperature)
    if not torch.is_grad_enabled():  # no backward pass will let go of what was gathered, and it would be stale later
        model.reshard()
    return output


def compute(model: torch.nn.Module, batch: Batch, objective, temperature: float = 1.0) -> Output:
    h, balance = head(model), routers.on(model)
    out = outputs(model, batch, **({"output_router_logits": True} if balance else {}))
    hidden = out.last_hidden_state[0]
    routed = routers.losses(out.router_logits, balance.top_k, balance.convention) if balance else (None, None, None)
    columns = {name: getattr(batch, name) for name in ("reference_logprob", "previous_logprob", "reward", "kl")}
    options = {"temperature": h.temperature * temperature, "softcap": h.softcap}
    if isinstance(h.weight, DTensor):
        logprob = fsdp_head_logprob(hidden, h.weight, batch.target, gradient="sum", **options)
        scored = fastpost.preference_loss_from_logprob(logprob, batch.target, batch.cu_scored, objective, **columns)
        return Output(*scored, *routed)
    scored = fastpost.preference_loss(
        hidden,
        h.weight,
        batch.target,
        batch.cu_scored,
        objective,
        bias=h.bias,
        low_rank=h.low_rank(hidden),
        **columns,
        **options,
    )
    return Output(*scored, *routed)


def schedule(model: torch.nn.Module, batch: Batch, objective):
    """How the head of `forward` computes this batch: fastpost.ops.preference_loss's Schedule."""
    h = head(model)
    hidden = h.weight.new_empty(batch.tokens, h.weight.shape[1]).requires_grad_()
    low_rank = h.low_rank(hidden[:0])  # no rows: only the rank counts, and dropout must draw nothing
    options = {"bias": h.bias, "low_rank": low_rank, "softcap": h.softcap}
    return schedule_of(hidden, h.weight, batch.target, batch.cu_scored, objective, **options)


def lengths(batch: Batch) -> torch.Tensor:
    """Scored tokens of each sequence (or of each of its parts), int64 [S]; known before any forward."""
    scored = (batch.target != IGNORE).cumsum(0)
    ends = torch.cat([scored.new_zeros(1), scored])[batch.cu_scored.long()]
    return ends.diff()


def load_policy(cfg: Config, device: torch.device, *, move: bool = True) -> torch.nn.Module:
    """The model to train, in the precision its optimizer should start from: float32 if the files hold more than bf16
    does and more than an adapter is trained. With an adapter, a new one or one that goes on, only that requires
    gradients. It is set up for `device`; move=False leaves it on the CPU for now."""
    start, compute = start_of(cfg.model), COMPUTE_DTYPE[cfg.optim.precision]
    dtype = torch.float32 if has_masters(cfg) else compute
    base = base_format(cfg.model)
    model = start_model(cfg, dtype)
    if done := base.apply(model, device if device.type == "cuda" else None):
        print(f"base   {base.scheme}, groups of {base.group_size}: {done.line()}", flush=True)
    if start.adapter:
        model = adapter.continued(model, start.adapter).eval()
    elif cfg.model.lora.rank:
        model = adapter.fresh(model, **vars(cfg.model.lora)).eval()
    if cfg.optim.precision == "pure-bf16":
        adapter.narrow(model, compute)
    for name, p in model.named_parameters():
        if not math.isfinite(p.detach().sum(dtype=torch.float32)):
            raise ValueError(
                f"[train] {cfg.model.path}: expected finite weights, but {name} holds NaN or infinity. Fetch the "
                "folder again."
            )
    verify(model)
    routers.attach(model, *routers.asked(cfg.model))
    freeze(model, cfg.model.train, cfg.model.freeze)
    recompute(lora.inner(model), cfg.train.gradient_checkpointing, device)
    return model.to(device) if move else model


def start_model(cfg: Config, dtype: torch.dtype) -> torch.nn.Module:
    """The model that training starts from, without an adapter: of the folder's weights, or drawn at random."""
    base = start_of(cfg.model).base
    if cfg.model.from_scratch:
        return folder.new_model(base, dtype, cfg.model.attention, seed=cfg.train.seed)
    return folder.load_model(base, dtype, cfg.model.attention, check=False)


def base_format(cfg: ModelConfig) -> BaseFormat:
    """How the base model is quantised when it is loaded: as model.quantize says, or as it was under the adapter that
    goes on training. Raises ValueError where these differ, where the folder is in four bits already, and where no
    adapter is trained: codes are not."""
    start, base = start_of(cfg), BaseFormat(**vars(cfg.quantize))
    if base.scheme == "none":
        base = BaseFormat()
    if start.adapter and (before := adapter.base_format(start.adapter)) != base:
        if base.scheme != "none":
            raise ValueError(
                f"[train] model.quantize: expected {before}, with which the adapter {start.adapter} was trained, got "
                f"{base}. Leave it out: the adapter's own is taken."
            )
        base = before
    four_bit = folder.is_quantized(start.base)
    if four_bit and base.scheme != "none":
        raise ValueError(
            f"[train] model.quantize.scheme: expected none, because {start.base} is in four bits already, got "
            f"{base.scheme}. Leave it out, or take the original model."
        )
    if (four_bit or base.scheme != "none") and not (start.adapter or cfg.lora.rank):
        raise ValueError(
            "[train] model.quantize: expected an adapter upon a base model in four bits, whose codes are not trained, "
            "got none. Set model.lora.rank."
        )
    return base


def has_masters(cfg: Config) -> bool:
    """Whether bf16 training keeps float32 masters of weights that the model came with, so must load them as float32."""
    if cfg.optim.precision != "bf16":
        return False
    if cfg.model.from_scratch:
        return True
    start, own = start_of(cfg.model), cfg.model.lora
    if start.adapter:  # what it trained whole is float32 in its file; the rest is frozen
        return bool(adapter.read_config(start.adapter).get("modules_to_save"))
    whole = not own.rank or own.train_embeddings or own.train_head
    return whole and not folder.is_quantized(start.base) and wider_than_bf16(start.base)


def start_of(cfg: ModelConfig) -> folder.Place:
    """The folders that training starts from. Raises ValueError when settings name two adapters to train, and when
    model.from_scratch finds weights."""
    place = folder.locate(cfg.path)
    if cfg.from_scratch:
        folder.check_new(cfg.path if place.adapter else place.base)
    if cfg.adapter:
        if place.adapter is not None:
            raise ValueError(
                f"[train] model.adapter: expected nothing, because model.path ({cfg.path}) is an adapter already, got "
                f"{cfg.adapter}. Give one of them."
            )
        adapter.read_config(Path(cfg.adapter).expanduser())
        place = place._replace(adapter=Path(cfg.adapter).expanduser())
    if place.adapter is not None and cfg.lora.rank:
        raise ValueError(
            f"[train] model.lora.rank: expected 0, because the adapter {place.adapter} goes on training with its own "
            f"rank, got {cfg.lora.rank}. For a new adapter upon it, merge it first: fastpost export {place.adapter} "
            "OUT --merge."
        )
    return place


def wider_than_bf16(path: Path) -> bool:
    """Whether a model folder stores weights in a format with more mantissa than bf16 (float16, float32, float64)."""
    for file in folder.weight_files(path):
        if any(entry["dtype"] in ("F16", "F32", "F64") for entry in folder.header(file).values()):
            return True
    return False
