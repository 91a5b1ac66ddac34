# SPDX-License-Identifier: Apache-2.0
"""Double backward of linear_logprob. float64 runs the very loops, plans and formulas of the other dtypes, with plain
torch only in place of the kernels, so gradcheck here proves more than torch's own autograd."""

import pytest
import torch

import fastpost
from compare import error
from fastpost.reference import linear_logprob as reference

OPTIONS = {
    "plain": {},
    "everything": {"temperature": 1.4, "softcap": 3.0, "return_entropy": True},
    "entropy": {"return_entropy": True},
}


def inputs_of(n=5, d=3, v=7, rank=2, ignored=(1,), dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    shapes = (n, d), (v, d), (v,), (n, rank), (v, rank)
    tensors = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    target = torch.randint(0, v, (n,), generator=g)
    target[list(ignored)] = -100
    return target, tensors


def function(op, target, options):
    return lambda h, w, bias, a, b: op(h, w, target, bias=bias, low_rank=(a, b), **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=["first", "second"])
def test_gradcheck(check, options):
    target, tensors = inputs_of()
    assert check(function(fastpost.linear_logprob, target, options), tensors)


@pytest.mark.parametrize("n", [1, 4])
def test_gradgradcheck_without_extras(n):
    """No bias, no pair; one frozen input at a time."""
    target, (hidden, weight, *_) = inputs_of(n=n, ignored=())
    for frozen in (None, hidden, weight):
        leaves = [t.detach().requires_grad_(t is not frozen) for t in (hidden, weight)]
        assert torch.autograd.gradgradcheck(lambda h, w: fastpost.linear_logprob(h, w, target), leaves)


def second(op, target, tensors, options, seed=7):
    """Gradients of a random function of the first gradients, to the inputs and to what came in for the outputs."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda t: torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)  # noqa: E731
    outputs = function(op, target, options)(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [draw(o).requires_grad_() for o in outputs]
    first = torch.autograd.grad(outputs, tensors, incoming, create_graph=True)
    return torch.autograd.grad(sum((draw(f) * f).sum() for f in first), (*tensors, *incoming))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("budget", [1 << 20, 256 << 20])
def test_float32_agrees_with_float64(options, budget):
    """The kernels' first derivatives with the formula on top, against autograd twice through the float64 definition;
    the small budget cuts rows into several blocks."""
    size = dict(n=150, d=12, v=1501, rank=3, ignored=range(0, 150, 7))
    target, tensors = inputs_of(**size, dtype=torch.float32)
    truth = second(reference.linear_logprob, target, [t.double().detach().requires_grad_() for t in tensors], options)
    plain = second(reference.linear_logprob, target, tensors, options)
    ours = second(fastpost.linear_logprob, target, tensors, options | {"memory_budget": budget})
    for a, b, t in zip(ours, plain, truth):
        assert a.dtype == torch.float32
        assert error(a, t) <= 2 * error(b, t) + 1e-6


def test_bfloat16_agrees_with_float64():
    target, tensors = inputs_of(n=40, d=12, v=300, dtype=torch.bfloat16)
    options = OPTIONS["everything"]
    truth = second(reference.linear_logprob, target, [t.double().detach().requires_grad_() for t in tensors], options)
    plain = second(reference.linear_logprob, target, tensors, options)
    for a, b, t in zip(second(fastpost.linear_logprob, target, tensors, options), plain, truth):
        assert error(a, t) <= 1.5 * error(b, t) + 1e-2


def test_float64_is_exact_whatever_the_sweep():
    """Forward, backward and double backward with kept and recomputed rows and every order of summation."""
    for n, d, v in ((600, 8, 2500), (1250, 8, 600), (1050, 64, 850)):
        target, tensors = inputs_of(n, d, v, ignored=range(0, n, 5))
        ours = second(fastpost.linear_logprob, target, tensors, {"memory_budget": 1 << 20})
        for a, t in zip(ours, second(reference.linear_logprob, target, tensors, {})):
            assert error(a, t) < 1e-12


def test_hessian_vector_product_and_third_derivative():
    target, (hidden, weight, *_) = inputs_of(ignored=())
    v = torch.randn(hidden.shape, dtype=torch.float64)

    def loss(op):
        return lambda h: op(h, weight, target).square().sum()

    for call in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        ours, plain = (call(loss(op), hidden, v)[1] for op in (fastpost.linear_logprob, reference.linear_logprob))
        torch.testing.assert_close(ours, plain)

    def third(op):
        for _ in range(2):
            g = torch.autograd.grad(loss(op)(hidden), hidden, create_graph=True)[0]
            g = torch.autograd.grad((g * v).sum(), hidden, create_graph=True)[0]
        return torch.autograd.grad((g * v).sum(), (hidden, weight))

    for ours, plain in zip(third(fastpost.linear_logprob), third(reference.linear_logprob)):
        torch.testing.assert_close(ours, plain)


def test_a_bias_of_minus_infinity_shuts_a_token_out():
    """As if it were not in the vocabulary: p log p is 0 and not NaN, in all three passes."""
    target, (hidden, weight, *_) = inputs_of(ignored=())
    out = next(i for i in range(7) if i not in target)
    bias = torch.zeros(7, dtype=torch.float64).index_fill(0, torch.tensor(out), -torch.inf)
    left = torch.cat([weight[:out], weight[out + 1 :]]).detach().requires_grad_()
    results = []
    for op, w, y, b in (
        (fastpost.linear_logprob, weight, target, bias),
        (reference.linear_logprob, left, target - (target > out).long(), None),
    ):
        logprob, entropy = op(hidden, w, y, bias=b, return_entropy=True)
        g = torch.autograd.grad(logprob.sum() + entropy.sum(), hidden, create_graph=True)[0]
        results.append([logprob, entropy, g, torch.autograd.grad(g.square().sum(), w)[0]])
    assert results[0][3][out].count_nonzero() == 0
    results[0][3] = torch.cat([results[0][3][:out], results[0][3][out + 1 :]])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain)


def test_float64_needs_all_inputs_in_float64():
    args = torch.randn(4, 8).double(), torch.randn(20, 8).double(), torch.zeros(4, dtype=torch.int64)
    out, entropy = fastpost.linear_logprob(*args, return_entropy=True)
    assert out.dtype == entropy.dtype == torch.float64
    with pytest.raises(ValueError, match=r"hidden: expected float32 or bfloat16.*got float64"):
        fastpost.linear_logprob(args[0], args[1].float(), args[2])
    with pytest.raises(ValueError, match=r"weight: expected float64 \[any, 8\], got float64 \[8, 20\]"):
        fastpost.linear_logprob(args[0], args[1].T, args[2])
