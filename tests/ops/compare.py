# SPDX-License-Identifier: Apache-2.0
"""Run an op and its reference on the same inputs; errors are relative to the float64 truth."""

import torch

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def error(ours, truth):
    """Largest row error relative to the row's norm (for a vector: to its own norm); 0 for empty."""
    if truth.numel() == 0:
        return 0.0
    a, b = ours.detach().double().cpu(), truth.detach().double().cpu()
    a, b = (a, b) if a.ndim > 1 else (a[None], b[None])
    floor = 1e-3 * b.norm() / max(1, b.shape[0]) ** 0.5 + 1e-30  # rows of nearly nothing: against the typical row
    return float(((a - b).norm(dim=1) / (b.norm(dim=1) + floor)).max())


def overall(ours, truth):
    """Error over the whole tensor, relative to its norm."""
    a, b = ours.detach().double().cpu(), truth.detach().double().cpu()
    return float((a - b).norm() / (b.norm() + 1e-30))


def forward_and_gradients(f, tensors, convert, seed=1):
    """Outputs of f(*tensors) and gradients for uneven incoming gradients, some of them zero."""
    leaves = [
        None if t is None else (convert(t).detach().requires_grad_() if t.is_floating_point() else t) for t in tensors
    ]
    outputs = as_tuple(f(*leaves))
    g = torch.Generator().manual_seed(seed)
    grads = []
    for o in outputs:
        grad = torch.randn(o.shape, generator=g)
        grad[torch.rand(o.shape, generator=g) < 0.2] = 0
        grads.append(grad.to(o.device, o.dtype))
    torch.autograd.backward(outputs, grads)
    return outputs, [t.grad for t in leaves if t is not None and t.is_floating_point()]
