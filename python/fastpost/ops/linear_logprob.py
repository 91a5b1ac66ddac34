# SPDX-License-Identifier: Apache-2.0
"""linear_logprob: log-probabilities from hidden states and the output weight, the [N, V] logits never stored whole.

Logits are made a tile at a time with torch's own GEMM; between GEMMs the core (cpp/ops/linear_logprob.cpp) does
everything else in one pass. The gradient of a logit needs only its row's log-sum-exp, so the backward makes each tile
again (8·N·V·D operations in all), unless the byte budget allowed the forward to keep it (6·N·V·D, three GEMMs); with a
frozen head it costs two GEMMs. The passes are in _passes.py, their loops over tiles in _tiles.py, second derivatives in
_second_derivatives.py.
"""

from __future__ import annotations

import torch

from fastpost import _core
from fastpost.ops import _fused, _passes, _second_derivatives
from fastpost.ops._register import USE_REFERENCE, expect_plain, register
from fastpost.ops._schedule import schedule
from fastpost.ops._tiles import compute_dtype
from fastpost.reference import linear_logprob as reference

DEFAULT_MEMORY_BUDGET = {"cpu": 256 << 20, "cuda": 1 << 30}
SMALLEST_MEMORY_BUDGET = 1 << 20


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    skip_mass: float = 0.0,
    vocab_order: torch.Tensor | None = None,
    return_schedule: bool = False,
) -> torch.Tensor | tuple:
    """Log-probability of each target under ``softmax(z)``, where
    ``z = softcap(hidden · weightᵀ + a · bᵀ + bias) / temperature`` and ``low_rank = (a, b)``.

    Drop-in for ``log_softmax(lm_head(hidden)).gather(target)``. Extra memory (beyond inputs, outputs and gradients)
    stays below `memory_budget` whatever N and V. Rows whose target is `ignore_index` cost nothing, and rows whose
    incoming gradient is zero cost nothing in the backward; a frozen weight costs no weight gradient.

    Second derivatives (``create_graph=True``) are computed from the formula in plain torch, a block of rows at a time;
    their sums of weight size are held besides `memory_budget`.

    Args:
        hidden: [N, D] float32, bfloat16 or float16. float64 runs the same loops and the same autograd with plain torch
            in place of the kernels: for gradcheck and other proofs, not for speed.
        weight: [V, D], dtype and device of `hidden`.
        target: [N] int64 in [0, V), or `ignore_index`.
        bias: [V], dtype of `hidden`, or None.
        low_rank: (a [N, r], b [V, r]), dtype of `hidden`: adds a · bᵀ to the logits without ever merging it into the
            weight. A LoRA adapter of the head is a = scaling · hidden · Aᵀ and b = B (fastpost.hf.lora makes the pair).
        temperature: divides the logits (after the softcap).
        softcap: c > 0 replaces each logit x by c·tanh(x / c); None for none.
        ignore_index: rows with this target get 0 and no gradient.
        return_entropy: also return H = -Σ_j p_j log p_j per row.
        memory_budget: bytes, at least 1 MiB; default 256 MiB on the CPU, 1 GiB on a GPU. Half of it at most is held
            between forward and backward, and on the CPU until the next forward uses it again.
        batch_invariant: a row's log-prob, entropy and hidden gradient are the same bits whatever other rows there are,
            in whatever order, on however many threads. CPU only; where the fused kernels run by themselves (AVX-512 on
            AMD, AVX512-BF16 without AMX) it costs nothing and holds anyway.
        skip_mass: opt-in approximation of the gradients (log-probs stay exact). In the backward, tiles of rows and
            vocabulary entries are skipped whose probabilities a row can lose without losing more than this in all, 1e-3
            say; never a target's. CPU only, where the fused kernels take the arguments; not with softcap or entropy.
        vocab_order: [V] int64, a permutation: the order in which entries are cut into tiles. By falling frequency in
            the data, most tiles hold nothing and skip_mass pays.
        return_schedule: also return, last, how this was computed and what it costs (counts the scored rows, for which
            the host waits on a GPU).

    Returns:
        log-probabilities [N] float32 (float64 for float64), in nats, differentiable in `hidden`, `weight`, `bias` and
        `low_rank`; with `return_entropy` a pair (logprob [N], entropy [N]), both differentiable.

    Raises:
        ValueError: wrong dtype, shape, device or layout, or (on CPU) a target outside [0, V).
    """
    a, b = low_rank_pair("linear_logprob", low_rank)
    if USE_REFERENCE:
        return reference.linear_logprob(hidden, weight, target, bias=bias, low_rank=low_rank, temperature=temperature,
                                        softcap=softcap, ignore_index=ignore_index,
                                        return_entropy=return_entropy)  # fmt: skip
    expect_plain("linear_logprob", hidden=hidden, weight=weight, target=target, bias=bias, a=a, b=b)
    memory_budget = expect_budget("linear_logprob", memory_budget, hidden)
    hidden, weight, bias, a, b = autocast(hidden, weight, bias, a, b)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias, a, b)]
    keep, frozen = any(wanted), wanted[0] and not any(wanted[1:])
    logprob, _, entropy, _ = _forward_op(
        hidden, weight, target, bias, a, b, temperature, softcap or 0.0, ignore_index, return_entropy, memory_budget,
        keep, batch_invariant, skip_mass, vocab_order, frozen,
    )  # fmt: skip
    outputs = (logprob, entropy) if return_entropy else (logprob,)
    if return_schedule:
        frozen = _passes.may_finish(frozen, return_entropy, batch_invariant or skip_mass > 0)
        outputs += (schedule(hidden, weight, target, needs=wanted[:2], budget=memory_budget, a=a,
                             ignore_index=ignore_index, keeps=not (softcap or return_entropy),
                             batch_invariant=batch_invariant, frozen=frozen),)  # fmt: skip
    return outputs if len(outputs) > 1 else logprob


