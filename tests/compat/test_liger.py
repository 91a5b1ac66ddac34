# SPDX-License-Identifier: Apache-2.0
"""compat.liger against Liger itself where it is installed, and against formulas in float64 written down here."""

import inspect

import pytest
import torch
from torch.nn.functional import logsigmoid

from compare import error
from fastpost.compat import liger

PAIRS, LENGTH, D, V = 3, 7, 31, 123
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def inputs(dtype, seed=0, sequences=2 * PAIRS, ignored=0.4, bias=True):
    """weight, hidden, bias of the policy and of a wider reference, rounded to dtype; target."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    target = torch.randint(0, V, (sequences, LENGTH), generator=g)
    target[torch.rand(sequences, LENGTH, generator=g) < ignored] = -100
    target[:, -1] = 5  # something is scored everywhere
    policy = [draw(V, D) / 4, draw(sequences, LENGTH, D), draw(V) if bias else None]
    reference = [draw(sequences, LENGTH, D + 2), draw(V, D + 2) / 4, draw(V) if bias else None]
    return policy, target, reference


def sums(weight, hidden, target, bias):
    """Logits, summed log-probs [S] and lengths [S]; softmax in float32 at least, as everybody has it."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scored = target != -100
    tokens = wide.log_softmax(-1).gather(2, target.clamp(min=0)[..., None])[..., 0]
    return wide, (tokens * scored).sum(1), scored.sum(1)


def smooth(z, e):
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)


