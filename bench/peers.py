# SPDX-License-Identifier: Apache-2.0
"""Other people's kernels behind one signature per op, called as users call them; those not installed are left out.

A function that gives log-probs of tokens stands beside one that gives only their mean: `mean_only` marks the latter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F

NAMES = ("eager", "compile", "lce", "trl", "liger", "aten", "bitsandbytes")
"""What --peers accepts: torch eager, torch.compile, torch's F.linear_cross_entropy, TRL, Liger, torch's own four-bit
weights and attention, bitsandbytes."""

IGNORE = -100


def mean_only(function: Callable) -> Callable:
    function.mean_only = True
    return function


def pick(found: dict[str, Callable], names: list[str] | None) -> dict[str, Callable]:
    """Those whose first word is in `names`; all for None."""
    return {k: f for k, f in found.items() if names is None or k.split()[0].strip(",") in names}


@functools.cache
def missing() -> list[str]:
    return [
        name
        for name, loaded in (("trl", _trl()), ("liger-kernel", _liger()), ("bitsandbytes", _bitsandbytes()))
        if loaded is None
    ]


# ---- (logits [N, V], target [N]) -> logprob [N] ----------------------------------------------------------------------


def token_logprob(device: torch.device) -> dict[str, Callable]:
    found = {
        "eager": gather,
        "eager float32": lambda logits, target: gather(logits.float(), target),
        "compile": torch.compile(lambda logits, target: gather(logits.float(), target), dynamic=False),
    }
    if trl := _trl():
        found["trl selective_log_softmax"] = lambda logits, target: _zero_ignored(
            trl.selective_log_softmax(logits, target.clamp(min=0)), target
        )
    if (liger := _liger()) and device.type == "cuda":  # Triton only
        found["liger cross_entropy"] = lambda logits, target: -liger.cross_entropy(logits, target, reduction="none")
    return found


def gather(logits, target):
    logprob = torch.log_softmax(logits, -1).gather(-1, target.clamp(min=0)[:, None])[:, 0]
    return _zero_ignored(logprob, target)


# ---- (hidden [N, D], weight [V, D], target [N]) -> logprob [N], or -> mean of -logprob over scored tokens ------------


def linear_logprob(device: torch.device) -> dict[str, Callable]:
    found = {
        "eager": lambda h, w, t: gather(F.linear(h, w), t),
        "eager float32": lambda h, w, t: gather(F.linear(h, w).float(), t),
        "compile": torch.compile(lambda h, w, t: gather(F.linear(h, w).float(), t), dynamic=False),
    }
    if hasattr(F, "linear_cross_entropy"):
        chunked = torch.nn.LinearCrossEntropyOptions()
        lce = F.linear_cross_entropy
        found["lce none"] = lambda h, w, t: -lce(h, w, t, reduction="none")
        found["lce mean"] = mean_only(lambda h, w, t: lce(h, w, t))
        found["lce none, chunked"] = lambda h, w, t: -lce(h, w, t, reduction="none", options=chunked)
        found["lce mean, chunked"] = mean_only(lambda h, w, t: lce(h, w, t, options=chunked))
    if trl := _trl():
        found["trl chunked"] = lambda h, w, t: _zero_ignored(trl.chunked(h, w, t.clamp(min=0)), t)
    if (liger := _liger()) and device.type == "cuda":
        found["liger flce mean"] = mean_only(liger.linear_cross_entropy)
    return found


def rows_picked(per_token: Callable) -> Callable:
    """Only the scored rows go through the head: what a careful user does by hand with a masked batch."""

    def run(hidden, weight, target):
        scored = target != IGNORE
        out = torch.zeros(len(target), dtype=torch.float32, device=target.device)
        return out.masked_scatter(scored, per_token(hidden[scored], weight, target[scored]).float())

    return run


# ---- SimPO: (hidden [T, D], weight [V, D], target [T], pairs, beta, gamma_beta_ratio) -> loss -----------------------
# All sequences have the same length, 2i and 2i + 1 are a pair, all tokens are scored.


def simpo_loss(logprob, pairs, beta, gamma_beta_ratio):
    """-log σ(β (mean chosen - mean rejected - γ/β)), mean over pairs, from log-probs of tokens."""
    chosen, rejected = logprob.float().view(pairs, 2, -1).mean(-1).unbind(1)
    return -F.logsigmoid(beta * (chosen - rejected - gamma_beta_ratio)).mean()


def simpo(device: torch.device) -> dict[str, Callable]:
    found = {}
    for name, per_token in linear_logprob(device).items():
        if not hasattr(per_token, "mean_only") and name != "compile":
            found[name] = lambda h, w, t, *how, f=per_token: simpo_loss(f(h, w, t), *how)
    found["compile"] = torch.compile(
        lambda h, w, t, *how: simpo_loss(gather(F.linear(h, w).float(), t), *how), dynamic=False
    )
    if liger := _liger():
        found["liger simpo"] = liger.simpo
    return {k: found[k] for k in sorted(found, key=lambda k: NAMES.index(k.split()[0]))}


# ---- four-bit weights: Int4Weight [N, K] -> functions x [M, K] -> [M, N] that multiply by the same -------------------


def int4_gemm(weight, dtype: torch.dtype) -> dict[str, Callable]:
    dense = weight.dequantize(dtype)
    found = {"eager, dense weights": lambda x: F.linear(x, dense)}
    on_cpu = dense.device.type == "cpu"
    if on_cpu and dtype == torch.bfloat16 and weight.scheme != "nf4" and weight.group_size in (32, 64, 128, 256):
        zeros = 8 if weight.zeros is None else weight.zeros.float()
        scales = torch.stack([weight.scales.float(), weight.scales.float() * (8 - zeros)], -1)
        scales = scales.transpose(0, 1).contiguous().to(dtype)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.unpacked().int(), 1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        found["aten int4pack"] = lambda x: product(x, packed, weight.group_size, scales)
    if (bnb := _bitsandbytes()) and weight.scheme == "nf4":
        n, k = weight.shape
        layer = bnb.nn.Linear4bit(k, n, False, dtype, compress_statistics=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight.dequantize(), requires_grad=False, blocksize=weight.group_size,
                                         compress_statistics=False, quant_type="nf4")  # fmt: skip
        layer = layer.to(dense.device).eval()
        layer(torch.zeros(1, k, dtype=dtype, device=dense.device))  # on a CPU, when it packs for its fused kernel
        found["bitsandbytes"] = layer
    return found


# ---- the libraries ---------------------------------------------------------------------------------------------------


def _zero_ignored(logprob, target):
    return logprob.masked_fill(target == IGNORE, 0)


@functools.cache
def _trl():
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, selective_log_softmax
    except ImportError:
        return None

    def chunked(h, w, t):
        return ChunkedLogProbFunction.apply(h, w, None, t, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())[0]

    return SimpleNamespace(chunked=chunked, selective_log_softmax=selective_log_softmax)


@functools.cache
def _liger():
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss
        from liger_kernel.transformers import functional
    except ImportError:
        return None

    def simpo(h, w, t, pairs, beta, gamma_beta_ratio):
        # Liger wants all chosen before all rejected, and γ where others say γ/β.
        h = h.view(pairs, 2, -1, h.shape[-1]).transpose(0, 1).flatten(0, 1)
        t = t.view(pairs, 2, -1).transpose(0, 1).flatten(0, 1)
        loss = LigerFusedLinearSimPOLoss(beta=beta, gamma=gamma_beta_ratio * beta, compute_nll_loss=False)
        return loss(w, h, t)[0]

    return SimpleNamespace(
        simpo=simpo,
        cross_entropy=functional.liger_cross_entropy,
        linear_cross_entropy=functional.liger_fused_linear_cross_entropy,
    )


@functools.cache
def _bitsandbytes():
    try:
        import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes
