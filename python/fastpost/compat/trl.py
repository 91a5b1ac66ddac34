# SPDX-License-Identifier: Apache-2.0
"""TRL's fused head (trl 1.16) on fastpost's ops; it skips unscored rows on CPUs, too.

    from trl.trainer.utils import add_fused_lm_head          # before
    from fastpost.compat.trl import add_fused_lm_head        # after
    add_fused_lm_head(model); model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs

A TRL trainer is given the head after it has been made: `trainer = DPOTrainer(...)`, then
`add_fused_lm_head(trainer.model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))` (and trainer.ref_model),
then `trainer.train()`. Only that model instance's `forward` is set, which is how TRL does it; no class is changed.
"""

from __future__ import annotations

import functools
import types
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from fastpost.compat.logits import sum_of_logits
from fastpost.hf import lora
from fastpost.ops.linear_logprob import linear_logprob

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
OP = "fused_lm_head"
CHUNK = 32768  # columns of a tile, as in TRL
TILE = 1 << 24  # logits in a tile


class ChunkedLogProbFunction:
    """The call of trl.trainer.utils._ChunkedLogProbFunction; a namespace, not an autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probabilities of `targets` under softmax(z), z = softcap(logit_scale · logits) / temperature.

        Args:
            hidden: [N, D] float32, bfloat16 or float16.
            weight: [V, D], cast to the dtype of `hidden` if it has another; bias: [V] or None, likewise.
            targets: [N] int64 in [0, V); -100 gives 0 and no gradient (TRL leaves it undefined).
            temperature, final_logit_softcapping, logit_scale: above 0, or None for no softcap.
            chunk_size: columns of a tile, where "mean_logits" with a softcap or "is_top1" need one more pass over the
                vocabulary. Elsewhere memory is bounded by linear_logprob's own budget.
            outputs: which of "entropy" (differentiable), "log_sum_sq_probs", "mean_logits", "is_top1" to return. The
                last three have no gradient. log_sum_sq_probs costs one more forward, the tiled pass another one.

        Returns:
            (logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), each [N] float32 (is_top1 bool), None where not
            asked for. is_top1 is False where an earlier token has the same logit.

        Raises:
            ValueError: an unknown output, a scale or temperature not above 0, wrong shapes or dtypes.
        """
        return _fields(hidden, weight, bias, None, targets, temperature, chunk_size, final_logit_softcapping,
                       logit_scale, outputs)  # fmt: skip


def _fields(hidden, weight, bias, low_rank, targets, temperature, chunk, softcap, scale, outputs):
    unknown = set(outputs) - {*OPTIONAL_OUTPUTS, "log_probs"}
    if unknown:
        listed = ", ".join(("log_probs", *OPTIONAL_OUTPUTS))
        raise ValueError(f"[{OP}] outputs: expected some of {listed}, got {', '.join(sorted(unknown))}.")
    if not scale > 0 or not temperature > 0:
        raise ValueError(f"[{OP}] temperature, logit_scale: expected numbers above 0, got {temperature} and {scale}.")
    # c·tanh(s·x / c) / T is s / T times the softcap of x at c / s.
    softcap, temperature = softcap and softcap / scale, temperature / scale
    hidden, weight, bias, low_rank = _one_dtype(hidden, weight, bias, low_rank)
    targets = targets.contiguous()
    head = {"bias": bias, "low_rank": low_rank, "softcap": softcap}
    logprob = linear_logprob(
        hidden, weight, targets, temperature=temperature, return_entropy="entropy" in outputs, **head
    )
    logprob, entropy = logprob if "entropy" in outputs else (logprob, None)
    squares = mean = top1 = None
    scored = targets != -100
    with torch.no_grad():
        if "log_sum_sq_probs" in outputs:  # Σ p² = e^(lse(2z) - 2 lse(z)), and 2z is z at half the temperature
            squares = 2 * logprob - linear_logprob(hidden, weight, targets, temperature=temperature / 2, **head)
        if "is_top1" in outputs or ("mean_logits" in outputs and softcap):
            pair = low_rank and (low_rank[0][scored], low_rank[1])
            mean, first = _mean_and_argmax(hidden[scored], weight, bias, pair, softcap, chunk)
            mean, top1 = logprob.new_zeros(len(targets)).masked_scatter(scored, mean), scored.clone()
            top1[scored] = first == targets[scored]
        elif "mean_logits" in outputs:
            total = sum_of_logits(hidden, weight, bias) + (sum_of_logits(*low_rank) if low_rank else 0)
            mean = torch.where(scored, total / len(weight), 0)
    mean = mean / temperature if "mean_logits" in outputs else None
    return logprob, entropy, squares, mean, top1 if "is_top1" in outputs else None


def _one_dtype(hidden, weight, bias, low_rank):
    """Under autocast linear_logprob casts; otherwise, as in TRL, the head follows the hidden states."""
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    bias = None if bias is None else bias.to(dtype)
    return hidden.to(dtype), weight.to(dtype), bias, low_rank and tuple(t.to(dtype) for t in low_rank)


