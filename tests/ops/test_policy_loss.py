# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch

import fastpost
from compare import FLOATS, error
from fastpost import _core
from fastpost.objectives import GRPO
from fastpost.ops.policy_loss import policy_loss_from_logprob
from fastpost.reference import policy_loss as reference

CASES = reference.cases()
F64 = torch.float64


def run(f, case, tensors, kwargs, convert=torch.clone):
    """Outputs and the gradients of hidden and weight for uneven incoming gradients."""
    hidden, weight = (convert(t).requires_grad_() for t in tensors[:2])
    kwargs = {k: convert(v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    out = f(hidden, weight, *tensors[2:], case.objective, **kwargs)
    g = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=g).to(x.device) for x in out[:2]]
    sum((w * x).sum() for w, x in zip(weights, out[:2])).backward()
    return out, [hidden.grad, weight.grad]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES[::3] + CASES[-7:], ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    """From hidden states. (cases() keep the ratios of tokens away from the clips, or bf16's rounding would decide.)"""
    tensors, kwargs = case.inputs(dtype, device)
    ours, grads = run(fastpost.policy_loss, case, tensors, kwargs)
    truth, true_grads = run(reference.policy_loss, case, tensors, kwargs, torch.Tensor.double)
    if dtype == torch.float32:
        limits = [5e-5] * 3
    else:  # logits come rounded from the GEMM: plain torch on the same inputs sets the scale of the error
        plain, plain_grads = run(reference.policy_loss, case, tensors, kwargs)
        errors = map(error, (plain.losses, *plain_grads), (truth.losses, *true_grads))
        limits = [max(2e-2, 2 * e) for e in errors]
    assert torch.equal(ours.length, truth.length) and ours.length.dtype == torch.int32
    for name, a, b in zip(ours._fields, ours, truth):
        if name != "length":
            assert a.dtype == torch.float32 and a.shape == b.shape
            assert error(a.flatten(), b.flatten()) < limits[0], name
    for a, b, limit in zip(grads, true_grads, limits[1:]):
        assert a.dtype == dtype and error(a, b) < limit


