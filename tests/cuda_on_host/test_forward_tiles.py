# SPDX-License-Identifier: Apache-2.0
"""linear_logprob_forward and what belongs to it: the arithmetic at the end of each tile, the fold over tiles, the
gradient from exponentials, the compaction of rows. Only the matrix product itself is made by other means here."""

import math
import shutil

import on_host
import pytest
import torch

from compare import error
from fastpost import _core
from fastpost.reference import token_logprob as token_reference

pytestmark = pytest.mark.skipif(shutil.which(on_host.COMPILER) is None, reason=f"needs {on_host.COMPILER}")
NAN, INF = torch.nan, torch.inf
COLUMNS = 256


def floats(*shape):
    return torch.full(shape, NAN)  # outputs are poisoned: what is not written shows


def inputs(n, v, d=16, scale=1.0):
    return (scale * torch.randn(n, d)).bfloat16(), torch.randn(v, d).bfloat16(), torch.randint(0, v, (n,))


def fresh_stats(n):
    stats = torch.zeros(5, n)
    stats[0], stats[4] = -INF, NAN
    return stats


def forward(core, hidden, weight, target, bias=None, vocab_start=0, temperature=1.0, softcap=0.0, entropy=True,
            exponentials=None, stats=None):  # fmt: skip
    """stats and the partial statistics."""
    n, v = len(hidden), len(weight)
    stats = fresh_stats(n) if stats is None else stats
    partials = floats(4 if entropy else 3, math.ceil(v / COLUMNS), n)
    core.linear_logprob_forward(
        hidden, weight, bias, target, vocab_start, temperature, softcap, entropy, exponentials, partials, stats
    )
    return stats, partials


def finish(core, stats, entropy=True):
    n = stats.shape[1]
    out = floats(n), floats(n), floats(n) if entropy else None
    core.linear_logprob_finish(stats, *out)
    return out


def logits(hidden, weight, bias=None):
    z = hidden.double() @ weight.double().T
    return z if bias is None else z + bias.double()


def truth(z, target, temperature=1.0, softcap=None):
    return token_reference.token_logprob(z, target, temperature=temperature, softcap=softcap, return_entropy=True)


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("n,v", [(1, 1), (3, 255), (127, 256), (128, 257), (129, 1000), (300, 520), (2, 4900)])
def test_statistics(n, v, softcap, core):
    hidden, weight, target = inputs(n, v)
    bias = torch.randn(v).bfloat16()
    stats, partials = forward(core, hidden, weight, target, bias, 0, 0.7, softcap or 0.0)
    assert torch.isfinite(stats).all() and torch.isfinite(partials).all()
    logprob, lse, entropy = finish(core, stats)
    z = logits(hidden, weight, bias)
    true_logprob, true_entropy = truth(z, target, 0.7, softcap)
    z = (z if softcap is None else softcap * (z / softcap).tanh()) / 0.7
    assert error(lse, z.logsumexp(1)) < 1e-6
    assert error(logprob, true_logprob) < 2e-6 and error(entropy, true_entropy) < 4e-6
    without, three = forward(core, hidden, weight, target, bias, 0, 0.7, softcap or 0.0, entropy=False)
    assert torch.equal(without[[0, 1, 2, 4]], stats[[0, 1, 2, 4]]) and torch.equal(three, partials[:3])


def test_slices_of_the_vocabulary_add_up(core):
    hidden, weight, target = inputs(70, 900)
    whole, _ = forward(core, hidden, weight, target)
    stats = fresh_stats(70)
    for a, b in ((0, 300), (300, 310), (310, 900)):
        forward(core, hidden, weight[a:b], target, vocab_start=a, stats=stats)
    for a, b in zip(finish(core, stats), finish(core, whole)):
        assert error(a, b) < 1e-6
    lost = target.clone()
    lost[::2] = -100
    lost[1] = 900
    assert torch.isnan(forward(core, hidden, weight, lost)[0][4]).tolist() == [i % 2 == 0 or i == 1 for i in range(70)]


