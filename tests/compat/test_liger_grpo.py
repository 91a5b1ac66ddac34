# SPDX-License-Identifier: Apache-2.0
"""compat.liger's GRPO against Liger itself where it is installed, and against formulas in float64 written down here."""

import inspect

import pytest
import torch

from compare import error
from fastpost.compat.liger import LigerFusedLinearGRPOLoss

B, T, D, V = 6, 7, 31, 123
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 3e-2}


def inputs(dtype, seed=0):
    """Policy [weight, hidden, bias], what is fixed, and the reference's hidden states and weight."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    policy = [(draw(V, D) / 4).to(dtype), draw(B, T, D).to(dtype), draw(V).to(dtype)]
    ids = torch.randint(0, V, (B, T), generator=g)
    mask = (torch.arange(T) < torch.randint(2, T + 1, (B, 1), generator=g)).long()
    advantages = draw(B)
    advantages[2] = 0
    exact = logps([t.double() for t in policy], ids, 1.0).float()
    fixed = {
        "ids": ids,
        "mask": mask,
        "advantages": advantages,
        "old": exact + 0.2 * draw(B, T),
        "ref": exact + 0.4 * draw(B, T),
        "is_ratio": torch.rand(B, T, generator=g) + 0.5,
    }
    return policy, fixed, [draw(B, T, D).to(dtype), (draw(V, D) / 4).to(dtype)]


def logps(policy, ids, temperature):
    weight, hidden, bias = policy
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = z if z.dtype == torch.float64 else z.float()
    return (z / temperature).log_softmax(-1).gather(2, ids[..., None])[..., 0]


def formula(policy, fixed, reference, given, **o):
    """(loss, *metrics) with padding as it is."""
    temperature, mask, a = o.get("temperature", 1.0), fixed["mask"], fixed["advantages"][:, None]
    lp = logps(policy, fixed["ids"], temperature)
    mask, a = mask.to(lp.dtype), a.to(lp.dtype)
    old = fixed["old"].to(lp.dtype) if "old" in given else lp.detach()
    low, high = o.get("epsilon_low", 0.2), o.get("epsilon_high", 0.2)
    log_ratio = lp - old
    if o.get("importance_sampling_level") == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1))[:, None]
    r = log_ratio.exp()
    if o.get("loss_type") == "cispo":
        losses, clipped = -r.clamp(max=high).detach() * a * lp, (r > high) & (a > 0)
    else:
        free = r.clamp(max=o["delta"]) if o.get("delta") else r
        losses = -torch.minimum(free * a, r.clamp(1 - low, 1 + high) * a)
        clipped = ((r < 1 - low) & (a < 0)) | ((r > 1 + high) & (a > 0))
    if "is_ratio" in given:
        losses = losses * given["is_ratio"].to(lp.dtype).view(B, -1)
    metrics = ()
    if beta := o.get("beta", 0.04):
        if "ref" in given:
            ref = fixed["ref"].to(lp.dtype)
        else:
            ref = logps([reference[1], reference[0], None], fixed["ids"], temperature).detach()
        kl = (ref - lp).exp() - (ref - lp) - 1
        kl = torch.zeros_like(kl) if o.get("use_ref_model") is False else kl
        losses, metrics = losses + beta * kl, ((kl * mask).sum() / mask.sum(),)
    sums, tokens = (losses * mask).sum(1), mask.sum()
    loss = {
        "grpo": lambda: (sums / mask.sum(1)).mean(),
        "bnpo": lambda: sums.sum() / tokens,
        "dr_grpo": lambda: sums.sum() / (B * o["max_completion_length"]),
        "dapo": lambda: sums.sum() / given.get("num_items", tokens),
        "cispo": lambda: sums.sum() / given.get("num_items", tokens),
    }[o.get("loss_type", "dapo")]()
    return loss, *metrics, (clipped.expand_as(mask) * mask).sum() / tokens


def call(cls, fixed, reference, given, options):
    loss = cls(compiled=False, **options)
    more = {"old_per_token_logps": fixed["old"]} if "old" in given else {}
    if options.get("use_ref_model", True):
        more |= {"ref_per_token_logps": fixed["ref"]} if "ref" in given else {
            "ref_input": reference[0], "ref_weight": reference[1],
        }  # fmt: skip
    more |= {"vllm_is_ratio": given["is_ratio"]} if "is_ratio" in given else {}
    more |= {"num_items_in_batch": given["num_items"]} if "num_items" in given else {}

    def f(leaves):
        value, metrics = loss(leaves[1], leaves[0], fixed["ids"], fixed["mask"], fixed["advantages"], leaves[2], **more)
        return value, *metrics

    return f


def gradients(f, policy, convert):
    leaves = [convert(t).detach().requires_grad_() for t in policy]
    out = f(leaves)
    (2.5 * out[0]).backward()
    return [x.detach() for x in out], [t.grad for t in leaves]


CASES = [
    ({}, {"old", "ref"}),
    ({"beta": 0.0, "use_ref_model": False}, {"old"}),
    ({"use_ref_model": False}, set()),  # on-policy, and a KL against itself
    ({"temperature": 0.7, "loss_type": "grpo"}, {"old"}),  # the reference's hidden states
    ({"loss_type": "bnpo", "epsilon_low": 0.1, "epsilon_high": 0.3}, {"old", "ref", "num_items"}),
    ({"loss_type": "dr_grpo", "max_completion_length": 11, "delta": 1.3}, {"old", "ref"}),
    ({"loss_type": "dapo", "beta": 0.1}, {"old", "ref", "num_items", "token ratio"}),
    ({"loss_type": "cispo", "epsilon_high": 1.1}, {"old", "ref", "num_items", "ratio"}),
    ({"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.01, "epsilon_high": 0.01},
     {"old", "ref", "column ratio"}),
]  # fmt: skip


def expand(names, fixed):
    given = {name: True for name in names if name in ("old", "ref")}
    ratios = {
        "token ratio": fixed["is_ratio"],
        "ratio": fixed["is_ratio"][:, 0],
        "column ratio": fixed["is_ratio"][:, :1],
    }
    for name in names & ratios.keys():
        given["is_ratio"] = ratios[name]
    return given | ({"num_items": 57.0} if "num_items" in names else {})


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("options, names", CASES, ids=str)
def test_matches_the_formula(options, names, dtype):
    policy, fixed, reference = inputs(dtype)
    given = expand(names, fixed)
    if dtype != torch.float32:  # no token changes sides by rounding
        options = options | {"epsilon_low": 0.9, "epsilon_high": max(9.0, options.get("epsilon_high", 0))}
    ours, grads = gradients(call(LigerFusedLinearGRPOLoss, fixed, reference, given, options), policy, torch.clone)

    def plain(convert):
        ref = [convert(t) for t in reference]
        return gradients(lambda leaves: formula(leaves, fixed, ref, given, **options), policy, convert)

    (truth, true_grads), (rounded, rounded_grads) = plain(torch.Tensor.double), plain(torch.clone)
    for a, b, t in zip(ours + grads, rounded + rounded_grads, truth + true_grads, strict=True):
        assert a.shape == t.shape
        assert error(a.reshape(-1), t.reshape(-1)) <= max(LIMITS[dtype], 2 * error(b.reshape(-1), t.reshape(-1)))
    if dtype == torch.float32 and "old" in names and options.get("loss_type") != "cispo":
        assert truth[-1] > 0  # something is clipped


@pytest.mark.parametrize("options, names", CASES, ids=str)
def test_equals_liger(options, names):
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="compared with Liger where it is installed")
    policy, fixed, reference = inputs(torch.float32, seed=1)
    given = expand(names, fixed)
    results = [
        gradients(call(cls, fixed, reference, given, options), policy, torch.clone)
        for cls in (theirs.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss)
    ]
    for a, b in zip(results[1][0] + results[1][1], results[0][0] + results[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_signature_is_ligers():
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="compared with Liger where it is installed")
    for method in ("__init__", "forward"):
        ours, expected = (
            inspect.signature(getattr(cls, method)).parameters.values()
            for cls in (LigerFusedLinearGRPOLoss, theirs.LigerFusedLinearGRPOLoss)
        )
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in expected]


def test_as_many_tokens_as_sequences():
    """Token ratios are per token also where a batch has one token per sequence on average, and none in one."""
    policy, fixed, _ = inputs(torch.float32)
    fixed["mask"][:] = 0
    fixed["mask"][0, :2], fixed["mask"][2:, 0] = 1, 1
    given = {"old": True, "is_ratio": fixed["is_ratio"]}
    options = {"beta": 0.0, "use_ref_model": False}
    assert fixed["mask"].sum() == B
    ours, grads = gradients(call(LigerFusedLinearGRPOLoss, fixed, None, given, options), policy, torch.clone)
    truth, true_grads = gradients(lambda x: formula(x, fixed, None, given, **options), policy, torch.Tensor.double)
    for a, t in zip(ours + grads, truth + true_grads, strict=True):
        assert error(a.reshape(-1), t.reshape(-1)) < 5e-5


BAD = {
    "loss type": ({"loss_type": "sapo"}, {}, r"loss_type: expected one of grpo, .*, got 'sapo'"),
    "level": ({"importance_sampling_level": "batch"}, {}, r"importance_sampling_level: .*, got 'batch'"),
    "cispo level": (
        {"loss_type": "cispo", "epsilon_high": 5.0, "importance_sampling_level": "sequence"},
        {},
        r"importance_sampling_level: expected 'token' or, but for cispo, 'sequence'",
    ),
    "cispo cap": ({"loss_type": "cispo"}, {}, r"epsilon_high: expected a number of at least 1 with loss_type 'cispo'"),
    "kl": ({"use_bias_correction_kl": True}, {}, r"use_bias_correction_kl: expected False, got True"),
    "length": ({"loss_type": "dr_grpo"}, {}, r"max_completion_length: expected the limit of the rollouts"),
    "no reference": ({}, {}, r"ref_per_token_logps: expected a tensor \[B, T\], .*use_ref_model=False"),
    "a reference": (
        {"use_ref_model": False},
        {"ref_per_token_logps": torch.zeros(B, T)},
        r"use_ref_model: expected True with a reference, got False",
    ),
    "shape": ({"use_ref_model": False}, {"_input": torch.zeros(B, D)}, r"_input: expected \[sequences, T, D\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    options, change, message = BAD[name]
    (weight, hidden, _), fixed, _ = inputs(torch.float32)
    args = {"_input": hidden, "lin_weight": weight, "selected_token_ids": fixed["ids"],
            "attention_mask": fixed["mask"], "advantages": fixed["advantages"]}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)(**(args | change))
