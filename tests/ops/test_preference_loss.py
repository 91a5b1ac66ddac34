# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch

import fastpost
from compare import FLOATS, error
from fastpost import _core, objectives
from fastpost.ops.preference_loss import preference_loss_from_logprob
from fastpost.reference import preference_loss as reference

CASES = reference.cases()


def run(f, case, tensors, kwargs, convert=torch.clone):
    """Outputs and the gradients of hidden, weight (and bias) for uneven incoming gradients."""
    hidden, weight = (convert(t).requires_grad_() for t in tensors[:2])
    kwargs = {k: convert(v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    leaves = [hidden, weight]
    if "bias" in kwargs:
        leaves.append(kwargs["bias"].requires_grad_())
    out = f(hidden, weight, *tensors[2:], case.objective, **kwargs)
    g = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=g).to(x.device) for x in out[:3]]
    sum((w * x).sum() for w, x in zip(weights, out[:3])).backward()
    return out, [x.grad for x in leaves]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    tensors, kwargs = case.inputs(dtype, device)
    ours, grads = run(fastpost.preference_loss, case, tensors, kwargs)
    truth, true_grads = run(reference.preference_loss, case, tensors, kwargs, torch.Tensor.double)
    # bf16 logits come rounded from the GEMM: then plain torch on the same inputs sets the scale of the error
    if dtype == torch.float32:
        limits = [5e-5] * 3
    else:
        plain, plain_grads = run(reference.preference_loss, case, tensors, kwargs)
        errors = map(error, (plain.losses, *plain_grads[:2]), (truth.losses, *true_grads))
        limits = [max(2e-2, 2 * e) for e in errors]
    assert torch.equal(ours.length, truth.length) and ours.length.dtype == torch.int32
    for name in ("loss", "losses", "logprob", "rewards"):
        a, b = getattr(ours, name), getattr(truth, name)
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert error(a.flatten(), b.flatten()) < limits[0], name
    for name, a, b, limit in zip(("hidden", "weight"), grads, true_grads, limits[1:]):
        assert a.dtype == dtype and error(a, b) < limit, name


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float64_is_exact_on_cpu(case):
    """Sums, objective and gradient from token log-probs in float64 against autograd of the plain definition."""
    (hidden, weight, target, cu_seqlens), kwargs = case.inputs(torch.float64)
    columns = {k: v for k, v in kwargs.items() if k in ("reference_logprob", "previous_logprob", "reward", "kl")}
    logprob = reference.linear_logprob(hidden, weight, target)
    results = []
    for f in (preference_loss_from_logprob, reference.preference_loss_from_logprob):
        x = logprob.clone().requires_grad_()
        out = f(x, target, cu_seqlens, case.objective, **columns)
        (out.loss * 3 + out.losses.square().sum() + out.logprob.square().sum() / 7).backward()
        results.append((*out, x.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _small(objective, s=4, device="cpu"):
    case = reference.Case("small", objective, (6, 5, 7, 4)[:s])
    (hidden, weight, target, cu_seqlens), kwargs = case.inputs(torch.float32, device)
    logprob = reference.linear_logprob(hidden, weight, target)
    return logprob, target, cu_seqlens, kwargs


def test_gradcheck():
    for objective in (objectives.SimPO(), objectives.DPO(label_smoothing=0.1), objectives.ORPO(), objectives.KTO()):
        logprob, target, cu_seqlens, kwargs = _small(objective)
        columns = {k: v.double() for k, v in kwargs.items()}

        def f(x, objective=objective, target=target, cu_seqlens=cu_seqlens, columns=columns):
            return preference_loss_from_logprob(x, target, cu_seqlens, objective, **columns)[:3]

        assert torch.autograd.gradcheck(f, logprob.double().requires_grad_())


def test_mean_is_over_pairs_sequences_or_tokens(device):
    for objective, count in ((objectives.SimPO(), 2), (objectives.KTO(), 4), (objectives.SFT(), None)):
        logprob, target, cu_seqlens, kwargs = _small(objective, device=device)
        out = preference_loss_from_logprob(logprob, target, cu_seqlens, objective, **kwargs)
        count = count or (target != -100).sum()
        torch.testing.assert_close(out.loss, out.losses.sum() / count)


def test_unscored_tokens_do_not_matter(device):
    """Prompt, other turns, padding: their log-prob changes nothing and gets no gradient."""
    logprob, target, cu_seqlens, kwargs = _small(objectives.REFUEL(2.0), device=device)
    expected = preference_loss_from_logprob(logprob, target, cu_seqlens, objectives.REFUEL(2.0), **kwargs)
    x = torch.where(target == -100, torch.nan, logprob).requires_grad_()
    out = preference_loss_from_logprob(x, target, cu_seqlens, objectives.REFUEL(2.0), **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(out, expected))
    out.loss.backward()
    assert torch.equal(x.grad != 0, target != -100)


def test_packing_order_does_not_matter(device):
    """Every pair alone gives the bits it gives in the pack."""
    objective = objectives.DPO()
    logprob, target, cu_seqlens, kwargs = _small(objective, device=device)
    packed = preference_loss_from_logprob(logprob, target, cu_seqlens, objective, **kwargs)
    for i in (0, 1):
        begin, end = cu_seqlens[2 * i], cu_seqlens[2 * i + 2]
        alone = preference_loss_from_logprob(
            logprob[begin:end], target[begin:end], cu_seqlens[2 * i : 2 * i + 3] - begin, objective,
            **{k: v[2 * i : 2 * i + 2] for k, v in kwargs.items()},
        )  # fmt: skip
        assert torch.equal(alone.losses[0], packed.losses[i])
        assert torch.equal(alone.logprob, packed.logprob[2 * i : 2 * i + 2])


def test_long_sequences_sum_in_double():
    """A float32 running sum of 2^20 tokens would be off in the fourth digit."""
    logprob = torch.full((1 << 21,), -0.1)
    cu_seqlens = torch.tensor([0, 1 << 20, 1 << 21], dtype=torch.int32)
    target = torch.zeros(1 << 21, dtype=torch.int64)
    out = preference_loss_from_logprob(logprob, target, cu_seqlens, objectives.SimPO())
    assert out.logprob.tolist() == [torch.tensor(-0.1).double().mul(1 << 20).float().item()] * 2


def test_same_bits_whatever_the_threads():
    objective, n = objectives.SimPO(), 400
    lengths = torch.randint(1, 60, (n,))
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    logprob = -torch.rand(int(cu_seqlens[-1]))
    target = torch.zeros(len(logprob), dtype=torch.int64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            x = logprob.clone().requires_grad_()
            out = preference_loss_from_logprob(x, target, cu_seqlens, objective)
            out.loss.backward()
            results.append((*out, x.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_outputs_are_all_written(device):
    logprob, target, cu_seqlens, kwargs = _small(objectives.DPO(), device=device)
    shapes = [(), (2,), (4,), (4,), (4,), (4,)]
    outputs = [torch.full(s, torch.nan, device=device) for s in shapes]
    outputs[3] = torch.full((4,), -7, dtype=torch.int32, device=device)
    kind, params = objectives.DPO().core()
    _core.preference_loss(logprob, target, cu_seqlens, -100, kind, params, kwargs["reference_logprob"], None, None,
                          None, *outputs)  # fmt: skip
    assert all(x.isfinite().all() for x in outputs) and (outputs[3] > 0).all()
    grad = torch.full_like(logprob, torch.nan)
    _core.preference_loss_backward(target, cu_seqlens, -100, kind, outputs[3], outputs[5], outputs[0], None, None, grad)
    assert grad.isfinite().all()


# ---- objectives of the user's own ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_callable_is_an_objective(dtype):
    logprob, target, cu_seqlens, _ = _small(objectives.SimPO())
    ours = objectives.SimPO(2.0, 0.5)

    def simpo(logprob, length):
        mean = logprob / length
        return -torch.nn.functional.logsigmoid(2.0 * (mean[0::2] - mean[1::2] - 0.5))

    results = []
    for objective in (ours, simpo):
        x = logprob.to(dtype).clone().requires_grad_()
        out = preference_loss_from_logprob(x, target, cu_seqlens, objective)
        out.loss.backward()
        results.append((out.loss, out.losses, out.logprob, out.length, x.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"objective: expected .* tensor of losses, got one that returns float"):
        preference_loss_from_logprob(logprob, target, cu_seqlens, lambda logprob, length: 1.0)


def test_subclass_of_objective():
    @dataclasses.dataclass(frozen=True)
    class Ratio(objectives.Objective):
        weight: float = 2.0
        needs_reference = True

        def _losses(self, chosen, rejected):
            return self.weight * (rejected.ratio - chosen.ratio).exp()

        def _rewards(self, s):
            return s.ratio

    logprob, target, cu_seqlens, kwargs = _small(Ratio())
    assert Ratio().core() is None
    x = logprob.clone().requires_grad_()
    out = preference_loss_from_logprob(x, target, cu_seqlens, Ratio(), **kwargs)
    ratio = out.logprob - kwargs["reference_logprob"]
    torch.testing.assert_close(out.losses, 2 * (ratio[1::2] - ratio[0::2]).exp())
    out.loss.backward()
    assert x.grad[target != -100].abs().min() > 0


# ---- torch ----


@pytest.mark.parametrize("objective", [objectives.DPO(), objectives.SFT(), objectives.KTO()], ids=repr)
def test_opcheck(objective, device):
    logprob, target, cu_seqlens, kwargs = _small(objective, device=device)
    kind, params = objective.core()
    columns = kwargs["reference_logprob"], None, kwargs["reward"], torch.tensor(0.2, device=device)
    args = (logprob.requires_grad_(), target, cu_seqlens, -100, kind, params, *columns)
    torch.library.opcheck(torch.ops.fastpost.preference_loss.default, args)


@pytest.mark.parametrize("objective", [objectives.DPO(), objectives.SimPO(), objectives.KTO()], ids=repr)
def test_compiles_without_graph_break(objective, device):
    case = reference.Case("compiled", objective, (6, 5, 7, 4))
    (hidden, weight, target, cu_seqlens), kwargs = case.inputs(torch.float32, device)

    def loss(hidden, weight):
        out = fastpost.preference_loss(2 * hidden, weight, target, cu_seqlens, objective, kl=0.1, **kwargs)
        return out.loss + out.losses.square().sum()

    leaves = hidden.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_gradient_accumulates_and_graph_can_be_kept():
    logprob, target, cu_seqlens, _ = _small(objectives.SimPO())
    x = logprob.clone().requires_grad_()
    out = preference_loss_from_logprob(x, target, cu_seqlens, objectives.SimPO())
    out.loss.backward(retain_graph=True)
    once = x.grad.clone()
    out.loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)


# ---- bad input ----


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "descending": ({"cu_seqlens": cu(0, 11, 6, 18, 22)}, r"cu_seqlens: expected ascending .*, got 6 after 11 at"),
    "start": ({"cu_seqlens": cu(1, 6, 11, 18, 22)}, r"cu_seqlens: expected 0 as first element, got 1"),
    "end": ({"cu_seqlens": cu(0, 6, 11, 18, 21)}, r"cu_seqlens: expected 22 \(the number of tokens\) .*, got 21"),
    "no elements": ({"cu_seqlens": cu()}, r"cu_seqlens: expected at least one element, got none"),
    "odd": ({"cu_seqlens": cu(0, 6, 11, 22)}, r"cu_seqlens: expected an even number .*, got 3. Pass whole"),
    "int64": ({"cu_seqlens": cu(0, 6, 11, 18, 22).long()}, r"cu_seqlens: expected int32 \[any\], got int64 \[5\]"),
    "list": ({"cu_seqlens": [0, 6, 11, 18, 22]}, r"cu_seqlens: expected a plain torch.Tensor, got list"),
    "target dtype": ({"target": torch.zeros(22).int()}, r"target: expected int64 \[22\], got int32 \[22\]"),
    "target length": ({"target": torch.zeros(21).long()}, r"target: expected int64 \[22\], got int64 \[21\]"),
    "shape": ({"logprob": torch.zeros(22, 1)}, r"logprob: expected float32 or float64 \[any\], got float32 \[22, 1\]"),
    "dtype": ({"logprob": torch.zeros(22).bfloat16()}, r"logprob: expected float32 or float64 \[any\], got bfloat16"),
    "strided": ({"logprob": torch.zeros(22, 2)[:, 0]}, r"logprob: expected a contiguous tensor, got strides \(2\)"),
    "no reference": ({"reference_logprob": None}, r"reference_logprob: .* \[4\].*, got None. dpo_sigmoid needs it"),
    "no previous": ({"objective": objectives.INPO(), "previous_logprob": None}, r"previous_logprob: .* inpo needs it"),
    "no reward": ({"objective": objectives.REBEL(), "reward": None}, r"reward: expected .* got None. rebel needs it"),
    "no label": ({"objective": objectives.KTO(), "reward": None}, r"reward: expected .* got None. kto needs it"),
    "column dtype": (
        {"reference_logprob": torch.zeros(4).double()},
        r"reference_logprob: expected float32 \[4\], got float64 \[4\]",
    ),
    "column length": (
        {"reference_logprob": torch.zeros(2)},
        r"reference_logprob: expected float32 \[4\], got float32 \[2\]",
    ),
    "device": ({"reward": torch.zeros(4, device="meta")}, r"reward: expected a tensor on cpu, got one on meta"),
    "kl": ({"objective": objectives.KTO(), "kl": torch.zeros(2)}, r"kl: expected a number or one element, got "),
    "empty sequence": (
        {"objective": objectives.SimPO(), "cu_seqlens": cu(0, 6, 6, 18, 22)},
        r"target: expected a scored token in every sequence, because simpo_sigmoid divides by their number, "
        r"got none in sequence 1 \(tokens 6 to 6\). Drop the row",
    ),
    "nothing scored": (
        {"objective": objectives.DPO(sft_weight=0.1), "target": torch.full((22,), -100)},
        r"got none in sequence 0 \(tokens 0 to 6\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    logprob, target, cu_seqlens, kwargs = _small(objectives.DPO())
    args = {"logprob": logprob, "target": target, "cu_seqlens": cu_seqlens, "objective": objectives.DPO(), **kwargs}
    with pytest.raises(ValueError, match=message):
        preference_loss_from_logprob(**(args | change))


def test_target_outside_the_vocabulary_is_named():
    case = reference.Case("small", objectives.SimPO(), (6, 5))
    (hidden, weight, target, cu_seqlens), _ = case.inputs()
    target[4] = 101
    with pytest.raises(ValueError, match=r"target: expected class indices in \[0, 101\) .*, got 101 at row 4"):
        fastpost.preference_loss(hidden, weight, target, cu_seqlens, objectives.SimPO())


def test_nan_reaches_the_loss_of_its_pair_only():
    case = reference.Case("small", objectives.SimPO(), (6, 5, 7, 4))
    (hidden, weight, target, cu_seqlens), _ = case.inputs()
    hidden[5] = torch.nan
    out = fastpost.preference_loss(hidden, weight, target, cu_seqlens, objectives.SimPO())
    assert out.losses.isnan().tolist() == [True, False] and out.loss.isnan()


def test_sequence_without_scored_tokens_is_a_sum_of_zero():
    """Where nothing divides by the length an empty sequence is defined: log-prob 0, no gradient."""
    logprob, target, _, kwargs = _small(objectives.DPO())
    x = logprob.clone().requires_grad_()
    out = preference_loss_from_logprob(x, target, cu(0, 0, 11, 18, 22), objectives.DPO(), **kwargs)
    assert out.logprob[0] == 0 and out.length[0] == 0 and out.losses.isfinite().all()
    out.loss.backward()
    assert x.grad.isfinite().all()