def test_peaked_rows_keep_their_bits(core):
    """p -> 1, several logits at the maximum, in one tile and in two; 1/temperature is no float32 number."""
    hidden = torch.full((3, 8), 1.0).bfloat16()
    weight = torch.zeros(600, 8).bfloat16()
    bias = torch.zeros(3, 600)
    bias[0, 7] = bias[1, [7, 9]] = bias[2, [7, 599]] = 33.25
    for row in range(3):
        b, target = bias[row].bfloat16(), torch.full((3,), 7)
        logprob, _, entropy = finish(core, forward(core, hidden, weight, target, b, temperature=0.7)[0])
        true_logprob, true_entropy = truth(logits(hidden, weight, b), target, 0.7)
        assert float(logprob[0]) == pytest.approx(float(true_logprob[0]), rel=2e-6)
        assert float(entropy[0]) == pytest.approx(float(true_entropy[0]), rel=1e-5)


def test_masked_and_broken_logits(core):
    """A whole tile of -inf, -inf in between, and NaN that stays in its row."""
    hidden, weight, target = inputs(5, 800)
    target[:] = 300
    bias = torch.zeros(800)
    bias[:256] = bias[400:500] = -INF
    bias = bias.bfloat16()
    hidden[3, 2] = NAN
    exponentials = torch.full((5, 800), NAN).half()
    stats, _ = forward(core, hidden, weight, target, bias, exponentials=exponentials)
    allowed = torch.isfinite(bias)
    logprob, lse, entropy = finish(core, stats)
    true_logprob, true_entropy = truth(logits(hidden, weight)[:, allowed], target - 256)
    good = [0, 1, 2, 4]
    assert error(logprob[good], true_logprob[good]) < 1e-6 and error(entropy[good], true_entropy[good]) < 2e-6
    assert torch.isnan(logprob[3]) and torch.isnan(lse[3]) and torch.isnan(entropy[3])
    assert torch.all(exponentials[good][:, ~allowed] == 0) and torch.isfinite(exponentials[good]).all()
    nothing = forward(core, hidden, weight, target, torch.full((800,), -INF).bfloat16())[0]
    assert torch.all(nothing[0, good] == -INF) and torch.all(nothing[1:4, good] == 0)


def test_a_row_does_not_depend_on_its_company(core):
    hidden, weight, target = inputs(200, 700)
    whole = finish(core, forward(core, hidden, weight, target)[0])
    alone = [finish(core, forward(core, hidden[i : i + 1], weight, target[i : i + 1])[0]) for i in (0, 77, 199)]
    for k, i in enumerate((0, 77, 199)):
        assert all(torch.equal(a, w[i : i + 1]) for a, w in zip(alone[k], whole))


# ---- exponentials and the gradient made of them ----


@pytest.mark.parametrize("extra", [0, 3, 8])  # between rows: aligned for 16 bytes or not
@pytest.mark.parametrize("n,v", [(1, 1), (130, 255), (5, 513), (40, 1003)])
def test_exponentials(n, v, extra, core):
    hidden, weight, target = inputs(n, v)
    room = torch.full((n + 1, v + extra), NAN).half()
    _, partials = forward(core, hidden, weight, target, exponentials=room[:n, :v])
    assert torch.isnan(room[n]).all() and torch.isnan(room[:, v:]).all()
    z = logits(hidden, weight)
    for tile, part in enumerate(z.split(COLUMNS, dim=1)):
        most = part.max(1, keepdim=True).values
        torch.testing.assert_close(partials[0, tile].double(), most[:, 0], rtol=1e-6, atol=1e-6)
        ours = (room[:n, :v].double() / 2**15).split(COLUMNS, dim=1)[tile]
        torch.testing.assert_close(ours, (part - most).exp(), rtol=2**-11, atol=2**-40)


