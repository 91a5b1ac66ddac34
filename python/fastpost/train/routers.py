# SPDX-License-Identifier: Apache-2.0
"""The load-balancing loss of a mixture of experts, without which training lets a few experts take all tokens.

    L = E * sum_i f_i * P_i        (Switch Transformer, arXiv 2101.03961, equations 4 to 6)

with f_i the choices of expert i per token (they sum to k, the experts of a token) and P_i its mean probability: one
softmax over the router's logits. Both are means over the tokens of all layers together, as in transformers'
load_balancing_loss_func, the same for every model here. Perfect balance gives k. (JetMoE's authors have f sum to 1, so
their numbers are 1/k of these; and transformers records the router of JetMoE's attention twice, which is counted once
here.) A step minimises objective + weight * L; as in TRL the metric `loss` is that sum, and `aux_loss` is L.

All tokens count that the model computes, prompts too; there is no padding, and a shared prompt is there once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from fastpost.data import collate
from fastpost.hf.model import outputs

ATTACHED = "fastpost_routers"
"""Attribute of a model whose `forward` computes the loss: its Routers."""
EXPERTS = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts")
TOP_K = ("num_experts_per_tok", "moe_top_k", "top_k_experts")
WEIGHT = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")  # the last two are JetMoE's and DBRX's


class Routers(NamedTuple):
    """What config.json and model.router_aux_loss say."""

    experts: int
    top_k: int
    weight: float | None  # of the loss; 0 = off; None = transformers defines no such loss for this model

    def line(self) -> str:
        aux = {None: "no aux loss (the model defines none)", 0.0: "aux loss off"}
        weighted = f"aux loss {self.weight} x load balance"
        return f"router  {self.experts} experts, top {self.top_k}, {aux.get(self.weight, weighted)}"


def load_balance(router_logits: Sequence[torch.Tensor], top_k: int) -> torch.Tensor:
    """E * sum f_i P_i, a float32 scalar, of the logits [T, E] of every layer's router. Differentiable through P.

    f * P is no mean over tokens: the mean over parts exceeds the loss of the whole by E times the covariance of f and P
    between the parts. So the step's, a mean over micro-batches weighted by tokens, depends on how rows are split (the
    more tokens in each, the less), but not on how many there are as a sum would, nor on which rank computes which.
    """
    distinct = {id(logits): logits for logits in router_logits}.values()
    chosen, probability = 0.0, 0.0
    for logits in distinct:
        p = logits.float().softmax(-1)
        chosen = chosen + torch.zeros_like(p).scatter_(1, p.topk(top_k, -1).indices, 1.0).sum(0)
        probability = probability + p.sum(0)
    rows = sum(map(len, distinct))
    return len(chosen) * (chosen / rows * (probability / rows)).sum()


def of(config, setting: float | None) -> Routers | None:
    """The routers of a model with this transformers config; None for a dense one. `setting`: model.router_aux_loss.

    Raises ValueError for a `setting` above 0 where there is no such loss."""
    text = config.get_text_config()
    places = [text, getattr(text, "ffn_config", None)]  # DBRX has them one level down
    experts, top_k, weight = (
        next((v for place in places for name in names if (v := getattr(place, name, None)) is not None), None)
        for names in (EXPERTS, TOP_K, WEIGHT)
    )
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not top_k or not experts or experts == 1:
        if setting:
            raise _refused(setting, kind, "a mixture of experts", "it has no routers")
        return None
    if not hasattr(sys.modules[kind.__module__], "load_balancing_loss_func"):
        if setting:
            raise _refused(setting, kind, "a model with a load-balancing loss", "transformers defines none for it")
        return Routers(experts, top_k, None)
    return Routers(experts, top_k, float((weight or 0) if setting is None else setting))


def of_folder(path: Path, setting: float | None) -> Routers | None:
    """`of` a Hugging Face folder; no weight is read."""
    return of(AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False), setting)


@torch.no_grad()
def attach(model: torch.nn.Module, setting: float | None) -> None:
    """Make `forward` compute the loss on `model`, unless it is dense or the loss is off.

    Raises ValueError when the model does not return the logits of its routers: some versions of transformers return
    probabilities under that name for some models, and a second softmax would flatten them to nearly no loss."""
    routers = of(model.config, setting)
    if routers is None or not routers.weight:
        return
    ids = [(7 * i + 3) % model.get_output_embeddings().weight.shape[0] for i in range(16)]
    batch = collate.collate([collate.Example(0, (collate.Sequence(ids, bytes(15) + b"\1"),))])
    try:
        found = outputs(model, batch.to(next(model.parameters()).device), output_router_logits=True).router_logits
    except (AttributeError, TypeError):
        found = ()
    if not found or any(x.shape != (16, routers.experts) for x in found):
        got = ", ".join({str(list(x.shape)) for x in found}) or "none"
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


def share(model: torch.nn.Module, values: dict[str, float]) -> float:
    """What the routers' loss adds to a step's loss: weight * aux_loss."""
    routers = on(model)
    return routers.weight * values["aux_loss"] if routers else 0.0


def _refused(setting: float, kind: type, expected: str, got: str) -> ValueError:
    return ValueError(
        f"[train] model.router_aux_loss: expected {expected} to balance with weight {setting}, got "
        f"{kind.__name__}: {got}. Leave it out, or set it to 0."
    )
