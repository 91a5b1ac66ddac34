# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from compare import error
from fastpost.nn import restore_linear, use_decode_linear
from fastpost.nn.decode_linear import DecodeLinear
from fastpost.ops import _few_rows


def make(k, n, bias, dtype=torch.bfloat16):
    torch.manual_seed(k + n)
    return nn.Linear(k, n, bias=bias).to(dtype)


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16, 17, 32])
@pytest.mark.parametrize("k, n, bias", [(576, 192, False), (1536, 576, True), (33, 7, True), (64, 1, False)])
def test_matches_float64(k, n, bias, rows):
    layer = make(k, n, bias)
    x = torch.randn(rows, k).bfloat16()
    truth = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad():
        plain = layer(x)
        assert use_decode_linear(layer) == 1
        assert _few_rows.fits(x, layer.weight)
        ours = layer(x)
    assert ours.dtype == torch.bfloat16 and ours.shape == (rows, n)
    assert error(ours, truth) < max(4e-3, 1.05 * error(plain, truth))


def test_a_row_does_not_depend_on_the_others():
    layer = make(576, 100, True)
    use_decode_linear(layer)
    x = torch.randn(8, 576).bfloat16()
    with torch.no_grad():
        together = layer(x)
        for i in range(8):
            assert torch.equal(layer(x[i]), together[i])
        assert torch.equal(layer(x.view(2, 4, 576)), together.view(2, 4, 100))
        assert torch.equal(layer(x.T.contiguous().T), together)


def test_the_default_device_is_not_asked():
    layer, x = make(40, 11, True), torch.randn(3, 40).bfloat16()
    use_decode_linear(layer)
    with torch.no_grad():
        want = layer(x)
        _few_rows._offset.cache_clear(), _few_rows._bytes.cache_clear()
        with torch.device("meta"):
            assert torch.equal(layer(x), want)
        assert layer.to("meta")(x.to("meta")).shape == (3, 11)


def test_what_does_not_fit_goes_as_before(monkeypatch):
    calls = []
    monkeypatch.setattr(_few_rows, "linear", lambda *a: calls.append(a))
    layer = make(64, 16, True)
    use_decode_linear(layer)
    x = torch.randn(4, 64).bfloat16()
    assert layer(x).requires_grad  # training
    with torch.no_grad():
        layer(torch.randn(33, 64).bfloat16())
        layer(x[:0])
        layer.float()(x.float())
    assert not calls


def test_changes_classes_and_nothing_else():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4), nn.ModuleList([nn.Linear(4, 2)]))
    names = list(model.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    assert use_decode_linear(model) == 2
    assert type(model[0]) is DecodeLinear and type(model[1]) is Special
    assert list(model.state_dict()) == names and [p.data_ptr() for p in model.parameters()] == pointers
    assert restore_linear(model) == 2 and type(model[2][0]) is nn.Linear