def _tokens(case, dtype=F64, device="cpu"):
    """(logprob, target, cu_seqlens) and the columns."""
    (hidden, weight, target, cu_seqlens), kwargs = case.inputs(dtype, device)
    names = ("advantage", "old_logprob", "reference_logprob", "num_items")
    return (
        (reference.linear_logprob(hidden, weight, target), target, cu_seqlens),
        {k: v for k, v in kwargs.items() if k in names},
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float64_is_exact_on_cpu(case):
    """Losses, gradient and metrics from token log-probs in float64 against autograd of the plain definition."""
    (logprob, target, cu_seqlens), columns = _tokens(case)
    results = []
    for f in (policy_loss_from_logprob, reference.policy_loss_from_logprob):
        x = logprob.clone().requires_grad_()
        out = f(x, target, cu_seqlens, case.objective, **columns)
        (out.loss * 3 + out.losses.square().sum()).backward()
        results.append((*out, x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# ---- against formulas that are written down once more, on padded rows as trainers have them ----


def padded(case, per_token):
    """Packed and padded views of the same replies: (logprob [T], ...), columns, and a function [T] -> [B, L]."""
    packed, columns = _tokens(dataclasses.replace(case, per_token=per_token))
    lengths = packed[2].diff().tolist()

    def rows(x):
        return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)

    return packed, columns, rows


def by_hand(o, lp, mask, adv, old, ref, items=None):
    """Loss of padded rows [B, L]; adv [B] or [B, L]."""
    b = lp.shape[0]
    adv = adv if adv.ndim == 2 else adv[:, None]
    n = mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio = (lp - old) * mask
    if o.level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / n
    elif o.level == "trajectory":
        log_ratio = log_ratio.sum(1, keepdim=True)
    ratio = torch.exp(log_ratio)
    if o.loss_type == "cispo":
        token = -torch.minimum(ratio, torch.tensor(o.epsilon_high, dtype=F64)).detach() * adv * lp
    else:
        upper = ratio if o.delta is None else torch.minimum(ratio, torch.tensor(o.delta, dtype=F64))
        low, high = (torch.tensor(x, dtype=F64) for x in (1 - o.epsilon_low, 1 + o.epsilon_high))
        bounded = torch.maximum(torch.minimum(ratio, high), low)
        token = torch.maximum(-upper * adv, -bounded * adv)
    token = token + o.beta * (torch.exp(ref - lp) - 1 - (ref - lp))
    token = token.expand(lp.shape) * mask
    match o.loss_type:
        case "grpo":
            return (token.sum(1, keepdim=True) / n).mean()
        case "dr_grpo":
            return token.sum() / (b * o.max_completion_length)
        case _:
            return token.sum() / (mask.sum() if items is None else items)


@pytest.mark.parametrize("per_token", [False, True], ids=["per sequence", "per token"])
@pytest.mark.parametrize("case", CASES[:23], ids=lambda c: c.name)
def test_equals_formulas_by_hand(case, per_token):
    (logprob, target, cu_seqlens), columns, rows = padded(case, per_token)
    x = logprob.clone().requires_grad_()
    out = policy_loss_from_logprob(x, target, cu_seqlens, case.objective, **columns)
    (grad,) = torch.autograd.grad(out.loss, x)
    y = logprob.clone().requires_grad_()
    adv = rows(columns["advantage"]) if per_token else columns["advantage"]
    scored = torch.where(rows(torch.ones_like(logprob)) > 0, rows(target) != -100, False)
    expected = by_hand(case.objective, rows(y), scored, adv, rows(columns["old_logprob"]),
                       rows(columns["reference_logprob"]))  # fmt: skip
    (expected_grad,) = torch.autograd.grad(expected, y)
    assert expected_grad.abs().max() > 0
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-14)


def test_closed_forms():
    """Two replies of two tokens; every number by hand."""
    log = torch.log(torch.tensor([1.5, 0.5, 1.1, 1.0], dtype=F64))  # ratios
    args = log, torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 4], dtype=torch.int32)
    columns = {"advantage": torch.tensor([2.0, -1.0], dtype=F64), "old_logprob": torch.zeros(4, dtype=F64)}
    x = log.clone().requires_grad_()
    out = policy_loss_from_logprob(x, *args[1:], GRPO("grpo"), **columns)
    # clip(1.5) = 1.2 counts, 0.5 does not clip upwards; the others lie inside
    torch.testing.assert_close(out.losses, torch.tensor([-(1.2 + 0.5), (1.1 + 1.0) / 2], dtype=F64))
    (grad,) = torch.autograd.grad(out.loss, x)
    torch.testing.assert_close(grad, torch.tensor([0.0, -0.25, 1.1 / 4, 1.0 / 4], dtype=F64))
    assert [out.clip_low.item(), out.clip_high.item()] == [0, 0.25] and out.ratio.item() == pytest.approx(4.1 / 4)
    # GSPO: sqrt(1.5 * 0.5) and sqrt(1.1)
    out = policy_loss_from_logprob(*args, GRPO("grpo", 0.1, level="sequence"), **columns)
    assert out.losses.tolist() == pytest.approx([-2 * 0.75**0.5, 1.1**0.5])
    # k3 of d = 0.2 is 0.0214028
    ref = {"reference_logprob": log + 0.2}
    out = policy_loss_from_logprob(
        *args, GRPO("dapo", beta=1.0), **columns | ref | {"advantage": torch.zeros(2).double()}
    )
    assert out.loss.item() == out.kl.item() == pytest.approx(0.0214028, abs=5e-8)
    # delta bounds what a negative advantage can cost
    far = torch.tensor([9.0, 0.0, 0.0, 0.0], dtype=F64).requires_grad_()
    minus = {"advantage": torch.tensor([-1.0, 0.0], dtype=F64), "old_logprob": torch.zeros(4, dtype=F64)}
    out = policy_loss_from_logprob(far, *args[1:], GRPO("dapo", delta=4.0), **minus)
    assert out.loss.item() == pytest.approx((4.0 + 1.0) / 4)
    assert torch.autograd.grad(out.loss, far)[0].tolist() == [0.0, 0.25, 0.0, 0.0]


def test_on_policy_is_the_policy_gradient():
    """Without old log-probs every ratio is 1: the gradient is -A / n, as if old were logprob itself."""
    case = reference.Case("on-policy", GRPO("grpo"), (6, 5, 7, 4), on_policy=True, zeros=0)
    (logprob, target, cu_seqlens), columns = _tokens(case)
    x = logprob.clone().requires_grad_()
    out = policy_loss_from_logprob(x, target, cu_seqlens, case.objective, **columns)
    (grad,) = torch.autograd.grad(out.losses.sum(), x)
    sequence = torch.repeat_interleave(cu_seqlens.diff().long())
    expected = torch.where(target == -100, 0, -columns["advantage"][sequence] / out.length[sequence])
    torch.testing.assert_close(grad, expected)
    again = policy_loss_from_logprob(x, target, cu_seqlens, case.objective, **columns, old_logprob=logprob)
    assert all(torch.equal(a, b) for a, b in zip(out, again)) and out.ratio == 1 and out.clip_high == 0


