# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

import fastpost
from compare import FLOATS, error, forward_and_gradients
from fastpost import _core
from fastpost.reference import token_logprob as reference

CASES = reference.cases()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    inputs = case.inputs(dtype, device)
    ours, grads = forward_and_gradients(lambda x, t: fastpost.token_logprob(x, t, **case.options), inputs, torch.clone)
    truth, true_grads = forward_and_gradients(
        lambda x, t: reference.token_logprob(x, t, **case.options), inputs, torch.Tensor.double
    )
    plain, _ = forward_and_gradients(lambda x, t: reference.token_logprob(x, t, **case.options), inputs, torch.clone)
    for a, b, t in zip(ours, plain, truth):
        assert a.dtype == torch.float32
        assert error(a, t) < 1.5 * error(b, t) + 1e-6
    # The gradient is rounded once to its dtype.
    assert grads[0].dtype == dtype
    assert error(grads[0], true_grads[0]) < {torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]


def test_certain_target_keeps_its_gradient(device):
    """p -> 1: 1 - p must not cancel."""
    logits = torch.zeros(1, 1000, device=device)
    logits[0, 7] = 15.0
    logits.requires_grad_()
    fastpost.token_logprob(logits, torch.tensor([7], device=device)).backward()
    truth = torch.zeros(1, 1000, dtype=torch.float64)
    truth[0, 7] = 15.0
    truth.requires_grad_()
    reference.token_logprob(truth, torch.tensor([7])).backward()
    assert float(truth.grad[0, 7]) > 0
    assert float(logits.grad[0, 7]) == pytest.approx(float(truth.grad[0, 7]), rel=1e-5)


def test_masked_vocabulary(device):
    """-inf logits have probability 0: they change nothing and get no gradient, in the entropy, too."""
    x = torch.randn(4, 3000, device=device)
    masked = torch.cat([x, torch.full((4, 500), -torch.inf, device=device)], dim=1).requires_grad_()
    target = torch.tensor([0, 5, 77, 2999], device=device)
    ours = fastpost.token_logprob(masked, target, return_entropy=True)
    for a, b in zip(ours, fastpost.token_logprob(x, target, return_entropy=True)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    (ours[0].sum() + ours[1].sum()).backward()
    assert torch.all(masked.grad[:, 3000:] == 0)
    assert torch.isfinite(masked.grad).all()
    everything = torch.full((1, 40), -torch.inf, device=device)
    assert torch.isnan(fastpost.token_logprob(everything, target[:1]))  # as torch.log_softmax


def test_nan_stays_in_its_row(device):
    x = torch.randn(3, 500, device=device)
    x[1, 123] = torch.nan
    logprob = fastpost.token_logprob(x, torch.zeros(3, dtype=torch.int64, device=device))
    assert torch.isnan(logprob).tolist() == [False, True, False]


def test_strided_rows_and_poisoned_output(device):
    x = torch.randn(6, 2, 900, device=device)[:, 1]  # row stride 1800
    t = torch.randint(0, 900, (6,), device=device)
    torch.testing.assert_close(fastpost.token_logprob(x, t), fastpost.token_logprob(x.contiguous(), t), rtol=0, atol=0)
    out, lse = (torch.full((6,), torch.nan, device=device) for _ in range(2))
    _core.token_logprob(x, t, 1.0, 0.0, -100, out, lse, None)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    grad = torch.full((6, 900), torch.nan, device=device)
    _core.token_logprob_backward(x, t, 1.0, 0.0, -100, out, lse, None, torch.ones(6, device=device), None, grad)
    assert torch.isfinite(grad).all()


def test_same_bits_whatever_the_threads():
    x, t = torch.randn(37, 5000), torch.randint(0, 5000, (37,))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(fastpost.token_logprob(x, t))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_opcheck(device):
    x = torch.randn(5, 70, device=device, requires_grad=True)
    t = torch.tensor([0, 3, -100, 69, 1], device=device)
    for entropy in (False, True):
        torch.library.opcheck(torch.ops.fastpost.token_logprob.default, (x, t, 0.9, 20.0, -100, entropy))


@pytest.mark.parametrize("entropy", [False, True])
def test_compiles_without_graph_break(entropy, device):
    x = torch.randn(5, 70, device=device, requires_grad=True)
    t = torch.randint(0, 70, (5,), device=device)

    def loss(x):
        out = fastpost.token_logprob(2 * x, t, temperature=0.8, return_entropy=entropy)
        return (out[0] - out[1]).sum() if entropy else out.sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif("not __import__('os').environ.get('FASTPOST_BIG')", reason="needs 5 GB: set FASTPOST_BIG=1")
def test_more_than_2_31_elements():
    logits = torch.zeros(2**15 + 1, 2**16, dtype=torch.bfloat16)
    logits[-1, 7] = 3.0
    target = torch.full((2**15 + 1,), 7)
    logprob = fastpost.token_logprob(logits, target)
    assert float(logprob[-1] - logprob[0]) == pytest.approx(3.0, abs=1e-3)


BAD = {
    "logits dtype": (lambda x, t: (x.double(), t), r"\[token_logprob\] logits: expected float32 or bfloat16 or float"),
    "logits shape": (lambda x, t: (x[None], t), r"logits: expected .* \[any, any\], got float32 \[1, 4, 9\] on cpu"),
    "target dtype": (lambda x, t: (x, t.int()), r"target: expected int64 \[4\], got int32 \[4\]"),
    "target length": (lambda x, t: (x, t[:3]), r"target: expected int64 \[4\], got int64 \[3\]"),
    "target high": (lambda x, t: (x, t + 9), r"target: .* indices in \[0, 9\) or ignore_index -100, got 9 at row 0"),
    "target negative": (lambda x, t: (x, t - 1), r"got -1 at row 0"),
    "columns": (lambda x, t: (x.T.contiguous().T, t), r"logits: expected a last dimension of stride 1, .*\.contiguous"),
    "sparse": (lambda x, t: (x.to_sparse(), t), r"logits: expected a plain torch.Tensor"),
    "meta": (lambda x, t: (x, t.to("meta")), r"target: expected a tensor on cpu, got one on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    x, t = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        fastpost.token_logprob(*change(x, t))


def test_bad_options_are_named():
    x, t = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"temperature: expected a number above 0, got 0"):
        fastpost.token_logprob(x, t, temperature=0.0)
    with pytest.raises(ValueError, match=r"softcap: expected a number above 0, or None, got -1"):
        fastpost.token_logprob(x, t, softcap=-1.0)


def test_combinations_of_options(device):
    x = torch.randn(3, 41, device=device)
    t = torch.tensor([1, -1, 40], device=device)
    for temperature, softcap in itertools.product([0.5, 2.0], [None, 5.0]):
        options = {"temperature": temperature, "softcap": softcap, "ignore_index": -1, "return_entropy": True}
        for a, b in zip(fastpost.token_logprob(x, t, **options), reference.token_logprob(x.double(), t, **options)):
            assert error(a, b) < 2e-6


def test_entropy_gradient_at_a_target_of_probability_zero(device):
    """p (log p + H) is 0 where p = 0, not 0 * infinity."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], device=device, requires_grad=True)
    _, entropy = fastpost.token_logprob(logits, torch.tensor([2], device=device), return_entropy=True)
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    other = torch.tensor([[0.0, 1.0, -80.0]], dtype=torch.float64, requires_grad=True)
    p = other.softmax(-1)
    (expected,) = torch.autograd.grad(-(p * p.log()).sum(), other)
    torch.testing.assert_close(gradient.double().cpu(), expected, rtol=1e-5, atol=1e-6)
