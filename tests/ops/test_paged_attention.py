# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import fastpost
from compare import error, forward_and_gradients
from fastpost import _core
from fastpost.reference import paged_attention as reference

CASES = reference.cases()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, device):
    inputs = case.inputs(torch.float32, device)
    ours, grads = forward_and_gradients(fastpost.paged_attention, inputs, torch.clone)
    truth, true_grads = forward_and_gradients(reference.paged_attention, inputs, torch.Tensor.double)
    plain, _ = forward_and_gradients(reference.paged_attention, inputs, torch.clone)
    assert ours[0].dtype == torch.float32
    assert error(ours[0], truth[0]) < 10 * error(plain[0], truth[0]) + 1e-6  # FILL IN: how exact it has to be
    assert error(grads[0], true_grads[0]) < 1e-6


def test_poisoned_output(device):
    x = torch.randn(6, 2, 900, device=device)[:, 1]  # row stride 1800
    out = torch.full((6,), torch.nan, device=device)
    _core.paged_attention(x, out)
    torch.testing.assert_close(out, fastpost.paged_attention(x.contiguous()), rtol=0, atol=0)
    grad = torch.full((6, 900), torch.nan, device=device)
    _core.paged_attention_backward(out, grad)
    assert torch.isfinite(grad).all()


def test_opcheck(device):
    x = torch.randn(5, 70, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.fastpost.paged_attention.default, (x,))


BAD = {
    "dtype": (lambda x: x.double(), r"\[paged_attention\] x: expected float32 \[any, any\], got float64 \[4, 9\]"),
    "shape": (lambda x: x[0], r"x: expected float32 \[any, any\], got float32 \[9\]"),
    "columns": (lambda x: x.T.contiguous().T, r"x: expected a last dimension of stride 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        fastpost.paged_attention(change(torch.randn(4, 9)))