def dpo(kind, x, y, beta, e, tau):
    """x, y: log-ratios of chosen and rejected."""
    z = beta * (x - y)
    return {
        "sigmoid": lambda: smooth(z, e),
        "hinge": lambda: (1 - z).clamp(min=0),
        "exo_pair": lambda: z.sigmoid() * (z.sigmoid() / (1 - e)).log() + (-z).sigmoid() * ((-z).sigmoid() / e).log(),
        "nca_pair": lambda: -logsigmoid(beta * x) - 0.5 * (logsigmoid(-beta * x) + logsigmoid(-beta * y)),
        "robust": lambda: (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e),
        "bco_pair": lambda: -logsigmoid(beta * x) - logsigmoid(-beta * y),
        "sppo_hard": lambda: (x - 0.5 / beta) ** 2 + (y + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - (beta * x).sigmoid() + (beta * y).sigmoid(),
        "apo_down": lambda: (beta * x).sigmoid() + 1 - z.sigmoid(),
        "discopop": lambda: -logsigmoid(z) * (1 - (z / tau).sigmoid()) + (-z).exp() * (z / tau).sigmoid(),
    }[kind]()


def formula(name, policy, target, reference, **o):
    """(loss, *aux) in Liger's order, from whole logits."""
    weight, hidden, bias = policy
    b = len(target) // 2
    logits, lp, length = sums(weight, hidden, target, bias)
    nll = -lp[:b].sum() / length[:b].sum() if o.get("compute_nll_loss", name != "DPO") else lp.new_zeros(())
    beta, e = o.get("beta", 0.1), o.get("label_smoothing", 0.0)
    average = o.get("average_log_prob", name in ("SimPO", "ORPO"))
    logps = lp / length if average else lp
    ratios = logps
    if name == "DPO" and o.get("use_ref_model", True):
        ref_input, ref_weight, ref_bias = reference
        ref = sums(ref_weight, ref_input, target, ref_bias)[1]
        ratios = logps - (ref / length if average else ref)
    x, y = ratios.split(b)
    more = ()
    if name == "SimPO":
        losses = smooth(beta * (x - y) - o.get("gamma", 0.5), e)
    elif name == "CPO":
        losses = smooth(beta * (x - y), e)
    elif name == "ORPO":
        odds = (x - torch.log1p(-x.exp())) - (y - torch.log1p(-y.exp()))
        losses, more = -beta * logsigmoid(odds), (logsigmoid(odds).mean(), odds.mean())
    else:
        losses = dpo(o.get("loss_type", "sigmoid"), x, y, beta, e, o.get("discopop_tau", 0.05))
    means = logits[:b].mean(), logits[b:].mean()
    loss = losses.mean() + o.get("alpha", 1.0) * nll
    return loss, *logps.split(b), *means, nll, beta * x, beta * y, *more


def gradients(f, policy, convert):
    leaves = [None if t is None else convert(t).detach().requires_grad_() for t in policy]
    out = f(leaves)
    (2.5 * out[0]).backward()
    return [x.detach() for x in out], [t.grad for t in leaves if t is not None]


def call(module, name, options, target, reference, convert=torch.clone):
    loss = getattr(module, f"LigerFusedLinear{name}Loss")(compiled=False, **options)
    more = [None if t is None else convert(t) for t in reference] if options.get("use_ref_model", True) else []

    def f(leaves):
        weight, hidden, bias = leaves
        value, aux = loss(weight, hidden, target, bias, *(more if name == "DPO" else []))
        return value, *aux

    return f


CASES = [
    ("SimPO", {}),
    ("SimPO", {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.1, "alpha": 0.3}),
    ("SimPO", {"beta": 2.0, "compute_nll_loss": False, "chunk_size": 2}),
    ("CPO", {}),
    ("CPO", {"average_log_prob": True, "label_smoothing": 0.2, "alpha": 2.0}),
    ("ORPO", {}),
    ("ORPO", {"beta": 0.7, "compute_nll_loss": False}),
    ("DPO", {}),
    ("DPO", {"use_ref_model": False, "compute_nll_loss": True, "alpha": 0.5}),
    ("DPO", {"average_log_prob": True, "beta": 3.0}),
    *[("DPO", {"loss_type": t, "beta": 0.3}) for t in ("hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero")],
    ("DPO", {"loss_type": "exo_pair", "label_smoothing": 0.05, "average_log_prob": True}),
    ("DPO", {"loss_type": "robust", "label_smoothing": 0.2, "compute_nll_loss": True}),
    ("DPO", {"loss_type": "apo_down", "beta": 0.02}),
    ("DPO", {"loss_type": "discopop", "discopop_tau": 0.7}),
]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_pairs_match_the_formula(name, options, dtype):
    policy, target, reference = inputs(dtype)
    ours, grads = gradients(call(liger, name, options, target, reference), policy, torch.clone)

    def plain(convert):
        ref = [convert(t) for t in reference]
        return gradients(lambda leaves: formula(name, leaves, target, ref, **options), policy, convert)

    (truth, true_grads), (rounded, rounded_grads) = plain(torch.Tensor.double), plain(torch.clone)
    assert len(ours) == len(truth)
    for a, b, t in zip(ours + grads, rounded + rounded_grads, truth + true_grads):
        assert a.shape == t.shape
        assert error(a.reshape(-1), t.reshape(-1)) <= max(LIMITS[dtype], 1.5 * error(b.reshape(-1), t.reshape(-1)))
    assert all(a.dtype == torch.float32 for a in ours) and all(g.dtype == dtype for g in grads)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_pairs_equal_liger(name, options, bias):
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="compared with Liger where it is installed")
    policy, target, reference = inputs(torch.float32, seed=1, bias=bias)
    expected, expected_grads = gradients(call(theirs, name, options, target, reference), policy, torch.clone)
    ours, grads = gradients(call(liger, name, options, target, reference), policy, torch.clone)
    for a, b in zip(ours + grads, expected + expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_orpo_scores_another_target_for_the_nll():
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="compared with Liger where it is installed")
    policy, target, _ = inputs(torch.float32)
    nll_target = torch.where(target == -100, 7, target)  # the prompt, too
    results = []
    for module in (theirs, liger):
        loss = module.LigerFusedLinearORPOLoss(compiled=False)

        def f(leaves, loss=loss):
            value, aux = loss(leaves[0], leaves[1], target, leaves[2], nll_target)
            return value, *aux

        results.append(gradients(f, policy, torch.clone))
    for a, b in zip(results[1][0] + results[1][1], results[0][0] + results[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- KTO ----

LABELS = torch.tensor([True, False, True, True, False])
KTO_CASES = [
    {},
    {"use_ref_model": True, "beta": 0.3},
    {"use_ref_model": True, "average_log_prob": True, "beta": 2.0, "kl": 0.4},
    {"use_ref_model": True, "kl": -0.3},
    {"use_ref_model": True, "kl": "each"},
]


def kto_formula(policy, target, reference, kl, **o):
    weight, hidden, bias = policy
    logits, lp, length = sums(weight, hidden, target, bias)
    ratios = logps = lp / length if o.get("average_log_prob") else lp
    if o.get("use_ref_model"):
        ref = sums(reference[1], reference[0], target, reference[2])[1]
        ratios = logps - (ref / length if o.get("average_log_prob") else ref)
    beta = o.get("beta", 0.1)
    z = beta * (ratios - (0 if kl is None else kl))
    losses = 1 - torch.where(LABELS, z, -z).sigmoid()
    parts = [x[rows].sum() for x in (logps, logits, beta * ratios) for rows in (LABELS, ~LABELS)]
    return losses.mean(), *parts


def kto_options(case, sequences):
    options = dict(case)
    kl = options.pop("kl", None)
    return options, torch.linspace(-0.5, 0.5, sequences) if kl == "each" else None if kl is None else torch.tensor(kl)


def kto(module, target, reference, kl, **options):
    loss = module.LigerFusedLinearKTOLoss(compiled=False, **options)
    more = reference if options.get("use_ref_model") else [None] * 3

    def f(leaves):
        value, aux = loss(leaves[1], leaves[0], target, leaves[2], LABELS, *more, kl)
        return value, *aux

    return f


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", KTO_CASES, ids=str)
def test_kto_matches_the_formula(case, dtype):
    policy, target, reference = inputs(dtype, sequences=len(LABELS))
    options, kl = kto_options(case, len(LABELS))
    ours, grads = gradients(kto(liger, target, reference, kl, **options), policy, torch.clone)

    def plain(convert):
        ref = [convert(t) for t in reference]
        return gradients(lambda leaves: kto_formula(leaves, target, ref, kl, **options), policy, convert)

    (truth, true_grads), (rounded, rounded_grads) = plain(torch.Tensor.double), plain(torch.clone)
    for a, b, t in zip(ours + grads, rounded + rounded_grads, truth + true_grads, strict=True):
        assert a.shape == t.shape
        assert error(a.reshape(-1), t.reshape(-1)) <= max(LIMITS[dtype], 1.5 * error(b.reshape(-1), t.reshape(-1)))


@pytest.mark.parametrize("case", KTO_CASES[:4], ids=str)  # Liger pairs a kl of one element each with chunks wrongly
def test_kto_equals_liger(case):
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="compared with Liger where it is installed")
    policy, target, reference = inputs(torch.float32, seed=2, sequences=len(LABELS))
    options, kl = kto_options(case, len(LABELS))
    expected, expected_grads = gradients(kto(theirs, target, reference, kl, **options), policy, torch.clone)
    ours, grads = gradients(kto(liger, target, reference, kl, **options), policy, torch.clone)
    for a, b in zip(ours + grads, expected + expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- the same signatures, and what differs on purpose ----

NAMES = ("SimPO", "CPO", "ORPO", "DPO", "KTO")


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_ligers(name):
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="compared with Liger where it is installed")
    a, b = (getattr(module, f"LigerFusedLinear{name}Loss") for module in (liger, theirs))
    for method in ("__init__", "forward"):
        ours, expected = (inspect.signature(getattr(cls, method)).parameters for cls in (a, b))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in expected.values()]
    assert {k: v for k, v in vars(b()).items() if k[0] != "_"} == {k: v for k, v in vars(a()).items() if k[0] != "_"}


