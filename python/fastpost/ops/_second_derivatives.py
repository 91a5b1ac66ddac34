# SPDX-License-Identifier: Apache-2.0
"""Second derivatives of linear_logprob: the gradient of its backward, in plain torch a block of rows at a time.

The backward maps the incoming gradients (g, h) of (log p, H) to the gradients of hidden, weight, bias, a and b. Let u
be what comes in for those. Then everything follows from one number, the derivative of Σ g·log p + h·H along u,

    s = Σ_i Σ_k G_ik·ż_ik,   ż = u_hidden·Wᵀ + hidden·u_Wᵀ + u_a·bᵀ + a·u_bᵀ + u_bias,   G = d(g·log p + h·H)/dz,

in which z are the logits before the softcap. With y = softcap(z) / T, ẏ = y'·ż, q = log p, r = q + H, m = Σ_k p_k ẏ_k,
E = Σ_k p_k r_k ẏ_k (all per row, t the target):

    ds/dg = ẏ_t - m          ds/dh = -E
    A     = dL/dy = g·(1[t] - p) - h·p·r,  G = A·y'
    ds/dz = y'·(-g·p·(ẏ - m) - h·p·((r + 1)·(ẏ - m) - E)) + A·y''·ż

and ds/dhidden = ds/dz·W + G·u_W, ds/dW = (ds/dz)ᵀ·hidden + Gᵀ·u_hidden, likewise for a and b. All of it is ordinary
differentiable torch, so third derivatives exist too (then with everything stored).
"""

from __future__ import annotations

import math

import torch

from fastpost.ops._tiles import scored_rows, spans, sum_dtype, take
from fastpost.reference.linear_logprob import transform

TILES = 12  # [rows, V] temporaries alive at once


def setup_context(ctx, inputs, output):
    (hidden, weight, target, bias, a, b, ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.memory_budget, _, _, _, _,
     grad_logprob, grad_entropy, *_) = inputs  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, target, bias, a, b, grad_logprob, grad_entropy)


def autograd(ctx, *u):
    hidden, weight, target, bias, a, b, g, h = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = {"hidden": needs[0], "weight": needs[1], "bias": needs[3], "a": needs[4], "b": needs[5]}
    out = dict.fromkeys(wanted)
    grad_g = grad_h = None
    if any(t is not None for t in u):
        with torch.autocast(hidden.device.type, enabled=False):
            out, grad_g, grad_h = _derivatives(
                hidden, weight, target, bias, a, b, g, h, u, wanted, ctx.temperature, ctx.softcap, ctx.ignore_index,
                ctx.memory_budget,
            )  # fmt: skip
    return (out["hidden"], out["weight"], None, out["bias"], out["a"], out["b"], *[None] * 8,
            grad_g, grad_h if needs[15] else None, *[None] * (len(needs) - 16))  # fmt: skip


def _derivatives(hidden, weight, target, bias, a, b, g, h, u, wanted, temperature, softcap, ignore_index, budget):
    u_hidden, u_weight, u_bias, u_a, u_b = u
    dtype, exact, v = hidden.dtype, sum_dtype(hidden.dtype), len(weight)
    rows = scored_rows(target != ignore_index)
    n = len(target) if rows is None else len(rows)
    factors = [("hidden", "weight", hidden, weight, u_hidden, u_weight)]
    if a is not None:
        factors.append(("a", "b", a, b, u_a, u_b))
    of_rows = {name: [] for name in ("hidden", "a", "g", "h")}
    sums = {}

    for begin, end in spans(0, n, max(1, budget // (TILES * max(1, v) * exact.itemsize))):
        z, z_dot = (torch.zeros(end - begin, v, dtype=exact, device=hidden.device) for _ in range(2))
        block = [(*names, take(x, rows, begin, end), w, None if ux is None else take(ux, rows, begin, end), uw)
                 for *names, x, w, ux, uw in factors]  # fmt: skip
        for _, _, x, w, ux, uw in block:
            z = z + x @ w.T
            z_dot = z_dot if ux is None else z_dot + ux @ w.T
            z_dot = z_dot if uw is None else z_dot + x @ uw.T
        z = z if bias is None else z + bias
        z_dot = z_dot if u_bias is None else z_dot + u_bias
        y, slope, bend = transform(z, temperature, softcap)
        q = torch.log_softmax(y, dim=1)
        t, g_i = take(target, rows, begin, end)[:, None], take(g, rows, begin, end)[:, None]
        p, y_dot = q.exp(), slope * z_dot
        centred = y_dot - (p * y_dot).sum(1, keepdim=True)
        of_rows["g"].append(centred.gather(1, t)[:, 0])
        one_t = torch.zeros_like(q).scatter_(1, t, 1.0)
        grad_y, s_y = g_i * (one_t - p), -g_i * p * centred
        if h is not None:
            h_i = take(h, rows, begin, end)[:, None]
            q = q.clamp(min=math.log(torch.finfo(exact).tiny))  # p log p -> 0 where a logit is -inf
            r = q - (p * q).sum(1, keepdim=True)
            e = (p * r * y_dot).sum(1, keepdim=True)
            of_rows["h"].append(-e[:, 0])
            grad_y, s_y = grad_y - h_i * p * r, s_y - h_i * p * ((r + 1) * centred - e)
        grad_z, s_z = grad_y * slope, s_y * slope
        s_z = s_z if bend is None else s_z + grad_y * bend * z_dot
        if wanted["bias"]:
            _add(sums, "bias", s_z.sum(0))
        grad_z, s_z = grad_z.to(dtype), s_z.to(dtype)
        for of_x, of_w, x, w, ux, uw in block:
            if wanted[of_x]:
                of_rows[of_x].append(s_z @ w if uw is None else s_z @ w + grad_z @ uw)
            if wanted[of_w]:
                _add(sums, of_w, (s_z.T @ x).to(exact))
                if ux is not None:
                    _add(sums, of_w, (grad_z.T @ ux).to(exact))

    def rows_of(name, like):
        some = torch.cat(of_rows[name]) if of_rows[name] else like[:0]
        return some if rows is None else torch.zeros_like(like).index_copy(0, rows, some.to(like.dtype))

    def sum_of(name, like):
        return sums[name].to(like.dtype) if name in sums else torch.zeros_like(like)

    like = {"hidden": hidden, "weight": weight, "bias": bias, "a": a, "b": b}
    out = {name: (rows_of if name in ("hidden", "a") else sum_of)(name, like[name]) if want else None
           for name, want in wanted.items()}  # fmt: skip
    return out, rows_of("g", g), None if h is None else rows_of("h", h)


def _add(sums, name, piece):
    if name in sums:
        sums[name] += piece
    else:
        sums[name] = piece