def test_gradcheck():
    for objective in (GRPO("grpo", beta=0.1), GRPO("dapo", level="sequence"), GRPO("dapo", level="trajectory")):
        case = reference.Case("small", objective, (6, 5, 7, 4), drift=0.05, zeros=0)
        (logprob, target, cu_seqlens), columns = _tokens(case)

        def f(x, objective=objective, target=target, cu_seqlens=cu_seqlens, columns=columns):
            return policy_loss_from_logprob(x, target, cu_seqlens, objective, **columns)[:2]

        assert torch.autograd.gradcheck(f, logprob.requires_grad_())


# ---- rows that cost nothing ----


@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
def test_clipped_and_neutral_tokens_get_exactly_nothing(level, device):
    """Also from the GEMMs of linear_logprob's backward: their hidden states may be NaN by then. (Where most rows count,
    it may keep the others for speed; here most do not.)"""
    case = reference.Case("zeros", GRPO("dapo", level=level), (7, 3, 12, 5, 9, 20) * 4, drift=1.5, zeros=0.6)
    (hidden, weight, target, cu_seqlens), columns = case.inputs(torch.float32, device)
    logprob = reference.linear_logprob(hidden, weight, target).requires_grad_()
    args = target, cu_seqlens, case.objective
    out = policy_loss_from_logprob(logprob, *args, **columns)
    (grad,) = torch.autograd.grad(out.loss, logprob)
    sequence = torch.repeat_interleave(cu_seqlens.diff().long())
    advantage = columns["advantage"][sequence]
    length = out.length.to(F64)
    ratio = case.objective.ratio(logprob.detach().double()[target != -100], sequence[target != -100], length,
                                 columns["old_logprob"].double()[target != -100])  # fmt: skip
    all_ratios = torch.ones(len(target), dtype=F64, device=device)
    all_ratios[target != -100] = ratio
    clipped = ((all_ratios > 1.2) & (advantage > 0)) | ((all_ratios < 0.8) & (advantage < 0))
    nothing = (target == -100) | (advantage == 0) | clipped
    assert torch.equal(grad == 0, nothing) and clipped.any() and (advantage == 0).any()
    assert 0 < (~nothing).sum() < 0.5 * (target != -100).sum()

    weight_grads = []
    for poison in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = fastpost.policy_loss(h, w, *args, **columns)
        if poison:
            h.data[nothing] = torch.nan
        out.loss.backward()
        assert torch.equal(h.grad.abs().sum(1) == 0, nothing)
        weight_grads.append(w.grad)
    assert torch.equal(*weight_grads) and weight_grads[0].isfinite().all()


def test_infinite_ratio_without_advantage_is_nothing_and_nan_is_not_swallowed():
    target, cu_seqlens = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 4], dtype=torch.int32)
    for objective in (GRPO("dapo"), GRPO("dapo", level="sequence"), GRPO("cispo", epsilon_high=5)):
        x = torch.tensor([800.0, 800.0, -1.0, -1.0], dtype=F64).requires_grad_()
        columns = {"advantage": torch.tensor([0.0, 1.0], dtype=F64), "old_logprob": torch.full((4,), -1.0, dtype=F64)}
        out = policy_loss_from_logprob(x, target, cu_seqlens, objective, **columns)
        (grad,) = torch.autograd.grad(out.loss, x)
        assert out.losses[0] == 0 and grad[:2].tolist() == [0, 0] and grad[2:].ne(0).all() and grad.isfinite().all()
        x = torch.tensor([torch.nan, -1.0, -1.0, -1.0], dtype=F64)
        for old in (columns["old_logprob"], None):
            out = policy_loss_from_logprob(
                x, target, cu_seqlens, objective, advantage=columns["advantage"], old_logprob=old
            )
            assert out.losses.isnan().tolist() == [True, False] and out.loss.isnan()


def test_unscored_tokens_do_not_matter(device):
    case = reference.Case("small", GRPO("grpo", beta=0.1, level="sequence"), (6, 5, 7, 4))
    (logprob, target, cu_seqlens), columns = _tokens(case, torch.float32, device)
    expected = policy_loss_from_logprob(logprob, target, cu_seqlens, case.objective, **columns)
    poison = lambda x: torch.where(target == -100, torch.nan, x) if x.shape == target.shape else x  # noqa: E731
    x = poison(logprob).requires_grad_()
    columns = {k: poison(v) for k, v in columns.items()}
    out = policy_loss_from_logprob(x, target, cu_seqlens, case.objective, **columns)
    assert all(torch.equal(a, b) for a, b in zip(out, expected) if a.shape != target.shape)
    out.loss.backward()
    assert torch.all(x.grad[target == -100] == 0) and x.grad.isfinite().all()


