# SPDX-License-Identifier: Apache-2.0
"""The two halves of a causal LM: backbone (tokens -> final hidden states) and head (what turns these into logits).

The logits themselves are never made: fastpost's ops take hidden states and head weight. `verify` checks, on seven
tokens, that the two halves put together are the model's own forward, and that packed sequences do not see each other; a
model with an extra step that is not understood here is refused instead of trained wrongly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from fastpost.data.collate import Batch, Example, Sequence, collate
from fastpost.hf import attention, lora


class Head(NamedTuple):
    """logits = softcap(hidden @ weight.T + a @ b.T + bias) / temperature with (a, b) = low_rank(hidden), the arguments
    of fastpost.linear_logprob by their names."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    softcap: float | None
    temperature: float
    low_rank: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]  # None without a LoRA adapter


def backbone(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Final hidden states [T, D] (after the last norm) of a packed batch, in the dtype of the model's computation.

    `model`: a causal LM of transformers, or peft's wrapper of one."""
    return outputs(model, batch).last_hidden_state[0]


def outputs(model: torch.nn.Module, batch: Batch, **wanted: bool):
    """All that the backbone returns of a packed batch. `wanted`: its options, e.g. output_router_logits=True."""
    return lora.inner(model).base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **attention.packed_arguments(batch.cu_seqlens, batch.longest, batch.cu_seqlens_k, batch.key_rows),
        **wanted,
    )


def head(model: torch.nn.Module) -> Head:
    """The output projection, with the LoRA adapter that is active on it now. Raises ValueError for a model whose logits
    are more than a linear layer, LoRA, softcap and scale."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    name = type(model).__name__
    if layer is None or not isinstance(getattr(layer, "weight", None), torch.Tensor) or layer.weight.ndim != 2:
        found = type(layer).__name__
        raise ValueError(
            f"[head] {name}: expected a linear output layer, got {found}. fastpost trains causal language models."
        )
    softcap = getattr(config, "final_logit_softcapping", None)
    # Granite divides its logits by logits_scaling, Cohere multiplies them by logit_scale: both are a temperature.
    temperature = float(getattr(config, "logits_scaling", None) or 1.0)
    if getattr(config, "logit_scale", None):
        temperature /= config.logit_scale
    if softcap is not None and temperature != 1.0:
        raise ValueError(
            f"[head] {name}: has a softcap and a logit scale; their order is not known here, so it is refused."
        )
    low_rank = partial(lora.low_rank, layer, lora.adapter(layer))
    return Head(layer.weight, getattr(layer, "bias", None), softcap, temperature, low_rank)


def logits(hidden: torch.Tensor, h: Head) -> torch.Tensor:
    """Logits [N, V] of hidden [N, D] in plain torch: the definition, for checks and small inputs."""
    out = torch.nn.functional.linear(
        hidden, h.weight.to(hidden.dtype), None if h.bias is None else h.bias.to(hidden.dtype)
    )
    pair = h.low_rank(hidden)
    out = out if pair is None else out + pair[0] @ pair[1].T
    if h.softcap is not None:
        out = h.softcap * torch.tanh(out / h.softcap)
    return out / h.temperature


@torch.no_grad()
def verify(model: torch.nn.Module) -> None:
    """Compare backbone + head on four packed sequences, the last two with a shared prompt, with the model's own logits
    on each.

    Raises ValueError naming the model when they differ by more than rounding.
    """
    name, h, was_training = type(model).__name__, head(model), model.training
    ids = [(7 * i + 3) % h.weight.shape[0] for i in range(16)]
    first, second, chosen, rejected = ids[:4], ids[4:7], ids[7:13], ids[7:10] + ids[13:]
    examples = [
        Example(i, tuple(Sequence(s, bytes(len(s) - 1) + b"\1") for s in row))
        for i, row in enumerate([(first,), (second,), (chosen, rejected)])
    ]
    shares = model.config._attn_implementation == attention.NAME
    batch = collate(examples, share_prompt=shares).to(h.weight.device)
    model.eval()
    try:
        ours = logits(backbone(model, batch), h).float()
    except (AttributeError, TypeError) as error:
        raise ValueError(f"[hf] {name}: its backbone does not take packed rows ({error}), so it is refused.") from None
    ours = ours if batch.key_rows is None else ours[batch.key_rows]
    rows = [torch.tensor([s], device=h.weight.device) for s in (first, second, chosen, rejected)]
    own = torch.cat([model(row, use_cache=False).logits[0] for row in rows]).float()
    model.train(was_training)
    errors = (ours - own).norm(dim=1) / own.norm(dim=1)
    limit = 1e-3 if model.dtype == torch.float32 else 5e-2
    # Medians: in a mixture of experts rounding may send one token elsewhere, but a wrong head or a leak hits them all.
    for part, what in (
        (slice(0, 4), "backbone and head do not give its own logits"),
        (slice(4, 13), "a packed sequence sees the one before it"),
        (slice(16, 19), "a reply does not see the prompt that it shares"),
    ):
        error = errors[part].median().item()
        if not error < limit:
            raise ValueError(
                f"[hf] {name}: {what} (relative difference {error:.1e}), so fastpost cannot train it as it is. "
                f"Its attention is '{model.config._attn_implementation}'."
            )
