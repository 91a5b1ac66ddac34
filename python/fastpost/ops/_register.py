# SPDX-License-Identifier: Apache-2.0
"""How an op enters torch: schema, one implementation for CPU and CUDA, a fake (shape) kernel and its autograd formula.

`torch.library.Library` costs 1 to 3 µs a call where `@torch.library.custom_op` costs 7 to 10 (measured, torch 2.13).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

_library = torch.library.Library("fastpost", "DEF")

# FASTPOST_REFERENCE=1 runs every op through its plain-torch reference, so that a doubt about a kernel can be bisected.
USE_REFERENCE = os.environ.get("FASTPOST_REFERENCE", "0") not in ("", "0")


def register(schema: str, implementation: Callable, fake: Callable, backward: Callable | None = None,
             setup_context: Callable | None = None) -> torch._ops.OpOverload:  # fmt: skip
    """Register `fastpost::<schema>` and return the overload to call (looked up once: 0.5 µs saved a call)."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CPU")
    _library.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"fastpost::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"fastpost::{name}", backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.fastpost, name).default


try:
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode as _watched
except ImportError:  # a torch that calls it otherwise: every call then goes through the dispatcher

    def _watched() -> bool:
        return True


def may_skip_dispatcher(*tensors: torch.Tensor | None) -> bool:
    """Whether nobody but the kernel wants to know of this call: no gradient, no compiler, no mode that counts or fakes,
    no tensor of another kind. The dispatcher is 15 of the 48 µs of a small layer, and a model has hundreds of them."""
    if torch.compiler.is_compiling() or _watched():
        return False
    grad = torch.is_grad_enabled()
    return all(t is None or (type(t) in _PLAIN and not t.is_meta and not (grad and t.requires_grad)) for t in tensors)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def expect_plain(op: str, **tensors: torch.Tensor | None) -> None:
    """What torch's dispatcher would answer with a page of backends, or not at all, before cpp/ops can say it well:
    tensors of other kinds, and tensors on several devices. Everything else is checked in cpp/ops."""
    device = None
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        expected = f"[{op}] {argument}: expected a plain torch.Tensor, got "
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(expected + f"{type(tensor).__name__}.")
        if type(tensor).__name__ == "DTensor":
            raise ValueError(
                expected + f"DTensor. Pass {argument}.full_tensor() (gathers all shards) or {argument}.to_local(); "
                "fastpost.parallel has functions for a head that is sharded over ranks."
            )
        if tensor.layout is not torch.strided:
            raise ValueError(expected + f"one with layout {tensor.layout}. Pass {argument}.to_dense().")
        if device is not None and tensor.device != device:
            raise ValueError(
                f"[{op}] {argument}: expected a tensor on {device}, got one on {tensor.device}. "
                "Move it with .to(device)."
            )
        device = tensor.device


def refuse_grad(op: str, **tensors: torch.Tensor | None) -> None:
    """For ops of inference alone: a gradient that would silently be lost is refused."""
    if not torch.is_grad_enabled():
        return
    for argument, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise ValueError(
                f"[{op}] {argument}: expected a tensor without gradient, got one that requires grad. This op has no "
                "backward; call it under torch.no_grad(), or pass .detach()."
            )


def scalar(op: str, argument: str, value, like: torch.Tensor) -> torch.Tensor | None:
    """A number or one-element tensor as a tensor [] in the dtype of `like`, without a gradient; None stays None."""
    if not isinstance(value, torch.Tensor):
        return None if value is None else like.new_full((), value)
    expect_plain(op, logprob=like, **{argument: value})
    if value.numel() != 1:
        raise ValueError(f"[{op}] {argument}: expected a number or one element, got shape {list(value.shape)}.")
    return value.detach().to(like.dtype).reshape(())


def contiguous_float(grad: torch.Tensor | None) -> torch.Tensor | None:
    """Gradients arrive expanded (stride 0) from sums; kernels want float32 rows in memory."""
    return None if grad is None else grad.to(torch.float32).contiguous()