# ---- how it adds up ----


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo"])
def test_micro_batches_add_up_with_num_items(loss_type, device):
    """The loss and the gradient of a step do not depend on how its sequences are split, given its count."""
    fields = {"dr_grpo": {"max_completion_length": 30}, "cispo": {"epsilon_high": 2}}.get(loss_type, {})
    case = reference.Case("parts", GRPO(loss_type, beta=0.1, **fields), (6, 5, 7, 4))
    (logprob, target, cu_seqlens), columns = _tokens(case, torch.float32, device)
    x = logprob.clone().requires_grad_()
    whole = policy_loss_from_logprob(x, target, cu_seqlens, case.objective, **columns)
    whole.loss.backward()
    count = case.objective.count(whole.length)
    y, total = logprob.clone().requires_grad_(), 0.0
    for first, last, items in ((0, 1, float(count)), (1, 4, torch.as_tensor(count, device=device))):
        begin, end = cu_seqlens[first], cu_seqlens[last]
        part = {k: v[first:last] if len(v) == 4 else v[begin:end] for k, v in columns.items()}
        out = policy_loss_from_logprob(
            y[begin:end], target[begin:end], cu_seqlens[first : last + 1] - begin, case.objective, **part,
            num_items=items,
        )  # fmt: skip
        assert torch.equal(out.losses, whole.losses[first:last])
        total = total + out.loss
    total.backward()
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(y.grad, x.grad)


