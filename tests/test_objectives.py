# SPDX-License-Identifier: Apache-2.0
"""Objectives: closed forms, the compiled core against autograd of the plain definition, and readable refusals."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from fastpost import objectives as o
from fastpost.ops.preference_loss import preference_loss_from_logprob

LN2 = math.log(2)
F64 = torch.float64


def compiled(objective, logprob, length, reference_logprob=None, previous_logprob=None, reward=None, kl=None):
    """The compiled core on given per-sequence sums: each sequence's sum sits on its first token, the rest is 0.

    Returns (losses, d losses.sum() / d logprob, rewards).
    """
    length = length.long()
    end = length.cumsum(0)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), end]).int()
    tokens = torch.zeros(int(end[-1]), dtype=logprob.dtype)
    first = (end - length)[length > 0]
    tokens[first] = logprob[length > 0]
    tokens.requires_grad_()
    out = preference_loss_from_logprob(
        tokens,
        torch.zeros(len(tokens), dtype=torch.int64),
        cu_seqlens,
        objective,
        reference_logprob=reference_logprob,
        previous_logprob=previous_logprob,
        reward=reward,
        kl=kl,
    )
    (grad,) = torch.autograd.grad(out.losses.sum(), tokens)
    derivative = torch.zeros_like(logprob)
    derivative[length > 0] = grad[first]
    return out.losses.detach(), derivative, out.rewards


def plain(objective, logprob, length, reference_logprob=None, previous_logprob=None, reward=None, kl=None):
    x = logprob.clone().requires_grad_()
    losses = objective(x, length, reference_logprob, previous_logprob, reward, kl)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    return losses.detach(), grad, objective.rewards(logprob, length, reference_logprob, previous_logprob)


def pair(*values):
    return torch.tensor(values, dtype=F64)


@pytest.fixture(params=[plain, compiled], ids=["plain", "compiled"])
def loss_of(request):
    """Loss of one pair and its derivative with respect to the summed log-prob of the chosen reply."""

    def run(objective, logprob, length=(1, 1), **columns):
        columns = {name: pair(*value) for name, value in columns.items()}
        losses, grad, _ = request.param(objective, pair(*logprob), torch.tensor(length), **columns)
        return losses.item(), grad[0].item()

    return run


# ---- closed forms: numbers worked out by hand for each method ----


def test_dpo_closed_forms(loss_of):
    at_reference = {"logprob": (-7.0, -9.0), "reference_logprob": (-7.0, -9.0)}
    ten_apart = {"logprob": (-5.0, -20.0), "reference_logprob": (-10.0, -15.0)}  # ratio difference 10
    assert loss_of(o.DPO(), **at_reference)[0] == LN2
    assert loss_of(o.DPO(beta=0.1), **ten_apart)[0] == pytest.approx(0.313262, abs=5e-7)
    loss, slope = loss_of(o.DPO(beta=0.1, label_smoothing=0.1), **ten_apart)
    assert loss == pytest.approx(0.413262, abs=5e-7)
    s = 1 / (1 + math.exp(-1))
    assert slope == pytest.approx(0.1 * (-0.9 * (1 - s) + 0.1 * s))
    # SPaR: at the reference ln 2 + 0.1 mean NLL of the chosen reply; with weight 0 it is DPO
    assert loss_of(o.DPO(sft_weight=0.1), length=(4, 3), **at_reference)[0] == pytest.approx(LN2 + 0.1 * 7 / 4)


def test_simpo_closed_forms(loss_of):
    assert loss_of(o.SimPO(2.0, 0.5), (-1.0, -1.5))[0] == pytest.approx(LN2, abs=1e-12)
    loss, slope = loss_of(o.SimPO(2.5, 0.55), (-0.8 * 4, -1.6 * 3), (4, 3))
    assert loss == pytest.approx(0.428701, abs=5e-7)
    assert slope * 4 == pytest.approx(-0.871613, abs=5e-7)  # with respect to the mean log-prob
    gamma = 2.0 * 0.7
    assert loss_of(o.SimPO(2.0, 0.7), (-3.0, -1.5), (2, 1))[0] == pytest.approx(math.log1p(math.exp(gamma)))
    twice_as_long = loss_of(o.SimPO(2.5, 0.55), (-0.8 * 8, -1.6 * 6), (8, 6))[0]
    assert twice_as_long == pytest.approx(loss, rel=1e-14)


def test_inpo_closed_forms(loss_of):
    columns = {"reference_logprob": (1.0, 0.0), "previous_logprob": (2.0, 0.0)}
    loss, slope = loss_of(o.INPO(eta=0.0075, ratio=1 / 3), (3.0, 0.0), **columns)
    assert loss == pytest.approx(4268.444, abs=5e-4)
    assert slope == pytest.approx(2 * (4 / 3 - 1 / 0.015))
    # tau = eta, or pi_t = reference, is IPO on sums
    same = {"reference_logprob": (1.0, -2.0)}
    ipo = loss_of(o.IPO(beta=0.5, normalization="sum"), (3.0, -3.0), (4, 9), **same)[0]
    assert ipo == 4.0  # ratio difference 3
    assert loss_of(o.INPO(0.5, 1.0), (3.0, -3.0), **same, previous_logprob=(5.0, 6.0))[0] == ipo
    assert loss_of(o.INPO(0.5, 0.4), (3.0, -3.0), **same, previous_logprob=(1.0, -2.0))[0] == pytest.approx(ipo)
    at_optimum = loss_of(o.INPO(0.5, 1.0), (1.0, 0.0), reference_logprob=(0.0, 0.0), previous_logprob=(0.0, 0.0))
    assert at_optimum == (0.0, 0.0)


@pytest.mark.parametrize("cls", [o.REBEL, o.REFUEL])
def test_rebel_and_refuel_closed_forms(loss_of, cls):
    columns = {"previous_logprob": (-4.0, -6.0), "reward": (1.3, 0.5)}
    loss, slope = loss_of(cls(eta=0.5), (-3.8, -6.1), **columns)  # A = 0.3
    assert loss == pytest.approx(0.01)
    assert slope == pytest.approx(-0.2)
    assert loss_of(cls(eta=0.5), (-4.0, -6.0), **columns)[0] == pytest.approx(0.5**2 * 0.8**2)
    assert loss_of(cls(eta=0.5), (-3.6, -6.0), **columns)[1] == pytest.approx(0, abs=1e-15)  # A = eta dR


def test_orpo_closed_forms(loss_of):
    loss, _ = loss_of(o.ORPO(beta=0.1), (-1.0 * 3, -2.0 * 5), (3, 5))
    assert loss == pytest.approx(1.023818, abs=5e-7)
    odds = o.ORPO._log_odds(pair(-1.0, -2.0))
    assert (odds[0] - odds[1]).item() == pytest.approx(1.313262, abs=5e-7)


def test_lndpo_closed_forms(loss_of):
    columns = {"reference_logprob": (0.0, 0.0)}
    assert loss_of(o.LNDPO(10.0), (2.0, -1.0), (4, 5), **columns)[0] == pytest.approx(9.114665e-4, rel=5e-7)
    assert loss_of(o.LNDPO(10.0), (0.0, 0.0), (4, 5), **columns)[0] == LN2
    equal_lengths = loss_of(o.LNDPO(10.0), (2.0, -1.0), (8, 8), **columns)
    assert equal_lengths == pytest.approx(loss_of(o.DPO(10.0 / 8), (2.0, -1.0), (8, 8), **columns))


def test_kto_and_sft_closed_forms(loss_of):
    columns = {"reference_logprob": (-3.0, -3.0)}
    for kl, shift in ((None, 0.0), (2.0, 2.0), (-2.0, 0.0)):
        objective = o.KTO(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
        args = pair(-1.0, -2.0), torch.tensor([1, 1]), pair(-3.0, -3.0)
        for run in (plain, compiled):
            losses, _, _ = run(objective, *args, reward=pair(1.0, -1.0), kl=kl)
            desirable = 2 * (1 - 1 / (1 + math.exp(-0.5 * (2 - shift))))
            undesirable = 3 * (1 - 1 / (1 + math.exp(-0.5 * (shift - 1))))
            assert losses.tolist() == pytest.approx([desirable, undesirable])
    losses, grad, _ = plain(o.SFT(), pair(-3.0, -5.0), torch.tensor([2, 6]), **columns)
    assert losses.tolist() == [3.0, 5.0] and grad.tolist() == [-1.0, -1.0]
    assert o.SFT().count(torch.tensor([2, 6])).item() == 8  # the mean is over tokens


def test_bco_closed_forms():
    args = pair(-1.0, -2.0), torch.tensor([3, 4]), pair(-3.0, -1.0)  # rewards beta (2, -1)
    log_s = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    for run in (plain, compiled):
        for delta in (0.3, -0.4, torch.tensor([0.3], dtype=F64)):
            losses, grad, rewards = run(o.BCO(0.5), *args, kl=delta)
            d = float(delta)
            assert losses.item() == pytest.approx(-log_s(1.0 - d) - log_s(0.5 + d))
            assert grad[0].item() == pytest.approx(-0.5 / (1 + math.exp(1.0 - d)))
            assert rewards.tolist() == [1.0, -0.5]
        torch.testing.assert_close(run(o.BCO(0.5), *args), run(o.DPO(0.5, "bco_pair"), *args))


def test_xpo_closed_forms(loss_of):
    """Algorithm 1: DPO's loss and alpha times the log-prob of the reference's own reply, be it chosen or rejected."""
    columns = {"reference_logprob": (-10.0, -15.0)}
    dpo, dpo_slope = loss_of(o.DPO(0.1), (-5.0, -20.0), **columns)
    for mark, bonus, slope in (((1.0, 0.0), -5.0, 1.0), ((0.0, 1.0), -20.0, 0.0), ((0.0, 0.0), 0.0, 0.0)):
        got = loss_of(o.XPO(0.1, alpha=0.01), (-5.0, -20.0), **columns, reward=mark)
        assert got == pytest.approx((dpo + 0.01 * bonus, dpo_slope + 0.01 * slope))
    ipo = loss_of(o.XPO(0.1, 0.01, "ipo"), (-5.0, -20.0), **columns, reward=(0.0, 1.0))
    assert ipo == pytest.approx(((10 - 5) ** 2 - 0.2, 2 * (10 - 5)))


def test_alphapo_closed_forms(loss_of):
    # p = 1/2 and 1/4 a token, alpha 1: r = 1 - 1 / p is -1 and -3, so z = 2 (2 - 0.5) = 3
    loss, slope = loss_of(o.AlphaPO(2.0, 1.0, 0.5), (4 * math.log(0.5), 3 * math.log(0.25)), (4, 3))
    assert loss == pytest.approx(math.log1p(math.exp(-3.0)))
    assert slope * 4 == pytest.approx(-2.0 / 0.5 / (1 + math.exp(3.0)))  # dr / dmean = 1 / p
    simpo = loss_of(o.SimPO(2.5, 0.55), (-0.8 * 4, -1.6 * 3), (4, 3))
    assert loss_of(o.AlphaPO(2.5, 0.0, 0.55), (-0.8 * 4, -1.6 * 3), (4, 3)) == pytest.approx(simpo)
    assert loss_of(o.AlphaPO(2.5, 1e-9, 0.55), (-0.8 * 4, -1.6 * 3), (4, 3)) == pytest.approx(simpo)
    assert o.AlphaPO(2.0, 1.0).rewards(pair(math.log(0.5)), torch.ones(1)).item() == pytest.approx(-2.0)
    # beyond e^40 the reward stays, the derivative stays, too
    far, slope = loss_of(o.AlphaPO(1.0, 1.0), (-500.0, 0.0))
    assert far == pytest.approx(math.exp(40)) and slope == pytest.approx(-math.exp(40))


def test_rdpo_and_dpop_closed_forms(loss_of):
    columns = {"reference_logprob": (-10.0, -15.0)}
    # ratios 5 and -5; four tokens longer at 0.25 nats each
    loss, slope = loss_of(o.RDPO(0.1, 0.25), (-5.0, -20.0), (7, 3), **columns)
    assert loss == pytest.approx(math.log1p(math.exp(-2.0))) and slope == pytest.approx(-0.1 / (1 + math.exp(2.0)))
    assert loss_of(o.RDPO(0.1, 0.0), (-5.0, -20.0), (7, 3), **columns) == loss_of(o.DPO(0.1), (-5.0, -20.0), **columns)
    # the chosen reply has become less probable by 2: penalty 2 * 3
    loss, slope = loss_of(o.DPOP(0.1, 3.0), (-12.0, -20.0), **columns)
    assert loss == pytest.approx(math.log1p(math.exp(0.3))) and slope == pytest.approx(-0.4 / (1 + math.exp(-0.3)))
    assert loss_of(o.DPOP(0.1, 3.0), (-5.0, -20.0), **columns) == loss_of(o.DPO(0.1), (-5.0, -20.0), **columns)
    assert loss_of(o.DPOP(0.1), (-10.0, -15.0), **columns) == pytest.approx(
        (LN2, -0.05)
    )  # as DPO where training starts


def test_tpo_closed_forms():
    logprob, length = pair(-2.0, -9.0, -6.0).requires_grad_(), torch.tensor([2, 3, 4])
    losses = o.TPO(0.1, tpo_alpha=0.5)(logprob, length)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.7)) + 0.5 * 1.5])
    (grad,) = torch.autograd.grad(losses.sum(), logprob)
    slope = 0.1 / (1 + math.exp(0.7))
    assert grad.tolist() == pytest.approx([-slope, slope, -0.125])
    assert o.TPO(0.1, "hinge", tpo_alpha=0)(logprob, length).tolist() == pytest.approx([0.3])
    assert o.TPO(0.1, "ipo", tpo_alpha=0)(logprob, length).tolist() == pytest.approx([(2 - 5) ** 2])
    long = o.TPO(0.5, "tpo-l", tpo_alpha=0, tpo_l_gamma=0.4)(logprob, length).item()
    assert long == pytest.approx(math.log1p(math.exp(-0.6)))
    assert o.TPO().count(torch.ones(6)) == 2 and o.TPO().core() is None


def test_tpo_from_token_logprobs():
    """What the core does not know runs in torch behind the same function, and the mean is over triples."""
    sums, length = -torch.arange(1.0, 7.0, dtype=F64), torch.tensor([2, 3, 4, 1, 2, 5])
    losses, grad, rewards = compiled(o.TPO(), sums, length)
    expected, expected_grad, expected_rewards = plain(o.TPO(), sums, length)
    torch.testing.assert_close((losses, grad, rewards), (expected, expected_grad, expected_rewards))
    out = preference_loss_from_logprob(sums, torch.zeros(6).long(), torch.arange(7).int(), o.TPO())
    torch.testing.assert_close(out.loss, out.losses.mean())


def test_bradley_terry_closed_forms():
    reward = pair(1.5, 0.5, -1.0, 2.0).requires_grad_()
    losses = o.BradleyTerry()(reward)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1.0)), math.log1p(math.exp(3.0))])
    (grad,) = torch.autograd.grad(losses.sum(), reward)
    assert grad[0].item() == -grad[1].item() == pytest.approx(-1 / (1 + math.exp(1.0)))
    margin = o.BradleyTerry()(reward, pair(1.0, -3.0))
    assert margin.tolist() == pytest.approx([LN2, LN2]) == o.BradleyTerry()(reward, 1.0)[:1].tolist() + [LN2]
    centred = o.BradleyTerry(center=0.1)(reward)
    assert (centred - losses).tolist() == pytest.approx([0.1 * 4, 0.1 * 1])
    assert o.BradleyTerry()(torch.zeros(0)).shape == (0,)


# ---- the compiled core against autograd of the plain definition ----


def _all_objectives():
    smoothed = {"sigmoid": 0.1, "robust": 0.2, "exo_pair": 1e-3}
    yield o.SFT()
    yield o.DPO()
    for loss_type in o.DPO_LOSS_TYPES:
        for sft_weight in (0.0, 0.3):
            yield o.DPO(0.3, loss_type, smoothed.get(loss_type, 0.0), discopop_tau=0.4, sft_weight=sft_weight)
    yield o.DPO(0.3, "discopop")
    yield from (o.IPO(0.2, "mean"), o.IPO(0.2, "sum"))
    yield from (o.SimPO(), o.SimPO(2.5, 0.55, "sigmoid", 0.1, 0.3), o.SimPO(2.5, 0.55, "hinge", sft_weight=0.3))
    yield from (o.CPO(), o.CPO(0.3, "sigmoid", 0.1, 0.0), o.CPO(0.3, "hinge"))
    yield from (o.ORPO(), o.ORPO(2.0), o.KTO(), o.KTO(0.3, 1.5, 0.5), o.LNDPO(0.5), o.LNDPO())
    yield from (o.INPO(), o.INPO(0.5, 1.0), o.REBEL(), o.REFUEL(3.0), o.BCO(), o.BCO(2.0))
    yield from (o.XPO(), o.XPO(0.3, 0.1), o.XPO(0.3, 0.1, "ipo"), o.RDPO(), o.RDPO(0.3, 0.5, 0.1))
    yield from (o.AlphaPO(), o.AlphaPO(2.5, 0.0), o.AlphaPO(2.0, -0.4, 0.3, 0.1), o.DPOP(), o.DPOP(0.1, 2.0, 0.1))


ALL = list(_all_objectives())


def _inputs(scale, n=64):
    g = torch.Generator().manual_seed(7)
    draw = lambda: -scale * torch.rand(n, generator=g, dtype=F64)  # noqa: E731
    columns = {"logprob": draw(), "reference_logprob": draw(), "previous_logprob": draw()}
    columns["reward"] = torch.randn(n, generator=g, dtype=F64)
    columns["length"] = torch.randint(1, 40, (n,), generator=g)
    columns["logprob"][-1] = 0.0  # probability 1
    return columns


# 1e-8: mean log-prob -> 0, where ORPO's odds blow up. 1e4 and 1e5: |z| far beyond where exp overflows.
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 30.0, 1e4, 1e5])
@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_compiled_value_and_derivative_equal_autograd(objective, scale):
    inputs = _inputs(scale)
    args = inputs.pop("logprob"), inputs.pop("length"), inputs.pop("reference_logprob")
    expected = plain(objective, *args, kl=0.3, **inputs)
    got = compiled(objective, *args, kl=0.3, **inputs)
    for name, a, b in zip(("losses", "derivative", "rewards"), got, expected, strict=True):
        assert torch.isfinite(a).all() and torch.isfinite(b).all(), name
        # Autograd's own sigmoid' = s (1 - s) cancels for large z, hence the absolute part.
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_nan_is_not_swallowed(objective):
    inputs = _inputs(1.0, n=4)
    inputs["logprob"][0] = math.nan
    args = inputs.pop("logprob"), inputs.pop("length"), inputs.pop("reference_logprob")
    for run in (plain, compiled):
        losses, _, _ = run(objective, *args, **inputs)
        assert losses[0].isnan() and losses[1:].isfinite().all()


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_empty_sequence_has_logprob_and_mean_zero(objective):
    """Length 0 gives what a length of 1 and a log-prob of 0 give: defined, and the same on every path."""
    inputs = _inputs(1.0, n=6)
    inputs["logprob"][:2] = 0
    reference = inputs.pop("reference_logprob")
    logprob, length = inputs.pop("logprob"), inputs.pop("length")
    length[:2] = 1
    ones = plain(objective, logprob, length, reference, **inputs)
    length[:2] = 0
    for a, b in zip(plain(objective, logprob, length, reference, **inputs), ones, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_definition_keeps_the_dtype(dtype):
    inputs = {k: v if k == "length" else v.to(dtype) for k, v in _inputs(10.0).items()}
    for objective in ALL:
        losses = objective(inputs["logprob"], inputs["length"], *[inputs[c] for c in list(inputs)[1:4]])
        assert losses.dtype == dtype and losses.isfinite().all()


# ---- the two files keep in step ----


def _header():
    return (Path(__file__).parent.parent / "cpp" / "objectives.h").read_text()


def test_kinds_equal_the_header():
    listed = re.search(r"#define FP_OBJECTIVES\(X\)(.*?)// clang-format on", _header(), re.S).group(1)
    assert tuple(re.findall(r"X\((\w+)\)", listed)) == o.KINDS


def test_fields_equal_the_header():
    structs = dict(re.findall(r"struct (\w+) \{[^\n]*\n  Real ([\w, ]+);", _header()))
    for cls in o.ALL.values():
        numbers = ", ".join(f.name for f in dataclasses.fields(cls) if "limits" in f.metadata)
        if numbers and cls is not o.REFUEL:  # REFUEL is REBEL there
            assert structs[cls.__name__] == numbers


def test_core_round_trip():
    seen = {x.core()[0] for x in ALL}
    assert seen == set(range(len(o.KINDS)))
    assert o.SimPO(3, 0.4, "hinge").core() == (o.KINDS.index("simpo_hinge"), (3.0, 0.4, 0.0, 0.0))


# ---- the rest of the Python interface ----


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_initial_loss_is_the_loss_at_the_reference(objective):
    inputs = _inputs(20.0)
    logprob, length = inputs["logprob"], inputs["length"]
    losses = objective(logprob, length, logprob, logprob, inputs["reward"])
    expected = objective.initial_loss()
    if expected is not None:
        torch.testing.assert_close(losses, torch.full_like(losses, expected))
    else:
        assert losses.std() > 0 or objective == o.KTO(0.3, 1.5, 0.5)


def test_initial_loss_closed_forms():
    assert o.DPO().initial_loss() == LN2 == o.DPO(label_smoothing=0.1).initial_loss() == o.LNDPO().initial_loss()
    assert o.DPO(loss_type="hinge").initial_loss() == 1.0
    assert o.DPO(0.5, "sppo_hard").initial_loss() == 2.0
    assert o.DPO(loss_type="discopop").initial_loss() == pytest.approx((LN2 + 1) / 2)
    assert o.IPO(0.5).initial_loss() == 1.0 and o.INPO(0.5, 0.5).initial_loss() == 1.0
    assert o.KTO().initial_loss() == 0.5
    assert o.SimPO().initial_loss() is None and o.DPO(sft_weight=0.1).initial_loss() is None


def test_count():
    length = torch.tensor([3, 4, 5, 6])
    assert o.DPO().count(length) == 2 and o.KTO().count(length) == 4 and o.SFT().count(length) == 18


def test_from_name():
    assert o.from_name("simpo", beta=10, gamma_beta_ratio=0.5) == o.SimPO(10.0, 0.5)
    assert o.from_name("LN-DPO") == o.LNDPO() and o.from_name("Kto") == o.KTO()
    assert isinstance(o.from_name("dpo", beta=1).beta, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        o.DPO().beta = 1.0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: o.from_name("simp0"), "expected one of sft, dpo, .*, got 'simp0'. Did you mean 'simpo'?"),
        (lambda: o.from_name("simpo", bata=2), r"\[SimPO\] bata: no such field; .* Did you mean 'beta'?"),
        (lambda: o.from_name("sft", beta=2), r"\[SFT\] beta: no such field; SFT has no fields."),
        (lambda: o.DPO(beta=0), r"\[DPO\] beta: expected a finite number above 0, got 0."),
        (lambda: o.DPO(beta=-0.1), r"\[DPO\] beta: expected a finite number above 0, got -0.1."),
        (lambda: o.SimPO(beta=math.nan), r"\[SimPO\] beta: expected a finite number above 0, got nan."),
        (lambda: o.SimPO(beta="2"), r"\[SimPO\] beta: expected a finite number above 0, got '2'."),
        (lambda: o.CPO(beta=True), r"\[CPO\] beta: expected a finite number above 0, got True."),
        (lambda: o.DPO(label_smoothing=0.5), "label_smoothing: .* of at least 0 and below 0.5, got 0.5."),
        (lambda: o.INPO(ratio=1.5), r"\[INPO\] ratio: expected a finite number above 0 and at most 1, got 1.5."),
        (lambda: o.DPO(loss_type="sigmod"), "loss_type: expected one of 'sigmoid', .* Did you mean 'sigmoid'?"),
        (lambda: o.SimPO(loss_type="hinge", label_smoothing=0.1), "label_smoothing: expected 0 with loss_type 'hinge'"),
        (lambda: o.DPO(loss_type="exo_pair"), "label_smoothing: expected a number above 0 .* The EXO paper uses 1e-3."),
        (lambda: o.DPO()(torch.zeros(2), torch.ones(2)), r"\[DPO\] reference_logprob: expected a tensor \[2\], got"),
        (lambda: o.INPO()(*[torch.zeros(2)] * 3), r"\[INPO\] previous_logprob: expected a tensor \[2\], got None"),
        (lambda: o.KTO()(*[torch.zeros(2)] * 3), r"\[KTO\] reward: .* \(for KTO, > 0 means desirable\)"),
        (
            lambda: o.XPO()(*[torch.zeros(2)] * 3),
            r"\[XPO\] reward: .*: pass marks \(for XPO, > 0 means written by the reference",
        ),
        (
            lambda: o.TPO(loss_type="ipo", label_smoothing=0.1),
            r"\[TPO\] label_smoothing: expected 0 with loss_type 'ipo'",
        ),
        (
            lambda: o.TPO()(torch.zeros(4), torch.ones(4)),
            r"\[TPO\] logprob: expected .* 3 divides .* got 4. Pass whole",
        ),
        (lambda: o.from_name("tpo"), "expected one of sft, dpo, .*, got 'tpo'"),
        (lambda: o.BradleyTerry(-1), r"\[BradleyTerry\] center: expected a finite number of at least 0, got -1."),
        (lambda: o.BradleyTerry()(torch.zeros(3)), r"\[BradleyTerry\] reward: .* even number .* got shape \[3\]. Pass"),
        (lambda: o.BradleyTerry()(torch.zeros(4, 1)), r"\[BradleyTerry\] reward: .* got shape \[4, 1\]"),
        (lambda: o.BradleyTerry()(torch.zeros(4), torch.zeros(4)), r"margin: .* a tensor \[2\], got shape \[4\]"),
        (lambda: o.SimPO()(torch.zeros(3), torch.ones(3)), r"\[SimPO\] logprob: expected an even number of sequences"),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()
