# SPDX-License-Identifier: Apache-2.0
"""compat.torch against torch's own linear_cross_entropy, and against the definition in float64."""

import inspect

import pytest
import torch

from compare import error
from fastpost.compat.torch import linear_cross_entropy

N, D, V = 13, 31, 103


def inputs(dtype, ignored=0.3, peaked=False, seed=0):
    """hidden, weight, bias, class weights, target."""
    g = torch.Generator().manual_seed(seed)
    weight, target = torch.randn(V, D, generator=g), torch.randint(0, V, (N,), generator=g)
    hidden = weight[target] * 0.5 if peaked else torch.randn(N, D, generator=g)
    target[:2] = target[2]  # a class that comes more than once
    bias, class_weight = torch.randn(V, generator=g), torch.rand(V, generator=g) + 0.2
    target[torch.rand(N, generator=g) < ignored] = -100
    return [t.to(dtype) for t in (hidden, weight, bias)], class_weight, target


def definition(leaves, class_weight, target, reduction, smoothing):
    """-Σ_j q_j w_j log p_j with q = (1 - e) onehot + e / V, divided by the targets' weights for the mean."""
    hidden, weight, bias = leaves
    z = hidden @ weight.T + bias
    logp = (z if z.dtype == torch.float64 else z.float()).log_softmax(-1)
    scored = target != -100
    w = torch.ones(V, dtype=logp.dtype) if class_weight is None else class_weight.to(logp.dtype)
    onehot = torch.nn.functional.one_hot(target.clamp(min=0), V).to(logp.dtype)
    q = (1 - smoothing) * onehot + smoothing / V
    losses = torch.where(scored, -(q * w * logp).sum(-1), 0)
    if reduction == "none":
        return losses
    return losses.sum() / (w[target.clamp(min=0)] * scored).sum() if reduction == "mean" else losses.sum()


def gradients(f, leaves, convert):
    leaves = [convert(t).detach().requires_grad_() for t in leaves]
    out = f(leaves)
    out.backward(torch.linspace(-1, 2, out.numel()).to(out.dtype).view(out.shape))
    return [out.detach().reshape(-1), *(t.grad for t in leaves)]


OPTIONS = [
    {"reduction": reduction, "smoothing": smoothing, "weighted": weighted}
    for reduction in ("mean", "sum", "none")
    for smoothing, weighted in ((0.0, False), (0.2, False), (0.0, True), (0.3, True), (1.0, False))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peaked", [False, True], ids=["flat", "peaked"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_the_definition(options, peaked, dtype):
    leaves, class_weight, target = inputs(dtype, peaked=peaked)
    reduction, smoothing = options["reduction"], options["smoothing"]
    class_weight = class_weight if options["weighted"] else None

    def f(leaves):
        return linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], weight=class_weight, reduction=reduction,
            label_smoothing=smoothing,
        )  # fmt: skip

    def plain(convert):
        return gradients(lambda x: definition(x, class_weight, target, reduction, smoothing), leaves, convert)

    ours, rounded, truth = gradients(f, leaves, torch.clone), plain(torch.clone), plain(torch.Tensor.double)
    assert ours[0].dtype == torch.float32 and all(g.dtype == dtype for g in ours[1:])
    for a, b, t in zip(ours, rounded, truth):
        assert error(a, t) <= 2 * error(b, t) + (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_torch(options):
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    leaves, class_weight, target = inputs(torch.float32, seed=1)
    results = []
    for function in (torch.nn.functional.linear_cross_entropy, linear_cross_entropy):

        def f(leaves, function=function):
            return function(
                leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=options["reduction"],
                weight=class_weight if options["weighted"] else None, label_smoothing=options["smoothing"],
            )  # fmt: skip

        results.append(gradients(f, leaves, torch.clone))
    for a, b in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_signature_is_torchs():
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (linear_cross_entropy, torch.nn.functional.linear_cross_entropy)
    )
    assert ours == theirs


def test_one_row_without_a_batch():
    (hidden, weight, _), _, target = inputs(torch.float32, ignored=0)
    for reduction in ("mean", "sum", "none"):
        one = linear_cross_entropy(hidden[3], weight, target[3], reduction=reduction)
        assert one.shape == ()
        torch.testing.assert_close(one, torch.nn.functional.cross_entropy(hidden[3] @ weight.T, target[3]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_scored(smoothing):
    """As in torch: the mean of nothing is NaN, sums are 0, and no gradient is NaN."""
    (hidden, weight, bias), _, target = inputs(torch.float32, ignored=1.1)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    for reduction in ("mean", "sum"):
        loss = linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, reduction=reduction, label_smoothing=smoothing
        )
        assert loss.isnan() if reduction == "mean" else loss == 0
    for grad in torch.autograd.grad(loss, leaves):
        assert torch.all(grad == 0)


def test_options_of_torch_are_accepted():
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        pytest.skip("this torch has no LinearCrossEntropyOptions")
    (hidden, weight, _), _, target = inputs(torch.float32)
    expected = linear_cross_entropy(hidden, weight, target)
    assert torch.equal(expected, linear_cross_entropy(hidden, weight, target, options=options()))
    assert torch.equal(expected, linear_cross_entropy(hidden, weight, target, ignore_index=-100))


BAD = {
    "probabilities": ({"target": torch.rand(N, V)}, r"target: expected int64 class indices, got torch.float32 \[13, "),
    "K-dimensional": ({"linear_weight": torch.zeros(V, 2, D)}, r"linear_weight: expected \[V, D\], got \[103, 2, 31\]"),
    "input": ({"input": torch.zeros(2, N, D)}, r"input: expected \[N, D\] or \[D\], got \[2, 13, 31\]"),
    "target": ({"target": torch.zeros(N + 1).long()}, r"target: expected shape \[13\], got \[14\]"),
    "weight": ({"weight": torch.zeros(V - 1)}, r"weight: expected shape \[103\], got \[102\]"),
    "reduction": ({"reduction": "batchmean"}, r"reduction: expected 'mean', 'sum' or 'none', got 'batchmean'"),
    "smoothing": ({"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
    "float64": ({"input": torch.zeros(N, D).double()}, r"hidden: expected float32 or bfloat16"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    (hidden, weight, _), _, target = inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"input": hidden, "linear_weight": weight, "target": target} | change))
