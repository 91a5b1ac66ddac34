# SPDX-License-Identifier: Apache-2.0
"""linear_logprob in plain torch; works in any float dtype, so float64 input gives the truth.

Also the tile functions of cpp/ops.h under their names: float64 tensors run through these, so that the loops over tiles
can be checked in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastpost.reference.token_logprob import token_logprob


def linear_logprob(hidden, weight, target, *, bias=None, low_rank=None, temperature=1.0, softcap=None,
                   ignore_index=-100, return_entropy=False, memory_budget=None):  # fmt: skip
    """Same signature and meaning as :func:`fastpost.linear_logprob`; stores the logits."""
    logits = hidden @ weight.T
    if low_rank is not None:
        logits = logits + low_rank[0] @ low_rank[1].T
    if bias is not None:
        logits = logits + bias
    return token_logprob(logits, target, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
                         return_entropy=return_entropy)  # fmt: skip


# ---- the tile functions of cpp/ops.h ---------------------------------------------------------------------------------


def transform(a, temperature, softcap):
    """z = softcap(a) / temperature with its first and second derivative in a (the second None when it is 0)."""
    if not softcap:
        return a / temperature, 1.0 / temperature, None
    unit = torch.tanh(a / softcap)
    slope = (1.0 - unit * unit) / temperature
    return softcap * unit / temperature, slope, -2.0 / softcap * unit * slope


def combine(parts):
    """Statistics [k, 5, n] of k slices of the vocabulary -> [5, n] of their union; the order of the slices is kept.

    Rows: m = max z, how many z equal m, Σ e^(z - m) over the others, Σ e^(z - m)·(z - m), z of the target, which is NaN
    in slices that do not hold it."""
    top, at_top, rest, weighted, z_target = parts.unbind(1)
    m = top.amax(0)
    shift = torch.where(top == m, 0, top - m)  # two -inf are equal, too
    scale, total = shift.exp(), at_top + rest
    weighted = torch.where(scale == 0, 0, scale * (weighted + total * shift))  # nothing but -inf: 0, not 0 · inf
    elsewhere = z_target.isnan()
    found = torch.where(elsewhere, 0, z_target).sum(0)
    return torch.stack([
        m,
        torch.where(shift == 0, at_top, 0).sum(0),
        torch.where(shift == 0, rest, scale * total).sum(0),
        weighted.sum(0),
        torch.where(elsewhere.all(0), torch.nan, found),
    ])  # fmt: skip


def _with_bias(logits, bias, dtype):
    return logits.to(dtype) if bias is None else logits.to(dtype) + bias.to(dtype)


def linear_logprob_tile(logits, bias, target, vocab_start, temperature, softcap, with_entropy, stats):
    z, _, _ = transform(_with_bias(logits, bias, stats.dtype), temperature, softcap)
    m = z.amax(1)
    from_m = torch.where(z == m[:, None], 0, z - m[:, None])
    e = torch.where(z == -torch.inf, 0, from_m.exp())
    at = (target - vocab_start).clamp(0, z.shape[1] - 1)
    here = at == target - vocab_start
    own = torch.stack([
        m,
        ((z == m[:, None]) & (e != 0)).sum(1),
        torch.where(z == m[:, None], 0, e).sum(1),
        torch.where(e == 0, 0, e * from_m).sum(1),
        torch.where(here, z.gather(1, at[:, None])[:, 0], torch.nan),
    ])  # fmt: skip
    stats.copy_(combine(torch.stack([stats, own.to(stats.dtype)])))


def linear_logprob_finish(stats, logprob, lse, entropy):
    m, at_m, rest, weighted, z_target = stats
    log_sum = at_m.log() + (rest / at_m).log1p()
    logprob.copy_((z_target - m - log_sum).clamp(max=0))
    lse.copy_(m + log_sum)
    if entropy is not None:
        entropy.copy_(log_sum - weighted / (at_m + rest))


def linear_logprob_tile_backward(logits, bias, target, vocab_start, temperature, softcap, logprob, lse, entropy,
                                 grad_logprob, grad_entropy, grad_logits):  # fmt: skip
    z, slope, _ = transform(_with_bias(logits, bias, lse.dtype), temperature, softcap)
    q = z - lse[:, None]
    p, g = q.exp(), grad_logprob[:, None]
    grad = -g * p
    if grad_entropy is not None:
        grad = grad - torch.where(p == 0, 0, grad_entropy[:, None] * p * (q + entropy[:, None]))
    at = (target - vocab_start).clamp(0, z.shape[1] - 1)[:, None]
    grad.scatter_add_(1, at, torch.where(at[:, 0] == target - vocab_start, grad_logprob, 0)[:, None])
    grad_logits.copy_(grad * slope)


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One shape with its options; `inputs` draws the tensors."""

    name: str
    n: int
    d: int
    v: int
    scale: float = 1.0  # of the logits
    bias: bool = False
    ignored: float = 0.0
    peaked: bool = False  # hidden states point at their target's row of the weight: p -> 1
    options: dict = field(default_factory=dict)

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        """hidden, weight, target, bias or None."""
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(self.v, self.d, generator=g)
        target = torch.randint(0, self.v, (self.n,), generator=g)
        if self.peaked:
            hidden = weight[target] * (12.0 / self.d)
        else:
            hidden = torch.randn(self.n, self.d, generator=g) * (self.scale / self.d**0.5)
        bias = torch.randn(self.v, generator=g).to(dtype).to(device) if self.bias else None
        if self.ignored:
            target[torch.rand(self.n, generator=g) < self.ignored] = self.options.get("ignore_index", -100)
        return hidden.to(dtype).to(device), weight.to(dtype).to(device), target.to(device), bias


MIB = 1 << 20


def cases() -> list[Case]:
    small = {"memory_budget": MIB}  # forces tiles, and with these sizes every kind of sweep
    return [
        Case("empty", 0, 8, 17),
        Case("one-row", 1, 16, 100),
        Case("odd", 13, 31, 1003),
        Case("tiny-scale", 8, 16, 333, scale=1e-3),
        Case("huge-scale", 8, 16, 333, scale=1e3),
        Case("peaked", 16, 64, 500, peaked=True),
        Case("half-ignored", 33, 16, 515, ignored=0.5),
        Case("all-ignored", 4, 8, 100, ignored=1.1),
        Case("bias", 9, 16, 777, bias=True),
        Case("softcap", 9, 16, 777, scale=30, options={"softcap": 30.0}),
        Case("entropy", 9, 16, 777, scale=2, options={"return_entropy": True}),
        Case("everything", 40, 24, 2001, scale=10, bias=True, ignored=0.3,
             options={"temperature": 1.3, "softcap": 20.0, "return_entropy": True}),
        Case("slices", 64, 32, 9000, bias=True, options=small),  # few rows: the vocabulary is cut
        Case("blocks", 3000, 8, 300, bias=True, ignored=0.2, options=small),  # many rows: the rows are cut
        Case("cols", 1200, 16, 5000, ignored=0.2, options=small),  # both are, and the three ways to sum gradients
        Case("rows", 2500, 16, 1200, ignored=0.2, bias=True, options=small),
        Case("twice", 2100, 128, 1700, scale=2, ignored=0.2, options=small | {"return_entropy": True}),
    ]  # fmt: skip