def _mean_and_argmax(hidden, weight, bias, low_rank, softcap, chunk):
    """Mean [N] of softcap(logits) and the first index [N] of the largest, a tile of logits at a time."""
    means, firsts, rows = [], [], max(1, TILE // chunk)
    for begin in range(0, max(1, len(hidden)), rows):
        x = hidden[begin : begin + rows]
        total, best = x.new_zeros(2, len(x), dtype=torch.float32)
        best, first = best - torch.inf, best.long()
        for start in range(0, len(weight), chunk):
            z = (x @ weight[start : start + chunk].T).float()
            if low_rank is not None:
                z += low_rank[0][begin : begin + rows] @ low_rank[1][start : start + chunk].T
            if bias is not None:
                z += bias[start : start + chunk].float()
            if softcap:
                z = softcap * torch.tanh(z / softcap)
            total += z.sum(-1)
            most, where = z.max(-1)  # the first of equals
            first = torch.where(most > best, where + start, first)
            best = torch.maximum(best, most)
        means.append(total / len(weight))
        firsts.append(first)
    return torch.cat(means), torch.cat(firsts)


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """What a model with a fused head returns for fused_lm_head=True; the fields of TRL's class in its order.

    Per-token fields are [B, T - 1] (or [B, T] with shift_labels), 0 where the label is -100, None when not asked for.
    loss: -Σ log_probs / num_items_in_batch (the number of labels when not given), plus router_aux_loss_coef · aux_loss.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def add_fused_lm_head(
    model: torch.nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """Make `model(..., labels=labels, fused_lm_head=True)` return a FusedCausalLMOutput without making the logits.

    labels [B, T] are shifted here; shift_labels [B, T] are taken as they are. Without fused_lm_head the forward is the
    model's own, so generation is unchanged. Add the head before PEFT wraps the model. A LoRA adapter on the head itself
    is computed and trained (TRL reads the weight and leaves it out).

    Args:
        model: a transformers causal language model; its `forward` is set on this instance.
        temperature: divides the logits, after the config's logit scale and softcap.
        cast_lm_head_to_fp32: run the head in float32 outside autocast (a copy of the weight if it has another dtype).
        outputs: fields beside log_probs; see ChunkedLogProbFunction for what they cost.

    Raises:
        ValueError, when called: an adapter on the head that is not plain LoRA, a head without a weight, a weight that
            another library has emptied (ZeRO-3), neither labels nor shift_labels.
    """
    original = model.forward
    config = model.config.get_text_config()
    softcap, scale = getattr(config, "final_logit_softcapping", None), _logit_scale(config)

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return original(*args, **kwargs, **{name: value for name, value in given.items() if value is not None})
        if labels is None and shift_labels is None:
            raise ValueError(f"[{OP}] labels: expected labels or shift_labels, got neither.")
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        # Looked up at each call: sharding and adapters replace parts of the model after this was set.
        backbone = self.base_model(*args, **kwargs | {"use_cache": False})
        hidden = backbone.last_hidden_state
        if shift_labels is None:
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        layer = self.get_output_embeddings()
        weight, bias = _weight_and_bias(layer)
        hidden, target = hidden.to(weight.device), shift_labels.to(weight.device)
        rows = hidden.flatten(0, 1)
        context = nullcontext()
        if cast_lm_head_to_fp32:
            rows, context = rows.float(), torch.autocast(rows.device.type, enabled=False)
        with context:
            pair = lora.low_rank(layer, lora.adapter(layer), rows)
            fields = _fields(rows, weight, bias, pair, target.flatten(), temperature, CHUNK, softcap, scale, outputs)
        log_probs, *others = (None if x is None else x.view(target.shape) for x in fields)
        mask = target != -100
        loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = _load_balancing_loss(config, backbone, kwargs.get("attention_mask"))
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss, log_probs, *others, mask, aux_loss)

    model.forward = types.MethodType(forward, model)


def _logit_scale(config) -> float:
    """What the model multiplies its logits by before the softcap, under the names that architectures give it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
    if scaling is None:
        return 1.0
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)


def _weight_and_bias(layer):
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if weight is None:
        raise ValueError(f"[{OP}] lm_head: expected a linear layer with a weight, got {type(layer).__name__}.")
    if type(weight).__name__ == "DTensor":  # FSDP2
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    if weight.ndim != 2:
        raise ValueError(
            f"[{OP}] lm_head: expected a weight [V, D], got {list(weight.shape)}. Sharding that empties parameters "
            "(DeepSpeed ZeRO-3) is not supported here: use FSDP2."
        )
    return weight, bias


def _load_balancing_loss(config, backbone, attention_mask):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(backbone.router_logits, experts, config.num_experts_per_tok, attention_mask)