def gradient_truth(hidden, weight, bias, target, temperature, softcap, g, h, rounded=False):
    """In float64; `rounded` as where logits and gradient are stored in bfloat16."""
    z = logits(hidden, weight)
    if rounded:
        z = z.bfloat16().double()
    z = (z if bias is None else z + bias.double()).requires_grad_()
    logprob, entropy = truth(z, target, temperature, softcap)
    ((logprob * g.double()).sum() + (entropy * h.double()).sum()).backward()
    return z.grad.bfloat16() if rounded else z.grad


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("v", [1, 9, 256, 300, 1003])
def test_gradient_from_exponentials(v, softcap, with_entropy, core):
    n = 9
    hidden, weight, target = inputs(n, v, scale=2.0)
    target[0], target[1] = 0, v - 1
    bias = torch.randn(v).bfloat16()
    exponentials = torch.full((n, v + 1), NAN).half()[:, :v]
    stats, partials = forward(core, hidden, weight, target, bias, 0, 1.3, softcap or 0.0, True, exponentials)
    logprob, lse, entropy = finish(core, stats)
    g, h = torch.randn(n), torch.randn(n) if with_entropy else torch.zeros(n)
    g[4] = h[4] = 0
    if with_entropy:
        g[5] = 0
    exponentials[4] = NAN  # a row without gradient is not read
    grad = torch.full((n, v), NAN).bfloat16()
    arguments = (partials[0], target, 0, 1.3, softcap or 0.0, logprob, lse, entropy, g, h if with_entropy else None)
    core.linear_logprob_exponentials_backward(exponentials, *arguments, grad)
    in_place = exponentials.view(torch.bfloat16)
    core.linear_logprob_exponentials_backward(exponentials, *arguments, in_place)
    assert torch.equal(grad, in_place) and torch.all(grad[4] == 0)
    true_grad = gradient_truth(hidden, weight, bias, target, 1.3, softcap, g, h)
    plain = gradient_truth(hidden, weight, bias, target, 1.3, softcap, g, h, rounded=True)
    assert error(grad, true_grad) < max(2.5e-3, error(plain, true_grad))
    # A slice of the vocabulary alone, its tiles and a block of rows.
    if v > COLUMNS:
        forward(core, hidden, weight, target, bias, 0, 1.3, softcap or 0.0, True, exponentials)
        part = exponentials[2:8, COLUMNS:]
        block = [x if x is None else x[2:8] for x in (target, logprob, lse, entropy, *arguments[-2:])]
        core.linear_logprob_exponentials_backward(part, partials[0][1:, 2:8], block[0], COLUMNS, 1.3, softcap or 0.0,
                                                  *block[1:], part.view(torch.bfloat16))  # fmt: skip
        assert torch.equal(part.view(torch.bfloat16), grad[2:8, COLUMNS:])


def test_exponentials_are_better_than_bfloat16_logits(core):
    """Large logits: rounded to bfloat16 they move p by a factor e^(|z|/512), exponentials by 1/4096 of p."""
    hidden, weight, target = inputs(64, 600, d=64, scale=1.0)
    g, h = torch.ones(64), torch.zeros(64)
    exponentials = torch.empty(64, 600).half()
    stats, partials = forward(core, hidden, weight, target, exponentials=exponentials)
    logprob, lse, _ = finish(core, stats)
    core.linear_logprob_exponentials_backward(
        exponentials, partials[0], target, 0, 1.0, 0.0, logprob, lse, None, g, None, exponentials.view(torch.bfloat16)
    )
    true_grad = gradient_truth(hidden, weight, None, target, 1.0, None, g, h)
    plain = gradient_truth(hidden, weight, None, target, 1.0, None, g, h, rounded=True)
    assert error(exponentials.view(torch.bfloat16), true_grad) < 0.25 * error(plain, true_grad)