# ---- arguments -------------------------------------------------------------------------------------------------------


def low_rank_pair(op, low_rank):
    if low_rank is None:
        return None, None
    got = low_rank if isinstance(low_rank, (tuple, list)) else [low_rank]
    if len(got) != 2 or not all(isinstance(t, torch.Tensor) for t in got):
        kinds = ", ".join(type(t).__name__ for t in got)
        raise ValueError(f"[{op}] low_rank: expected a pair (a [N, r], b [V, r]) of tensors, got ({kinds}).")
    return got


def expect_budget(op, memory_budget, hidden):
    if memory_budget is None:
        return DEFAULT_MEMORY_BUDGET.get(hidden.device.type, DEFAULT_MEMORY_BUDGET["cpu"])
    if memory_budget < SMALLEST_MEMORY_BUDGET:
        raise ValueError(
            f"[{op}] memory_budget: expected at least {SMALLEST_MEMORY_BUDGET} bytes (1 MiB), got {memory_budget}."
        )
    return memory_budget


def autocast(*tensors):
    """As F.linear does."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(None if t is None else t.to(torch.get_autocast_dtype(device)) for t in tensors)


def check(hidden, weight, target, bias, a, b, temperature, softcap, ignore_index):
    """Raises ValueError, for all but the pair by the sentences of cpp/ops."""
    floats = (hidden, weight, bias)
    if all(t is None or t.dtype == torch.float64 for t in floats):  # the core does not know float64, but the rest
        floats = (None if t is None else t.float() for t in floats)
    hidden_, weight_, bias_ = floats
    try:
        _core.linear_logprob_check(hidden_, weight_, bias_, target, temperature, softcap, ignore_index)
    except ValueError as error:
        raise ValueError(str(error).replace("float32", "float64") if hidden_ is not hidden else str(error)) from None
    if a is None:
        return
    dtype = str(hidden.dtype).removeprefix("torch.")
    for name, t, like, n in (("a", a, "N", len(hidden)), ("b", b, "V", len(weight))):
        if t.dtype != hidden.dtype or t.ndim != 2 or len(t) != n or t.shape[1] != b.shape[-1]:
            got = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            raise ValueError(
                f"[linear_logprob] low_rank: expected {name} as {dtype} [{like} = {n}, r = {b.shape[-1]}], got {got}."
            )


# ---- the ops ---------------------------------------------------------------------------------------------------------


def _forward(hidden, weight, target, bias, a, b, temperature, softcap, ignore_index, with_entropy, memory_budget, keep,
             batch_invariant=False, skip_mass=0.0, vocab_order=None, frozen=False):  # fmt: skip
    check(hidden, weight, target, bias, a, b, temperature, softcap, ignore_index)
    _fused.check_skipping(hidden, weight, a, softcap, with_entropy, skip_mass, vocab_order)
    with torch.autocast(hidden.device.type, enabled=False):
        return _passes.forward(hidden, weight, target, bias, a, b, temperature, softcap, ignore_index, with_entropy,
                               memory_budget, keep, batch_invariant, skip_mass, vocab_order, frozen)  # fmt: skip


def _forward_fake(hidden, weight, target, bias, a, b, temperature, softcap, ignore_index, with_entropy, memory_budget,
                  keep, batch_invariant=False, skip_mass=0.0, vocab_order=None, frozen=False):  # fmt: skip
    # How many rows are scored, and so kept, is known only at run time.
    kept_rows = torch.library.get_ctx().new_dynamic_size() if keep else 0
    kept = hidden.new_empty(kept_rows, weight.shape[0], dtype=compute_dtype(hidden))
    return *_passes.row_outputs(hidden, with_entropy), kept


def _backward(hidden, weight, target, bias, a, b, temperature, softcap, ignore_index, memory_budget, logprob, lse,
              entropy, kept, grad_logprob, grad_entropy, needs, batch_invariant=False, skip_mass=0.0,
              vocab_order=None, frozen=False):  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False):
        return _passes.backward(hidden, weight, target, bias, a, b, temperature, softcap, ignore_index, memory_budget,
                                logprob, lse, entropy, kept, grad_logprob, grad_entropy, needs, batch_invariant,
                                skip_mass, vocab_order, frozen)  # fmt: skip


def _backward_fake(hidden, weight, target, bias, a, b, temperature, softcap, ignore_index, memory_budget, logprob, lse,
                   entropy, kept, grad_logprob, grad_entropy, needs, batch_invariant=False, skip_mass=0.0,
                   vocab_order=None, frozen=False):  # fmt: skip
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)
        for t, needed in zip((hidden, weight, bias, a, b), needs)
    )


def _setup_context(ctx, inputs, output):
    (*tensors, ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.with_entropy, ctx.memory_budget, _,
     ctx.batch_invariant, ctx.skip_mass, vocab_order, ctx.frozen) = inputs  # fmt: skip
    logprob, lse, entropy, kept = output
    ctx.mark_non_differentiable(lse, kept)
    ctx.set_materialize_grads(False)  # or there would be zeros as large as `kept`
    ctx.save_for_backward(*tensors, logprob, lse, entropy, kept, vocab_order)


def _autograd(ctx, grad_logprob, _grad_lse, grad_entropy, _grad_kept):
    hidden, weight, target, bias, a, b, logprob, lse, entropy, kept, vocab_order = ctx.saved_tensors
    needs_hidden, needs_weight, _, *rest = ctx.needs_input_grad[:6]
    needs = [needs_hidden, needs_weight, *rest]
    # Gradients arrive expanded (stride 0) from sums; kernels want rows in memory.
    grad_logprob, grad_entropy = (
        torch.zeros_like(lse) if g is None else g.to(lse.dtype).contiguous() for g in (grad_logprob, grad_entropy)
    )
    grads = _backward_op(
        hidden, weight, target, bias, a, b, ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.memory_budget, logprob,
        lse, entropy if ctx.with_entropy else None, kept, grad_logprob, grad_entropy if ctx.with_entropy else None,
        needs, ctx.batch_invariant, ctx.skip_mass, vocab_order, ctx.frozen,
    )  # fmt: skip
    hidden, weight, bias, a, b = (g if needed else None for g, needed in zip(grads, needs))
    return hidden, weight, None, bias, a, b, *[None] * 10


_backward_op = register(
    "linear_logprob_backward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? a, Tensor? b, "
    "float temperature, float softcap, int ignore_index, int memory_budget, Tensor logprob, Tensor lse, "
    "Tensor? entropy, Tensor kept, Tensor grad_logprob, Tensor? grad_entropy, bool[] needs, "
    "bool batch_invariant=False, float skip_mass=0.0, Tensor? vocab_order=None, bool frozen=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_fake, _second_derivatives.autograd, _second_derivatives.setup_context,
)  # fmt: skip
_forward_op = register(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? a, Tensor? b, "
    "float temperature, float softcap, int ignore_index, bool with_entropy, int memory_budget, bool keep, "
    "bool batch_invariant=False, float skip_mass=0.0, Tensor? vocab_order=None, bool frozen=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _autograd, _setup_context,
)  # fmt: skip
