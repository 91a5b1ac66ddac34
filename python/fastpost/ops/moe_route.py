# SPDX-License-Identifier: Apache-2.0
"""moe_route: which experts work on which token, with what weight. Kernel: cpp/ops/moe_route.cpp."""

from __future__ import annotations

import torch

from fastpost.reference import moe_route as reference
from fastpost.reference.moe_route import Plan, Routing

__all__ = ["Plan", "Routing", "moe_plan", "moe_route"]


def moe_route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
    correction: torch.Tensor | None = None,
) -> Routing:
    """Choose `top_k` experts for each token, and say how far the choice is from balance.

    score = softmax(logits) over all experts, or sigmoid(logits); the top_k largest of score + correction are chosen,
    between equals the lower number; gate = scale · score of the chosen, divided by their sum if `normalize` (softmax:
    then one over the chosen logits, as in Mixtral, JetMoE; without it: Switch, OLMoE; sigmoid with a correction:
    DeepSeek-V3). The losses are those of Switch Transformer (arXiv 2101.03961, eq. 4, with both shares summing to 1)
    and ST-MoE (arXiv 2202.08906, eq. 5), with a logsumexp that does not overflow.

    Args:
        logits: [T, E] float32, bfloat16 or float16 (on CPU also float64); computed in float32 (float64).
        top_k: experts of a token, 1 to E.
        scoring: "softmax" or "sigmoid".
        normalize: gates of a token sum to `scale`.
        scale: factor of all gates (routed_scaling_factor).
        correction: [E] float32, added to scores for the choice alone (e_score_correction_bias). No gradient.

    Returns:
        Routing(expert [T, K] int64, gate [T, K], plan, load_balance [], z [], probability [E]); floats are float32
        (float64). gate, load_balance, z and probability are differentiable in logits, all in one backward pass.

    Raises:
        ValueError: top_k is not in [1, E], scoring is something else, wrong dtype, shape or device; on CPU also NaN.
    """
    return reference.moe_route(logits, top_k, scoring=scoring, normalize=normalize, scale=scale, correction=correction)


def moe_plan(expert: torch.Tensor, experts: int) -> Plan:
    """The plan of a choice that was made elsewhere.

    Args:
        expert: [T, K] int64 or int32 in [0, experts]; `experts` itself stands for nobody (see Plan).
        experts: E.

    Returns:
        Plan(offset [E + 1], order [T·K], place [T, K]), int32 on the device of `expert`. Nothing waits for it.

    Raises:
        ValueError: wrong dtype or shape; on CPU also a number outside [0, experts].
    """
    return reference.moe_plan(expert, experts)