def test_target_in_another_slice_has_no_column_here(core):
    hidden, weight, target = inputs(3, 300)
    target[:] = torch.tensor([-100, 299, 300])
    exponentials = torch.empty(3, 300).half()
    stats, partials = forward(core, hidden, weight, torch.zeros_like(target), exponentials=exponentials)
    logprob, lse, _ = finish(core, stats)
    grad = torch.full((3, 300), NAN).bfloat16()
    core.linear_logprob_exponentials_backward(
        exponentials, partials[0], target, 0, 1.0, 0.0, logprob, lse, None, torch.ones(3), None, grad
    )
    p = logits(hidden, weight).softmax(1)
    assert error(grad[[0, 2]], -p[[0, 2]]) < 4e-3 and float(grad[1, 299]) > 0


# ---- where it runs, and for whom ----


def test_where_it_runs(core):
    hidden, weight, _ = inputs(4, 30)
    columns = core.linear_logprob_forward_columns
    assert columns(hidden, weight) == 0  # compute capability 8
    core.set_capability(9)
    try:
        assert columns(hidden, weight) == COLUMNS and columns(hidden[::2], weight[5:]) == COLUMNS
        wide = torch.empty(4, 36).bfloat16()
        no = [
            (hidden.float(), weight.float()), (hidden.half(), weight.half()),
            (hidden[:, :12], weight[:, :12]), (hidden[:, 1:9], weight[:, :8]), (hidden[:, ::2], weight[:, :8]),
            (wide[:, :16], weight), (hidden[:0], weight), (hidden, weight[:0]), (hidden[:, :0], weight[:, :0]),
            (hidden[:1].expand(4, 16), weight), (hidden, weight.T.contiguous().T),
        ]  # fmt: skip
        assert [columns(*pair) for pair in no] == [0] * len(no)
        core.set_capability(10)
        assert columns(hidden, weight) == 0
    finally:
        core.set_capability(8)
    assert _core.linear_logprob_forward_columns(hidden, weight) == 0  # on a CPU


def test_on_a_cpu_the_core_refuses():
    hidden, weight, target = inputs(4, 30)
    with pytest.raises(
        ValueError, match=r"\[linear_logprob\] hidden: expected what .* accepts, got bfloat16 \[4, 16\]"
    ):
        forward(_core, hidden, weight, target)
    with pytest.raises(ValueError, match=r"\[linear_logprob_backward\] exponentials: expected a CUDA tensor"):
        _core.linear_logprob_exponentials_backward(hidden.half(), None, target, 0, 1.0, 0.0, *[None] * 5, hidden)


# ---- rows ----


@pytest.mark.parametrize("n", [0, 1, 31, 33, 1024, 1025, 5000])
@pytest.mark.parametrize("kind", ["scored", "with gradient", "with entropy gradient"])
def test_rows(n, kind, core):
    target = torch.randint(0, 9, (n,))
    target[torch.rand(n) < 0.3] = -7
    g, h = torch.randn(n) * (torch.rand(n) < 0.5), torch.randn(n) * (torch.rand(n) < 0.2)
    takes_part = target != -7
    if kind != "scored":
        takes_part &= (g != 0) | (h != 0) if kind == "with entropy gradient" else g != 0
    expected = torch.cat([takes_part.nonzero()[:, 0], (~takes_part).nonzero()[:, 0]])
    for where in (core, _core):
        rows, count = torch.full((n,), -1), torch.tensor([-1])
        where.linear_logprob_rows(
            target, -7, None if kind == "scored" else g, h if kind == "with entropy gradient" else None, rows, count
        )
        assert torch.equal(rows, expected) and int(count) == int(takes_part.sum())


def test_rows_refuse_what_does_not_fit():
    target = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[linear_logprob\] rows: expected int64 \[3\], got int32 \[3\]"):
        _core.linear_logprob_rows(target, -1, None, None, torch.zeros(3, dtype=torch.int32), torch.zeros(1).long())
