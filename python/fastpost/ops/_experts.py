# SPDX-License-Identifier: Apache-2.0
"""A whole mixture of feed-forward experts as one node of autograd.

forward   pre = gather(x) · Upᵀ; a = act(pre); y = a · Downᵀ; out = Σ_k gate · y         keeps x and pre alone
backward  d = gather(grad) · Down; grad_gate = d · a; grad_pre = gate·d·da/dpre          one product and its epilogue
          grad_down = gather(grad) ⊗ gate·a; grad_up = grad_pre ⊗ gather(x); grad_x = Σ_k grad_pre · Up

The gate's gradient needs y in other implementations: grad · (a · Downᵀ) = (grad · Down) · a, and d is there anyway
(SonicMoE, arXiv 2512.14080). So neither a, nor y, nor any gathered copy is kept.
"""

from __future__ import annotations

import torch

from fastpost import _core
from fastpost.int4 import Int4Weight
from fastpost.ops import _expert_loop, _int4_experts
from fastpost.ops._grouped import workspace
from fastpost.ops._register import USE_REFERENCE, expect_plain, may_skip_dispatcher, register
from fastpost.ops.grouped_gemm import activation_code, grouped_gemm, product, weight_gradient
from fastpost.ops.int4_gemm import rows_of
from fastpost.ops.moe_combine import moe_combine
from fastpost.ops.moe_route import Plan


def experts(
    x: torch.Tensor,
    plan: Plan,
    gate: torch.Tensor,
    up: torch.Tensor | Int4Weight,
    down: torch.Tensor | Int4Weight,
    *,
    activation: str = "swiglu",
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """``out[t] = Σ_k gate[t, k] · (act(x_t · Up_eᵀ) · Down_eᵀ)`` with e the k-th expert of token t.

    Args:
        x: [T, H] float32, bfloat16 or float16 (float64 runs through the references).
        plan: of T tokens and K slots (moe_route, moe_plan).
        gate: [T, K] float32.
        up: [E, 2I, H] in the dtype of x, the half that the activation acts on first.
        down: [E, H, I]. Either may be in four bits (Int4Weight of E·2I or E·H rows, frozen); both together take a node
            of their own that keeps as little, one alone the composition.
        activation: see grouped_gemm; must be gated.
        up_bias, down_bias: [E, 2I], [E, H], or None. With them, or with transposed weights, the backward keeps more.
        recompute: keep only x, and make the first product again in the backward (a sixth more work).

    Returns:
        [T, H] in the dtype of x, differentiable in x, gate, up, down and the biases.

    Raises:
        ValueError: shapes that do not fit each other or the plan, dtypes that differ, an activation that is not gated.
    """
    if activation is None or not (code := activation_code(activation)):
        raise ValueError("[experts] activation: expected a gated one, got None. Compose grouped_gemm and moe_combine.")
    packed = [isinstance(w, Int4Weight) for w in (up, down)]
    turned = not any(packed) and (up.stride(-1) != 1 or down.stride(-1) != 1)
    apart = up_bias is not None or down_bias is not None or turned or (any(packed) and not all(packed))
    if USE_REFERENCE or x.dtype == torch.float64 or apart:
        a = grouped_gemm(x, up, plan.offset, order=plan.order, top_k=plan.place.shape[1], bias=up_bias,
                         activation=activation)  # fmt: skip
        return moe_combine(grouped_gemm(a, down, plan.offset, bias=down_bias), plan, gate)
    if all(packed):
        return _int4_experts.experts(x, plan, gate, up, down, code, recompute)
    expect_plain("experts", x=x, gate=gate, up=up, down=down, offset=plan.offset)
    gate = gate.to(torch.float32)
    quiet = may_skip_dispatcher(x, gate, up, down)
    keep = not (quiet or recompute) and torch.is_grad_enabled()
    return (_forward if quiet else _forward_op)(x, gate, *plan, up, down, code, keep)[0]


def _forward(x, gate, offset, order, place, up, down, code, keep):
    x, top_k = rows_of(x), place.shape[1]
    pre = x.new_empty(order.shape[0], up.shape[1]) if keep else None
    a = product(x, up, offset, order, top_k, None, code, pre)
    y = product(a, down, offset)
    out = torch.empty_like(x)
    _core.moe_combine(y, place, gate, out)
    return out, out.new_empty(0) if pre is None else pre


def _forward_fake(x, gate, offset, order, place, up, down, code, keep):
    return x.new_empty(x.shape), x.new_empty((order.shape[0], up.shape[1]) if keep else 0)


def _backward(grad, x, gate, offset, order, place, up, down, pre, code, wanted):
    want_x, _, want_up, want_down = wanted  # the gate's comes with the rest
    x, grad, none, top_k = rows_of(x), rows_of(grad), grad.new_empty(0), place.shape[1]
    if pre.numel() == 0:
        pre = product(x, up, offset, order, top_k)
    grad_pre = torch.empty_like(pre)
    activated = pre.new_empty(pre.shape[0], pre.shape[1] // 2) if want_down else None
    grad_gate = torch.empty_like(gate)
    turned, flat = down.mT, (gate.view(-1), grad_gate.view(-1))
    if _expert_loop.preferred(down, order.shape[0]):
        _expert_loop.activation_backward(grad, order, top_k, turned, offset, pre, code, flat[0], grad_pre, activated,
                                         flat[1])  # fmt: skip
    else:
        space = workspace(turned, order.shape[0])
        _core.grouped_gemm_activation_backward(grad, order, top_k, turned, offset, pre, code, flat[0], space, grad_pre,
                                               activated, flat[1])  # fmt: skip
    grad_down = grad_up = grad_x = none
    if want_down:
        grad_down = weight_gradient(grad, activated, offset, down, grad_order=order, grad_top_k=top_k)
    del activated
    if want_up:
        grad_up = weight_gradient(grad_pre, x, offset, up, order=order, top_k=top_k)
    if want_x:
        rows, grad_x = product(grad_pre, up.mT, offset), torch.empty_like(x)
        _core.moe_combine(rows, place, None, grad_x)
    return grad_x, grad_gate, grad_up, grad_down


def _backward_fake(grad, x, gate, offset, order, place, up, down, pre, code, wanted):
    none = grad.new_empty(0)
    pick = [x.new_empty(t.shape) if want else none for t, want in zip((x, gate, up, down), wanted, strict=True)]
    pick[1] = torch.empty_like(gate)
    return tuple(pick)


def _setup_context(ctx, inputs, output):
    x, gate, offset, order, place, up, down, ctx.code, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate, offset, order, place, up, down, output[1])


def _autograd(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    need = [ctx.needs_input_grad[i] for i in (0, 1, 5, 6)]
    grads = _backward_op(grad, *ctx.saved_tensors, ctx.code, need)
    x, gate, up, down = (g if wanted else None for g, wanted in zip(grads, need, strict=True))
    return x, gate, None, None, None, up, down, None, None


_backward_op = register(
    "moe_experts_backward(Tensor grad, Tensor x, Tensor gate, Tensor offset, Tensor order, Tensor place, Tensor up, "
    "Tensor down, Tensor pre, int code, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip
_forward_op = register(
    "moe_experts(Tensor x, Tensor gate, Tensor offset, Tensor order, Tensor place, Tensor up, Tensor down, int code, "
    "bool keep) -> (Tensor, Tensor)",
    _forward, _forward_fake, _autograd, _setup_context,
)  # fmt: skip