@pytest.mark.parametrize("name", ["SimPO", "CPO", "ORPO", "DPO"])
def test_sequence_without_scored_tokens_counts_as_zero(name):
    """Liger divides 0 by 0 here. The other pairs' gradient must be what it is without this pair, up to the count."""
    policy, target, reference = inputs(torch.float32)
    options = {"compute_nll_loss": False} | ({"average_log_prob": True} if name in ("CPO", "DPO") else {})
    empty = target.clone()
    empty[0] = -100
    out, grads = gradients(call(liger, name, options, empty, reference), policy, torch.clone)
    assert all(x.isfinite().all() for x in out + grads) and out[1][0] == 0
    _, whole_grads = gradients(call(liger, name, options, target, reference), policy, torch.clone)
    others = [1, 2, 4, 5]
    torch.testing.assert_close(grads[1][others], whole_grads[1][others])
    assert torch.all(grads[1][0] == 0) and torch.any(whole_grads[1][0] != 0)


def test_nothing_scored_at_all():
    policy, target, reference = inputs(torch.float32)
    for name in ("SimPO", "DPO"):
        out, grads = gradients(call(liger, name, {}, torch.full_like(target, -100), reference), policy, torch.clone)
        assert all(x.isfinite().all() for x in out) and all(torch.all(g == 0) for g in grads)


