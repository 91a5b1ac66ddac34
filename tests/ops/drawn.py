# SPDX-License-Identifier: Apache-2.0
"""Small random inputs and gradients for tests that look at one thing each."""

import torch

MIB = 1 << 20


def draw(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def pick(high, *shape, seed=0, device="cpu"):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def cu(*ends, device="cpu"):
    return torch.tensor([0, *ends], dtype=torch.int32, device=device)


def gradients(f, leaves, convert=torch.clone, grad=None):
    """(output, gradients) of f(*leaves) for the incoming gradient `grad`, by default uneven and partly zero."""
    leaves = [convert(t).detach().requires_grad_() for t in leaves]
    out = f(*leaves)
    if grad is None:
        grad = torch.linspace(-1, 2, max(out.numel(), 1), device=out.device)[: out.numel()].view(out.shape)
        grad = torch.where(grad.abs() < 0.3, 0, grad)
    out.backward(grad.to(out.device, out.dtype))
    return out.detach(), [t.grad for t in leaves]
