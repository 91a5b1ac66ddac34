# SPDX-License-Identifier: Apache-2.0
"""moe_route: which experts work on which token, with what weight. Kernel: cpp/ops/moe_route.cpp.

One forward and one backward over the logits [T, E] make everything that a router needs; plain torch runs a softmax, a
top-k, a histogram, a sort and the losses one after the other, each with memory of its own.
"""

from __future__ import annotations

import torch

from fastpost import _core
from fastpost.ops._register import USE_REFERENCE, expect_plain, may_skip_dispatcher, register
from fastpost.reference import moe_route as reference
from fastpost.reference.moe_route import SCORINGS, Plan, Routing

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
        ValueError: top_k is not in [1, E], scoring is something else, wrong dtype, shape, layout or device; on CPU also
            a row with NaN, with +inf or with nothing but -inf (on a GPU its gates and all the means become NaN).
    """
    if scoring not in SCORINGS:
        raise ValueError(f'[moe_route] scoring: expected "softmax" or "sigmoid", got {scoring!r}.')
    if USE_REFERENCE:
        return reference.moe_route(logits, top_k, scoring=scoring, normalize=normalize, scale=scale,
                                   correction=correction)  # fmt: skip
    expect_plain("moe_route", logits=logits, correction=correction)
    if correction is not None:
        correction = correction.detach()
    call = _forward if may_skip_dispatcher(logits, correction) else _forward_op
    gate, expert, offset, order, place, probability, losses = call(
        logits, top_k, scoring == "sigmoid", normalize, scale, correction
    )
    load_balance, z = losses.unbind()
    return Routing(expert, gate, Plan(offset, order, place), load_balance, z, probability)


def moe_plan(expert: torch.Tensor, experts: int) -> Plan:
    """The plan of a choice that was made elsewhere.

    Args:
        expert: [T, K] int64 or int32 in [0, experts]; `experts` itself stands for nobody (see Plan).
        experts: E.

    Returns:
        Plan(offset [E + 1], order [T·K], place [T, K]), int32 on the device of `expert`. Nothing waits for it.

    Raises:
        ValueError: wrong dtype or shape; on CPU also a number outside [0, experts] (on a GPU: nobody's, too).
    """
    if USE_REFERENCE:
        return reference.moe_plan(expert, experts)
    expect_plain("moe_plan", expert=expert)
    return Plan(*(_plan if may_skip_dispatcher(expert) else _plan_op)(expert, experts))


def _workspace(expert, experts):
    bytes = _core.moe_route_bytes(expert, experts, torch.get_num_threads())
    return torch.empty(bytes, dtype=torch.uint8, device=expert.device)


def _forward(logits, top_k, sigmoid, normalize, scale, correction):
    gate, expert, *rest = outputs = _forward_fake(logits, top_k)
    workspace = _workspace(expert, logits.shape[1])
    _core.moe_route(logits, top_k, sigmoid, normalize, scale, correction, workspace, expert, gate, *rest)
    return outputs


def _forward_fake(logits, top_k, *_):
    """gate, expert, offset, order, place, probability, losses."""
    if logits.ndim != 2 or logits.shape[1] < 1 or top_k < 1:
        raise ValueError(
            f"[moe_route] logits: expected [T, E] and top_k from 1 to E, got {list(logits.shape)}, {top_k}."
        )
    (t, e), new = logits.shape, logits.new_empty
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    expert, gate = new((t, top_k), dtype=torch.int64), new((t, top_k), dtype=wide)
    return gate, expert, *_plan_fake(expert, e), new(e, dtype=wide), new(2, dtype=wide)


def _plan(expert, experts):
    outputs = _plan_fake(expert, experts)
    _core.moe_route_plan(expert, experts, _workspace(expert, experts), *outputs)
    return outputs


def _plan_fake(expert, experts):
    """offset, order, place."""
    if expert.ndim != 2 or experts < 1:
        raise ValueError(
            f"[moe_plan] expert: expected [T, K] and experts from 1 on, got {list(expert.shape)}, {experts}."
        )
    t, k = expert.shape
    return tuple(expert.new_empty(shape, dtype=torch.int32) for shape in ((experts + 1,), (t * k,), (t, k)))


def _backward(logits, sigmoid, normalize, scale, expert, offset, grad_gate, grad_losses, grad_probability):
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _core.moe_route_backward(logits, sigmoid, normalize, scale, expert, offset, grad_gate, grad_losses,
                             grad_probability, _workspace(expert, logits.shape[1]), grad_logits)  # fmt: skip
    return grad_logits


def _backward_fake(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    logits, _, ctx.sigmoid, ctx.normalize, ctx.scale, _ = inputs
    _, expert, offset, order, place, _, _ = output
    ctx.mark_non_differentiable(expert, offset, order, place)
    ctx.set_materialize_grads(False)  # None for outputs that nobody used
    ctx.save_for_backward(logits, expert, offset)


def _autograd(ctx, grad_gate, _expert, _offset, _order, _place, grad_probability, grad_losses):
    logits, expert, offset = ctx.saved_tensors
    grads = [g if g is None else g.contiguous() for g in (grad_gate, grad_losses, grad_probability)]
    grad_logits = _backward_op(logits, ctx.sigmoid, ctx.normalize, ctx.scale, expert, offset, *grads)
    return grad_logits, None, None, None, None, None


_backward_op = register(
    "moe_route_backward(Tensor logits, bool sigmoid, bool normalize, float scale, Tensor expert, Tensor offset, "
    "Tensor? grad_gate, Tensor? grad_losses, Tensor? grad_probability) -> Tensor",
    _backward, _backward_fake,
)  # fmt: skip
_forward_op = register(
    "moe_route(Tensor logits, int top_k, bool sigmoid, bool normalize, float scale, Tensor? correction) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _autograd, _setup_context,
)  # fmt: skip
_plan_op = register("moe_plan(Tensor expert, int experts) -> (Tensor, Tensor, Tensor)", _plan, _plan_fake)