def test_unscored_rows_do_not_reach_the_head(monkeypatch):
    policy, target, reference = inputs(torch.float32)
    rows, loss = [], liger.preference_loss
    monkeypatch.setattr(liger, "preference_loss", lambda x, *a, **k: (rows.append(len(x)), loss(x, *a, **k))[1])
    call(liger, "DPO", {}, target, reference)(policy)
    assert rows == [int((target != -100).sum())] * 2  # reference and policy


def test_aux_outputs_have_no_gradient():
    policy, target, reference = inputs(torch.float32)
    policy[0].requires_grad_()
    for name in ("SimPO", "ORPO", "DPO"):
        out = call(liger, name, {}, target, reference)(policy)
        assert out[0].requires_grad and not any(x.requires_grad for x in out[1:])


@pytest.mark.parametrize("margin", [-200.0, 200.0])
def test_discopop_and_orpo_stay_finite(margin):
    """Chosen certain and rejected all but impossible, and the other way round."""
    weight, hidden = torch.zeros(4, 2), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    weight[0] = torch.tensor([margin, -margin])
    weight.requires_grad_()
    target = torch.zeros(2, 1, dtype=torch.int64)
    for loss in (
        liger.LigerFusedLinearDPOLoss(loss_type="discopop", use_ref_model=False, beta=1.0),
        liger.LigerFusedLinearORPOLoss(),
    ):
        value, aux = loss(weight, hidden, target)
        (grad,) = torch.autograd.grad(value, weight)
        assert value.isfinite() and grad.isfinite().all() and all(x.isfinite().all() for x in aux)


BAD = {
    "odd": (lambda w, x, t: liger.LigerFusedLinearSimPOLoss()(w, x[:3], t[:3]), r"SimPOLoss\] target: .* even .*got 3"),
    "flat": (lambda w, x, t: liger.LigerFusedLinearCPOLoss()(w, x.flatten(0, 1), t), r"_input: expected \[sequences, "),
    "no reference": (
        lambda w, x, t: liger.LigerFusedLinearDPOLoss()(w, x, t),
        r"ref_input: .* use_ref_model=True, got",
    ),
    "loss type": (lambda w, x, t: liger.LigerFusedLinearDPOLoss(loss_type="ipo"), r"loss_type: expected one of 'sigm"),
    "unused": (
        lambda w, x, t: liger.LigerFusedLinearDPOLoss(loss_type="hinge", label_smoothing=0.1),
        r"label_smoothing: expected 0 with loss_type 'hinge'",
    ),
    "beta": (lambda w, x, t: liger.LigerFusedLinearSimPOLoss(beta=0.0)(w, x, t), r"beta: expected a finite number ab"),
    "labels": (
        lambda w, x, t: liger.LigerFusedLinearKTOLoss()(x, w, t),
        r"preference_labels: expected bool \[6\], got",
    ),
    "kl": (
        lambda w, x, t: liger.LigerFusedLinearKTOLoss()(x, w, t, None, torch.ones(6) > 0, kl=torch.zeros(2)),
        r"kl: expected a number, one element or \[6\], got \[2\]",
    ),
    "vocabulary": (lambda w, x, t: liger.LigerFusedLinearSimPOLoss()(w, x, t + V), r"class indices in \[0, 123\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    run, message = BAD[name]
    (weight, hidden, _), target, _ = inputs(torch.float32, ignored=0.0)
    with pytest.raises(ValueError, match=message):
        run(weight, hidden, target)
