# SPDX-License-Identifier: Apache-2.0
"""The two halves of a causal LM: backbone (tokens -> final hidden states) and head (what turns these into logits).

The logits themselves are never made: fastpost's ops take hidden states and head weight. `verify` checks, on seven
tokens, that the two halves put together are the model's own forward, and that packed sequences do not see each other; a
model with an extra step that is not understood here is refused instead of trained wrongly."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastpost.data.collate import Batch
from fastpost.hf import attention


class Head(NamedTuple):
    """logits = softcap(hidden @ weight.T + bias) / temperature, the arguments of fastpost.linear_logprob by their
    names."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    softcap: float | None
    temperature: float


def backbone(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Final hidden states [T, D] (after the last norm) of a packed batch, in the dtype of the model's computation."""
    out = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **attention.packed_arguments(batch.cu_seqlens, batch.longest),
    )
    return out.last_hidden_state[0]


def head(model: torch.nn.Module) -> Head:
    """The output projection. Raises ValueError for a model whose logits are more than a linear layer, softcap and
    scale."""
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
    return Head(layer.weight, getattr(layer, "bias", None), softcap, temperature)


def logits(hidden: torch.Tensor, h: Head) -> torch.Tensor:
    """Logits [N, V] of hidden [N, D] in plain torch: the definition, for checks and small inputs."""
    out = torch.nn.functional.linear(
        hidden, h.weight.to(hidden.dtype), None if h.bias is None else h.bias.to(hidden.dtype)
    )
    if h.softcap is not None:
        out = h.softcap * torch.tanh(out / h.softcap)
    return out / h.temperature


@torch.no_grad()
def verify(model: torch.nn.Module) -> None:
    """Compare backbone + head on two packed sequences with the model's own logits on each. Raises ValueError naming the
    model."""
    device, was_training = model.get_output_embeddings().weight.device, model.training
    model.eval()
    vocabulary = model.get_output_embeddings().weight.shape[0]
    first, second = ([(7 * i + 3) % vocabulary for i in range(start, start + n)] for start, n in ((1, 4), (8, 3)))
    batch = Batch(
        input_ids=torch.tensor([first + second]),
        position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
        cu_seqlens=torch.tensor([0, 4, 7], dtype=torch.int32),
        target=torch.full((7,), -100),
        reference_logprob=None,
        previous_logprob=None,
        reward=None,
        rows=[0, 1],
        longest=4,
    ).to(device)
    ours = logits(backbone(model, batch), head(model)).float()
    own = torch.cat(
        [model(torch.tensor([ids], device=device), use_cache=False).logits[0] for ids in (first, second)]
    ).float()
    model.train(was_training)
    # Median over tokens: in a mixture of experts rounding may send a single token elsewhere, a wrong head or a leak
    # hits all.
    for rows, what in ((slice(0, 4), "its logits are not a linear map of the last hidden state"),
                       (slice(4, 7), "a packed sequence sees the one before it")):  # fmt: skip
        error = ((ours[rows] - own[rows]).norm(dim=1) / own[rows].norm(dim=1)).median().item()
        if not error < (1e-3 if model.dtype == torch.float32 else 5e-2):
            raise ValueError(
                f"[hf] {type(model).__name__}: {what} (relative difference {error:.1e}), so fastpost cannot train it "
                f"as it is. Its attention is '{model.config._attn_implementation}'."
            )
