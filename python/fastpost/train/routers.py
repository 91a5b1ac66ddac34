# SPDX-License-Identifier: Apache-2.0
"""The losses of a mixture of experts' routers: load balance, without which training lets a few experts take all tokens,
and z, which keeps logits small.

    load balance   L = E * sum_i f_i * P_i        (Switch Transformer, arXiv 2101.03961, equations 4 to 6)
    z              Z = mean logsumexp(logits)^2   (ST-MoE, arXiv 2202.08906, equation 5)

with f_i the choices of expert i per token and P_i its mean probability: one softmax over the router's logits. There are
two conventions (model.router_loss):

    transformers   f, P and Z are means over the tokens of all layers together, and f sums to k, the experts of a token:
                   transformers' load_balancing_loss_func, the same for every model here. Perfect balance gives k.
    jetmoe         f sums to 1 as P does, and L and Z are summed over routers, those of attention and those of MLPs in
                   every layer: JetMoE's code, with the paper's weights .01 and .001 (arXiv 2404.07413; the code's are
                   .01 and .1 * .01). Perfect balance gives the number of routers.

transformers records the router of JetMoE's attention twice (as an output of the attention, and of the router itself)
and that of its MLP once; each is counted once here. A step minimises objective + weight * L + z_weight * Z; as in TRL
the metric `loss` is that sum; `aux_loss` is L and `z_loss` is Z. `router/load_max` and `router/load_min` are the load
of the busiest and of the idlest expert of any router over the whole step, 1 being an even share (load_max - 1 is known
as MaxVio).

All tokens count that the model computes, prompts too; there is no padding, and a shared prompt is there once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

import fastpost
from fastpost.data import collate
from fastpost.hf.model import outputs

ATTACHED = "fastpost_routers"
"""Attribute of a model whose `forward` computes the loss: its Routers."""
EXPERTS = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts")
TOP_K = ("num_experts_per_tok", "moe_top_k", "top_k_experts")
WEIGHT = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")  # the last two are JetMoE's and DBRX's


class Routers(NamedTuple):
    """What config.json, model.router_aux_loss, model.router_z_loss and model.router_loss say."""

    experts: int
    top_k: int
    weight: float | None  # of the load balance; 0 = off; None = transformers defines no such loss for this model
    z_weight: float = 0.0
    convention: str = "transformers"

    def line(self) -> str:
        aux = {None: "no aux loss (the model defines none)", 0.0: "aux loss off"}
        weighted = f"aux loss {self.weight} x load balance"
        z = f", z loss {self.z_weight} x logsumexp^2" if self.z_weight else ""
        summed = ", summed over routers" if self.convention == "jetmoe" and (self.weight or self.z_weight) else ""
        return f"router  {self.experts} experts, top {self.top_k}, {aux.get(self.weight, weighted)}{z}{summed}"


class Losses(NamedTuple):
    """Of the routers of one micro-batch, without weights."""

    load_balance: torch.Tensor  # [] float32
    z: torch.Tensor  # [] float32
    chosen: torch.Tensor  # [routers, E] int32: how many tokens went to each expert


def losses(router_logits: Sequence[torch.Tensor], top_k: int, convention: str = "transformers") -> Losses:
    """Of the logits [T, E] of every layer's routers; differentiable.

    f * P is no mean over tokens: the mean over parts exceeds the loss of the whole by E times the covariance of f and P
    between the parts. So the step's, a mean over micro-batches weighted by tokens, depends on how rows are split (the
    more tokens in each, the less), but not on how many there are as a sum would, nor on which rank computes which. Z is
    a mean over tokens, so it does not depend on the split at all.
    """
    distinct = list({id(logits): logits for logits in router_logits}.values())
    # The loss is NaN anyway where logits are, and says which rows did it; the op would say only that there is a NaN.
    finite = (x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) for x in distinct)
    routed = [fastpost.moe_route(x, top_k) for x in finite]
    chosen = torch.stack([r.plan.offset.diff() for r in routed])
    if convention == "jetmoe":
        return Losses(sum(r.load_balance for r in routed), sum(r.z for r in routed), chosen)
    rows = [len(x) / sum(map(len, distinct)) for x in distinct]
    f = chosen.sum(0) / sum(map(len, distinct))
    p = sum(share * r.probability for share, r in zip(rows, routed, strict=True))
    z = sum(share * r.z for share, r in zip(rows, routed, strict=True))
    return Losses(len(f) * (f * p).sum(), z, chosen)


def of(config, setting: float | None, z: float = 0.0, convention: str = "transformers") -> Routers | None:
    """The routers of a model with this transformers config; None for a dense one. `setting`, `z`, `convention`:
    model.router_aux_loss, router_z_loss and router_loss.

    Raises ValueError where one of them is set and there is no such loss."""
    text = config.get_text_config()
    places = [text, getattr(text, "ffn_config", None)]  # DBRX has them one level down
    experts, top_k, weight = (
        next((v for place in places for name in names if (v := getattr(place, name, None)) is not None), None)
        for names in (EXPERTS, TOP_K, WEIGHT)
    )
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not top_k or not experts or experts == 1:
        _refuse(setting, z, convention, kind, "a mixture of experts", "it has no routers")
        return None
    if not hasattr(sys.modules[kind.__module__], "load_balancing_loss_func"):
        what = "a model with a load-balancing loss"
        _refuse(setting, z, convention, kind, what, "transformers defines none for it")
        return Routers(experts, top_k, None)
    return Routers(experts, top_k, float((weight or 0) if setting is None else setting), z, convention)


def asked(cfg) -> tuple[float | None, float, str]:
    """The three settings of a ModelConfig, as `of`, `of_folder` and `attach` take them."""
    return cfg.router_aux_loss, cfg.router_z_loss, cfg.router_loss


def of_folder(path: Path, setting: float | None, z: float = 0.0, convention: str = "transformers") -> Routers | None:
    """`of` a Hugging Face folder; no weight is read."""
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return of(config, setting, z, convention)


@torch.no_grad()
def attach(model: torch.nn.Module, setting: float | None, z: float = 0.0, convention: str = "transformers") -> None:
    """Make `forward` compute the losses on `model`, unless it is dense or both are off.

    Raises ValueError when the model does not return the logits of its routers: some versions of transformers return
    probabilities under that name for some models, and a second softmax would flatten them to nearly no loss."""
    routers = of(model.config, setting, z, convention)
    if routers is None or not (routers.weight or routers.z_weight):
        return
    ids = [(7 * i + 3) % model.get_output_embeddings().weight.shape[0] for i in range(16)]
    batch = collate.collate([collate.Example(0, (collate.Sequence(ids, bytes(15) + b"\1"),))])
    try:
        found = outputs(model, batch.to(next(model.parameters()).device), output_router_logits=True).router_logits
    except (AttributeError, TypeError):
        found = ()
    distinct, config = len({id(x) for x in found or ()}), model.config.get_text_config()
    expected = 2 * config.num_hidden_layers if config.model_type == "jetmoe" else distinct
    if not found or any(x.shape != (16, routers.experts) for x in found):
        got = ", ".join({str(list(x.shape)) for x in found or ()}) or "none"
    elif distinct != expected:
        got = f"those of {distinct} routers, not of the {expected} in attention and MLPs"
    elif all(((x >= 0).all() and ((x.float().sum(-1) - 1).abs() < 2e-2).all()) for x in found):
        got = "probabilities, on which a second softmax would be wrong"
    else:
        setattr(model, ATTACHED, routers)
        return
    raise ValueError(
        f"[train] model.router_aux_loss: expected logits [tokens, {routers.experts}] of each router of "
        f"{type(model).__name__}, got {got}. Take another version of transformers, or set it to 0 to train without."
    )


def on(model: torch.nn.Module) -> Routers | None:
    """What `attach` has put on the model; None where no loss is to be computed."""
    return getattr(model, ATTACHED, None)


def weighted(routers: Routers, aux_loss, z_loss):
    """What the routers add to a loss; of tensors or of numbers."""
    return (routers.weight or 0.0) * aux_loss + routers.z_weight * z_loss


def share(model: torch.nn.Module, values: dict[str, float]) -> float:
    """What the routers' losses add to a step's loss, from its metrics."""
    routers = on(model)
    return weighted(routers, values["aux_loss"], values["z_loss"]) if routers else 0.0


def _refuse(setting: float | None, z: float, convention: str, kind: type, expected: str, got: str) -> None:
    """Raise ValueError for the first of the settings that asks for something."""
    for name, value, off in (("aux_loss", setting, "0"), ("z_loss", z, "0"), ("loss", convention, "transformers")):
        if value and value != "transformers":
            what = f"to balance with weight {value}" if name == "aux_loss" else f"for {value}"
            raise ValueError(
                f"[train] model.router_{name}: expected {expected} {what}, got {kind.__name__}: {got}. Leave it out, "
                f"or set it to {off}."
            )
