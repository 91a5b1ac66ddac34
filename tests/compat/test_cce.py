# SPDX-License-Identifier: Apache-2.0
"""compat.cce against what cut-cross-entropy documents: cross_entropy(softcap(e @ c.T + bias).float(), targets).

The package itself needs Triton even to be imported, so its own code cannot run beside ours on a CPU.
"""

import enum

import pytest
import torch

from compare import error
from fastpost.compat.cce import linear_cross_entropy

B, T, D, V = 3, 7, 31, 203


def inputs(dtype, bias=True, seed=0):
    """Half of the classifier's rows are hidden states, so that the softmax is peaked: the package's own trick."""
    g = torch.Generator().manual_seed(seed)
    e, c = torch.randn(B, T, D, generator=g), torch.randn(V, D, generator=g) / D**0.5
    c[: B * T] = e.view(-1, D)
    targets = torch.randint(0, V, (B, T), generator=g)
    targets[0, :4] = torch.arange(4)
    targets[torch.rand(B, T, generator=g) < 0.3] = -100
    return [t.to(dtype) for t in (e, c, torch.randn(V, generator=g))][: 3 if bias else 2], targets


def definition(leaves, targets, softcap, reduction, shift):
    """Loss and log-sum-exp."""
    e, c, *bias = leaves
    if shift:
        e, targets = e[..., :-shift, :], targets[..., shift:]
    z = e @ c.T + bias[0] if bias else e @ c.T
    z = z if z.dtype == torch.float64 else z.float()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    loss = torch.nn.functional.cross_entropy(z.flatten(0, -2), targets.flatten(), reduction=reduction)
    lse = torch.where(targets == -100, 0, z.logsumexp(-1))
    return loss.view(targets.shape) if reduction == "none" else loss, lse


def gradients(f, leaves, convert):
    """With a z-loss, as training code has it: the log-sum-exp is differentiated, too."""
    leaves = [convert(t).detach().requires_grad_() for t in leaves]
    loss, lse = f(leaves)
    weights = torch.linspace(-1, 2, loss.numel()).to(loss.dtype).view(loss.shape)
    ((loss * weights).sum() + 0.1 * lse.square().sum()).backward()
    return [loss.detach().reshape(-1), lse.detach().flatten(), *(t.grad.flatten(0, -2) for t in leaves[:2])] + [
        t.grad for t in leaves[2:]
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_matches_the_definition(shift, reduction, softcap, bias, dtype):
    leaves, targets = inputs(dtype, bias)

    def f(x):
        return linear_cross_entropy(
            x[0], x[1], targets, *x[2:], softcap=softcap, reduction=reduction, shift=shift, return_lse=True
        )

    def plain(convert):
        return gradients(lambda x: definition(x, targets, softcap, reduction, shift), leaves, convert)

    ours, rounded, truth = gradients(f, leaves, torch.clone), plain(torch.clone), plain(torch.Tensor.double)
    assert f(leaves)[1].shape == (B, T - shift)
    for a, b, t in zip(ours, rounded, truth, strict=True):
        assert error(a, t) <= 2 * error(b, t) + (1e-5 if dtype == torch.float32 else 5e-3)


def test_one_result_without_lse():
    leaves, targets = inputs(torch.float32)
    loss, _ = linear_cross_entropy(*leaves[:2], targets, return_lse=True)
    assert torch.equal(loss, linear_cross_entropy(*leaves[:2], targets))
    assert torch.equal(
        linear_cross_entropy(*leaves[:2], targets, shift=True), linear_cross_entropy(*leaves[:2], targets, shift=1)
    )


def test_shift_does_not_cross_rows():
    """The last position of a row predicts nothing, least of all the first token of the next row."""
    leaves, targets = inputs(torch.float32)
    together = linear_cross_entropy(leaves[0], leaves[1], targets, reduction="none", shift=1)
    for i in range(B):
        alone = linear_cross_entropy(leaves[0][i], leaves[1], targets[i], reduction="none", shift=1)
        torch.testing.assert_close(together[i], alone)


def test_positional_order_is_cces():
    (e, c, bias), targets = inputs(torch.float32)
    targets = targets.clamp(min=7)
    named = linear_cross_entropy(
        e=e, c=c, targets=targets, bias=bias, ignore_index=7, softcap=9.0, reduction="sum", shift=1
    )
    assert torch.equal(named, linear_cross_entropy(e, c, targets, bias, 7, 9.0, "sum", 1))


class Impl(enum.IntEnum):
    CCE_EXACT = 1
    CCE_FAST = 2


def test_speed_and_precision_knobs_change_nothing():
    leaves, targets = inputs(torch.float32)
    expected = linear_cross_entropy(*leaves[:2], targets)
    for knobs in ({"filter_eps": None}, {"accum_e_fp32": True, "filter_c_grad": False}, {"impl": "torch_compile"},
                  {"impl": Impl.CCE_EXACT}):  # fmt: skip
        assert torch.equal(expected, linear_cross_entropy(*leaves[:2], targets, **knobs))


BAD = {
    "older order": ({"bias": -100}, r"bias: expected a tensor or None, got -100. Older releases"),
    "targets": ({"targets": torch.zeros(B, T + 1).long()}, r"targets: expected shape \[3, 7\], got \[3, 8\]"),
    "reduction": ({"reduction": "max"}, r"reduction: expected 'mean', 'sum' or 'none', got 'max'"),
    "long shift": ({"shift": 7}, r"shift: expected a number in \[0, 7\), got 7"),
    "negative shift": ({"shift": -1}, r"shift: expected a number in \[0, 7\), got -1"),
    "impl": ({"impl": Impl.CCE_FAST}, r"impl: expected one of cce, .*, got 'cce_fast'"),
    "parallel": ({"vocab_parallel_options": object()}, r"vocab_parallel_options: expected None"),
    "dtype": ({"c": torch.zeros(V, D).bfloat16()}, r"weight: expected float32 \[any, 31\], got bfloat16"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    (e, c, _), targets = inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"e": e, "c": c, "targets": targets} | change))