def test_same_bits_whatever_the_threads():
    case = reference.Case("many", GRPO("grpo", level="sequence", beta=0.1), tuple(range(1, 120)))
    (logprob, target, cu_seqlens), columns = _tokens(case, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            x = logprob.clone().requires_grad_()
            out = policy_loss_from_logprob(x, target, cu_seqlens, case.objective, **columns)
            out.loss.backward()
            results.append((*out, x.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_long_sequences_sum_in_double():
    """GSPO's mean log-ratio of 2^20 tokens: a float32 running sum would be off in the fourth digit."""
    n = 1 << 20
    logprob = torch.full((n,), -0.1)
    out = policy_loss_from_logprob(logprob, torch.zeros(n, dtype=torch.int64), torch.tensor([0, n], dtype=torch.int32),
                                   GRPO("grpo", level="trajectory"), advantage=torch.ones(1),
                                   old_logprob=torch.full((n,), -0.1 - 2.0**-23))  # fmt: skip
    step = (logprob[0].double() - torch.full((1,), -0.1 - 2.0**-23).double()).item()
    assert out.ratio.item() == pytest.approx(torch.tensor(step * n).double().exp().item(), rel=1e-6)


def test_outputs_are_all_written(device):
    case = reference.Case("small", GRPO("grpo"), (6, 0, 7, 4))
    (logprob, target, cu_seqlens), columns = _tokens(case, torch.float32, device)
    shapes = [(), (4,), (4,), (17,), (), (4,), (4, 7)]
    outputs = [torch.full(s, torch.nan, device=device) for s in shapes]
    outputs[2] = torch.full((4,), -7, dtype=torch.int32, device=device)
    outputs[6] = outputs[6].double()
    _core.policy_loss(logprob, target, cu_seqlens, -100, *case.objective.core(), columns["advantage"], None, None, None,
                      *outputs)  # fmt: skip
    assert all(x.isfinite().all() for x in outputs) and outputs[2].tolist() == [4, 0, 4, 2]
    grad = torch.full_like(logprob, torch.nan)
    _core.policy_loss_backward(cu_seqlens, outputs[3], outputs[4], outputs[0], outputs[1], grad)
    assert grad.isfinite().all()


def test_subclass_runs_in_torch():
    @dataclasses.dataclass(frozen=True)
    class Reinforce(GRPO):
        def __call__(self, logprob, sequence, length, advantage, old_logprob=None, reference_logprob=None):
            return logprob.new_zeros(len(length)).index_add(0, sequence, -advantage * logprob)

    case = reference.Case("small", Reinforce(), (6, 5, 7, 4), zeros=0)
    (logprob, target, cu_seqlens), columns = _tokens(case)
    assert Reinforce().core() is None
    x = logprob.clone().requires_grad_()
    out = policy_loss_from_logprob(x, target, cu_seqlens, Reinforce(), **columns)
    out.losses.sum().backward()
    expected = -columns["advantage"].repeat_interleave(cu_seqlens.diff().long())
    torch.testing.assert_close(x.grad, torch.where(target == -100, 0, expected))


# ---- torch ----


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_opcheck(beta, device):
    case = reference.Case("small", GRPO("grpo", beta=beta, level="sequence"), (6, 5, 7, 4))
    (logprob, target, cu_seqlens), columns = _tokens(case, torch.float32, device)
    rest = columns["old_logprob"], columns["reference_logprob"], torch.tensor(3.0, device=device)
    args = (logprob.requires_grad_(), target, cu_seqlens, -100, *case.objective.core(), columns["advantage"], *rest)
    torch.library.opcheck(torch.ops.fastpost.policy_loss.default, args)


@pytest.mark.parametrize("objective", [GRPO(), GRPO("grpo", beta=0.1, level="sequence")], ids=["dapo", "gspo"])
def test_compiles_without_graph_break(objective, device):
    case = reference.Case("compiled", objective, (6, 5, 7, 4))
    (hidden, weight, target, cu_seqlens), kwargs = case.inputs(torch.float32, device)

    def loss(hidden, weight):
        out = fastpost.policy_loss(2 * hidden, weight, target, cu_seqlens, objective, num_items=3.0, **kwargs)
        return out.loss + out.losses.square().sum() + out.kl

    leaves = hidden.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


# ---- bad input ----


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "descending": ({"cu_seqlens": cu(0, 11, 6, 18, 22)}, r"cu_seqlens: expected ascending .*, got 6 after 11 at"),
    "end": ({"cu_seqlens": cu(0, 6, 11, 18, 21)}, r"cu_seqlens: expected 22 \(the number of tokens\) .*, got 21"),
    "no elements": ({"cu_seqlens": cu()}, r"cu_seqlens: expected at least one element, got none"),
    "int64": ({"cu_seqlens": cu(0, 6, 11, 18, 22).long()}, r"cu_seqlens: expected int32 \[any\], got int64 \[5\]"),
    "list": ({"cu_seqlens": [0, 6, 11, 18, 22]}, r"cu_seqlens: expected a plain torch.Tensor, got list"),
    "target": ({"target": torch.zeros(21).long()}, r"target: expected int64 \[22\], got int64 \[21\]"),
    "dtype": ({"logprob": torch.zeros(22).bfloat16()}, r"logprob: expected float32 or float64 \[any\], got bfloat16"),
    "strided": ({"logprob": torch.zeros(22, 2)[:, 0]}, r"logprob: expected a contiguous tensor, got strides \(2\)"),
    "advantage shape": (
        {"advantage": torch.zeros(5)},
        r"advantage: expected one per sequence \[4\] or per token \[22\], got float32 \[5\]",
    ),
    "advantage dtype": ({"advantage": torch.zeros(4).long()}, r"advantage: expected float32 \[any\], got int64 \[4\]"),
    "no advantage": ({"advantage": None}, r"advantage: expected .*, got None"),
    "old": ({"old_logprob": torch.zeros(4)}, r"old_logprob: expected float32 \[22\], got float32 \[4\]"),
    "reference": ({"reference_logprob": torch.zeros(4)}, r"reference_logprob: expected float32 \[22\], got float32"),
    "no reference": (
        {"objective": GRPO(beta=0.1), "reference_logprob": None},
        r"reference_logprob: expected float32 \[22\].*, got None. beta is not 0",
    ),
    "device": ({"old_logprob": torch.zeros(22, device="meta")}, r"old_logprob: expected a tensor on cpu, got one"),
    "num_items": ({"num_items": torch.ones(2)}, r"num_items: expected a number or one element, got shape \[2\]"),
    "objective": ({"objective": fastpost.objectives.DPO()}, r"objective: expected objectives.GRPO, got DPO. .* belong"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    case = reference.Case("small", GRPO(), (6, 5, 7, 4))
    (logprob, target, cu_seqlens), columns = _tokens(case, torch.float32)
    args = {"logprob": logprob, "target": target, "cu_seqlens": cu_seqlens, "objective": GRPO(), **columns}
    with pytest.raises(ValueError, match=r"\[policy_loss\] " + message):
        policy_loss_from_logprob(**(args | change))


def test_target_outside_the_vocabulary_is_named():
    (hidden, weight, target, cu_seqlens), columns = reference.Case("small", GRPO(), (6, 5)).inputs()
    target[4] = 101
    with pytest.raises(ValueError, match=r"target: expected class indices in \[0, 101\) .*, got 101 at row 4"):
        fastpost.policy_loss(hidden, weight, target, cu_seqlens, GRPO(), **columns)
