# SPDX-License-Identifier: Apache-2.0
"""Silent bugs of other libraries' fused losses, one test each: what went wrong there must show here if it went wrong
here. Named after the upstream issue or pull request.

Not here, because fastpost has nothing that could be wrong in that way:

    trl #6629                 JSD distillation that left out logit scale and softcap: there is no distillation loss.
    verl #3723, #6068         the ops take shifted targets and shift nothing; tested on the drop-in that does shift.
    Megatron #5115            "fused cross entropy off by default": the consequence of #1627, which is tested.
    vllm speculators #788     p - q in bfloat16 between two models: there is no such loss; label smoothing of
                              compat.torch has the same difference and is tested in its place.
"""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastpost
from compare import error
from drawn import MIB, cu, draw, gradients, pick
from fastpost import objectives
from fastpost.compat import cce, liger
from fastpost.compat import torch as compat_torch
from fastpost.ops.policy_loss import policy_loss_from_logprob
from fastpost.ops.preference_loss import preference_loss_from_logprob
from fastpost.reference import linear_logprob as reference

# ---- wrong numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [1, 7, 63, 65, 1001, 4097, 9000])
def test_verl_2656_2899_vocab_not_a_multiple_of_the_tile(v, device):
    """Columns past the vocabulary's end counted as logits of 0: log-probs up to +123, rewards that collapsed."""
    hidden, weight, bias = draw(40, 16, device=device), draw(v, 16, seed=1, device=device), draw(v, seed=2) - 80
    bias, target = bias.to(device), pick(v, 40, device=device)  # one phantom e^0 would outweigh every real e^-80
    truth = reference.linear_logprob(hidden.double(), weight.double(), target, bias=bias.double())
    ours = fastpost.linear_logprob(hidden, weight, target, bias=bias, memory_budget=MIB)
    logits = hidden @ weight.T + bias
    for logprob in (ours, fastpost.token_logprob(logits, target)):
        assert torch.all(logprob <= 0)
        torch.testing.assert_close(logprob.double(), truth, rtol=1e-5, atol=1e-4)


def test_verl_3723_6068_labels_rolled_within_a_shard(device):
    """Each shard of a sequence rolled its own labels: its last position was scored on its first label."""
    e, c = draw(2, 8, 16, device=device), draw(50, 16, seed=1, device=device)
    labels = pick(50, 2, 8, device=device)
    whole = cce.linear_cross_entropy(e, c, labels, reduction="none", shift=1)
    truth = -(e[:, :-1].double() @ c.double().T).log_softmax(-1).gather(2, labels[:, 1:, None])[..., 0]
    torch.testing.assert_close(whole, truth.float(), rtol=1e-5, atol=1e-5)
    # The way for shards: shift first, then cut.
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    halves = [fastpost.linear_logprob(x.flatten(0, 1), c, y.flatten()).view(2, 4)
              for x, y in zip(e.split(4, 1), shifted.split(4, 1))]  # fmt: skip
    torch.testing.assert_close(-torch.cat(halves, 1)[:, :-1], whole)


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


ENTRY_POINTS = {
    "linear_logprob": lambda h, w, t: fastpost.linear_logprob(h, w, t).sum(),
    "token_logprob": lambda h, w, t: fastpost.token_logprob(h @ w.T, t).sum(),
    "preference_loss": lambda h, w, t: (
        fastpost.preference_loss(h, w, t, cu(4, 8, device=h.device), objectives.SimPO()).loss
    ),
    "liger": lambda h, w, t: liger.LigerFusedLinearSimPOLoss()(w, h.view(2, 4, -1), t.view(2, 4))[0],
    "cce": lambda h, w, t: cce.linear_cross_entropy(h, w, t),
    "torch": lambda h, w, t: compat_torch.linear_cross_entropy(h, w, t, label_smoothing=0.1),
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_verl_6913_1720_gradient_lost_inside_another_function(name, device):
    """requires_grad was read where autograd had switched it off: no gradient and no error, next to other people's
    autograd functions and under reentrant checkpointing, which runs the forward without a graph first."""
    f = ENTRY_POINTS[name]
    hidden, weight, target = draw(8, 16, device=device), draw(50, 16, seed=1, device=device), pick(50, 8, device=device)
    _, plain = gradients(lambda h, w: f(2 * h, w, target), (hidden, weight))
    assert all(g.abs().max() > 0 for g in plain)
    ways = {
        "after a function": lambda h, w: f(_Double.apply(h), w, target),
        "reentrant": lambda h, w: checkpoint(lambda a, b: f(2 * a, b, target), h, w, use_reentrant=True),
        "recomputed": lambda h, w: checkpoint(lambda a, b: f(2 * a, b, target), h, w, use_reentrant=False),
    }
    for way, run in ways.items():
        for a, b in zip(gradients(run, (hidden, weight))[1], plain):
            torch.testing.assert_close(a, b, msg=way)
    for frozen in (0, 1):  # one leaf alone keeps the graph
        leaves = [hidden.clone(), weight.clone()]
        leaves[1 - frozen].requires_grad_()
        f(*leaves, target).backward()
        assert leaves[frozen].grad is None and leaves[1 - frozen].grad.abs().max() > 0


@pytest.mark.parametrize("name", ["linear_logprob", "token_logprob", "cce", "torch"])
def test_liger_1298_every_row_has_its_own_incoming_gradient(name, device):
    """reduction="none" multiplied every row by the first row's incoming gradient; tests had only ones."""
    rows = {
        "linear_logprob": lambda h, w: fastpost.linear_logprob(h, w, target),
        "token_logprob": lambda h, w: fastpost.token_logprob(h @ w.T, target),
        "cce": lambda h, w: -cce.linear_cross_entropy(h, w, target, reduction="none"),
        "torch": lambda h, w: -compat_torch.linear_cross_entropy(h, w, target, reduction="none"),
    }
    hidden, weight, target = draw(9, 16, device=device), draw(50, 16, seed=1, device=device), pick(50, 9, device=device)
    grad = torch.tensor([0.0, 1, -3, 0, 7, 1e-4, 100, -1, 0.5], device=device)
    _, ours = gradients(rows[name], (hidden, weight), grad=grad)
    _, truth = gradients(
        lambda h, w: reference.linear_logprob(h, w, target), (hidden, weight), torch.Tensor.double, grad
    )
    for a, b in zip(ours, truth):
        assert error(a, b) < 1e-5
    assert torch.all(ours[0][grad == 0] == 0)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo"])
def test_liger_1082_ratio_and_normaliser_of_grpo(loss_type, device):
    """The probability ratio was dropped and the sum divided by another count: gradients 100 times off."""
    hidden, weight, target = draw(9, 8, device=device), draw(40, 8, seed=1, device=device), pick(40, 9, device=device)
    ends, advantage = cu(2, 9, device=device), torch.tensor([1.0, -2.0], device=device)
    exact = reference.linear_logprob(hidden.double(), weight.double(), target)
    old = exact - 0.5 * draw(9, seed=2, device=device)
    objective = objectives.GRPO(loss_type, epsilon_low=1.0, epsilon_high=50.0)  # nothing is clipped

    def plain(h, w):
        lp = reference.linear_logprob(h, w, target)
        r = (lp - old).exp()
        r = r.detach() * lp if loss_type == "cispo" else r
        if loss_type == "grpo":
            return -(r[:2].mean() - 2 * r[2:].mean()) / 2
        return -(r[:2].sum() - 2 * r[2:].sum()) / 9

    truth, true_grads = gradients(plain, (hidden, weight), torch.Tensor.double, torch.ones(()))
    ours, grads = gradients(
        lambda h, w: (
            fastpost.policy_loss(h, w, target, ends, objective, advantage=advantage, old_logprob=old.float()).loss
        ),
        (hidden, weight),
        grad=torch.ones(()),
    )
    assert max(map(error, (ours[None], *grads), (truth[None], *true_grads))) < 1e-5
    assert grads[0].norm() / true_grads[0].norm() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("top", [6.0, 9.0, 12.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_liger_1329_te_3193_te_2139_megatron_1627_certain_target(dtype, top, device):
    """p -> 1: the target's column was rounded, or read, changed and written in bfloat16, and 1 - p was gone: vanishing
    gradients, or losses that diverge."""
    v, d = 600, 8  # logits are exact in bfloat16, so that only the softmax can lose anything
    weight = torch.zeros(v, d, dtype=dtype, device=device)
    target = torch.tensor([5, 17, 599], device=device)
    weight[target, torch.arange(3)] = top / 2
    hidden = 2 * torch.eye(3, d, dtype=dtype, device=device)
    for budget in (MIB, None):
        _, (dx, dw) = gradients(
            lambda h, w, b=budget: fastpost.linear_logprob(h, w, target, memory_budget=b), (hidden, weight),
            grad=torch.ones(3),
        )  # fmt: skip
        rest = math.log1p((v - 1) * math.exp(-top))
        left = -math.expm1(-rest)  # 1 - p
        assert 0 < left < 0.9
        for i in range(3):
            assert float(dw[target[i], i]) == pytest.approx(2 * left, rel=5e-3)
            assert float(dx[i, i]) == pytest.approx(top / 2 * left, rel=1e-2)
    logits = (hidden.float() @ weight.float().T).to(dtype)
    _, (dz,) = gradients(lambda z: fastpost.token_logprob(z, target), (logits,), grad=torch.ones(3))
    for i in range(3):
        assert float(dz[i, target[i]]) == pytest.approx(left, rel=5e-3)


def test_cce_52_bias(device):
    """The bias was left out of one of two terms: losses below zero that no test saw, because its bias was small."""
    hidden, weight = draw(30, 16, device=device), draw(70, 16, seed=1, device=device) / 4
    bias, target = 5 * draw(70, seed=2, device=device), pick(70, 30, device=device)
    truth, true_grads = gradients(
        lambda h, w, b: reference.linear_logprob(h, w, target, bias=b), (hidden, weight, bias), torch.Tensor.double
    )
    ways = {
        "linear_logprob": lambda h, w, b: fastpost.linear_logprob(h, w, target, bias=b),
        "cce": lambda h, w, b: -cce.linear_cross_entropy(h, w, target, b, reduction="none"),
        "torch": lambda h, w, b: -compat_torch.linear_cross_entropy(h, w, target, linear_bias=b, reduction="none"),
    }
    for name, f in ways.items():
        ours, grads = gradients(f, (hidden, weight, bias))
        assert torch.all(ours < 0), name
        assert max(map(error, (ours, *grads), (truth, *true_grads))) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cce_14_gradient_of_the_classifier(dtype, device):
    """The classifier's gradient was far off where many rows share a class."""
    hidden, weight = draw(2000, 16, device=device, dtype=dtype), draw(90, 16, seed=1, device=device, dtype=dtype)
    target = pick(5, 2000, device=device) * 20

    def run(op, convert, **options):
        return gradients(lambda w: op(convert(hidden), w, target, **options), (weight,), convert)[1][0]

    truth, plain = (run(reference.linear_logprob, convert) for convert in (torch.Tensor.double, torch.clone))
    for budget in (MIB, None):
        ours = run(fastpost.linear_logprob, torch.clone, memory_budget=budget)
        assert error(ours, truth) <= 1.5 * error(plain, truth) + 1e-5


def test_cce_48_softcap_of_gemma2(device):
    """The patch of Gemma 2 never passed the softcap on."""
    pytest.importorskip("transformers")
    import tiny
    from fastpost.compat.trl import add_fused_lm_head

    model = tiny.model("gemma2").to(device)  # capped at 3
    ids = torch.arange(40, 60, device=device)[None]
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
        assert model(ids).logits.abs().max() > 2.5
    add_fused_lm_head(model)
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, fused_lm_head=True).loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_unsloth_zoo_593_softcap_is_c_tanh_of_x_over_c(scale, device):
    """Another formula stood in for c·tanh(x / c), in the value, in the derivative or in some of the losses only."""
    hidden, weight, target = draw(8, 16, device=device), draw(60, 16, seed=1, device=device), pick(60, 8, device=device)
    hidden, c = hidden * scale / 4, 10.0

    def plain(h, w):
        z = h @ w.T
        return (c * torch.tanh(z / c)).log_softmax(-1).gather(1, target[:, None])[:, 0]

    grad = torch.linspace(-1, 2, 8, device=device)
    truth, true_grads = gradients(plain, (hidden, weight), torch.Tensor.double, grad)
    ways = {
        "linear_logprob": lambda h, w: fastpost.linear_logprob(h, w, target, softcap=c),
        "slices": lambda h, w: fastpost.linear_logprob(h, w, target, softcap=c, memory_budget=MIB),
        "token_logprob": lambda h, w: fastpost.token_logprob(h @ w.T, target, softcap=c),
        "preference_loss": lambda h, w: (
            fastpost.preference_loss(h, w, target, cu(*range(1, 9), device=device), objectives.SFT(), softcap=c).logprob
        ),
        "cce": lambda h, w: -cce.linear_cross_entropy(h, w, target, softcap=c, reduction="none"),
    }
    for name, f in ways.items():
        ours, grads = gradients(f, (hidden, weight), grad=grad)
        # 1 - tanh² near saturation has few digits in float32: a little of the largest row, not of each
        assert error(ours, truth) < 1e-5, name
        for a, b in zip(grads, true_grads):
            assert (a - b).norm() < 1e-4 * b.norm(), name


def test_trl_5691_scale_then_softcap_then_temperature(device):
    """Scale and softcap in the other order: the same at small logits, so that only large ones tell."""
    pytest.importorskip("transformers")
    from fastpost.compat.trl import ChunkedLogProbFunction

    hidden, weight, target = draw(8, 16, device=device), draw(60, 16, seed=1, device=device), pick(60, 8, device=device)
    z = hidden.double() @ weight.double().T
    truth = (5 * torch.tanh(3 * z / 5) / 0.7).log_softmax(-1).gather(1, target[:, None])[:, 0]
    swapped = (3 * 5 * torch.tanh(z / 5) / 0.7).log_softmax(-1).gather(1, target[:, None])[:, 0]
    ours = ChunkedLogProbFunction.apply(hidden, weight, None, target, 0.7, 32, 5.0, 3.0, ())[0]
    assert error(ours, truth) < 1e-5 < error(swapped, truth)


def _loss_from(logprob, objective, device, **columns):
    """Loss of sequences of one token each, with these log-probs."""
    x = torch.tensor(logprob, device=device)
    columns = {k: torch.tensor(v, device=device) for k, v in columns.items()}
    target = torch.zeros(len(x), dtype=torch.int64, device=device)
    ends = cu(*range(1, len(x) + 1), device=device)
    return preference_loss_from_logprob(x, target, ends, objective, **columns).loss.item()


def _softplus(x):
    return math.log1p(math.exp(x))


def test_trl_7062_label_smoothing_of_dpo_counts(device):
    """The fused loss took label_smoothing and left it out."""
    expected = 0.9 * _softplus(-0.3) + 0.1 * _softplus(0.3)  # z = 0.1 (-1 + 4) = 0.3
    objective = objectives.DPO(beta=0.1, label_smoothing=0.1)
    assert _loss_from([-1.0, -4.0], objective, device, reference_logprob=[0.0, 0.0]) == pytest.approx(expected)
    loss = liger.LigerFusedLinearDPOLoss(label_smoothing=0.1, use_ref_model=False)
    hidden, weight = draw(2, 3, 8, device=device), draw(20, 8, seed=1, device=device)
    target = pick(20, 2, 3, device=device)
    lp = fastpost.linear_logprob(hidden.flatten(0, 1), weight, target.flatten()).view(2, 3).sum(1)
    z = 0.1 * (lp[0] - lp[1]).item()
    assert loss(weight, hidden, target)[0].item() == pytest.approx(0.9 * _softplus(-z) + 0.1 * _softplus(z))


def test_trl_7062_class_weights_of_kto_count(device):
    """desirable_weight and undesirable_weight were left out."""
    objective = objectives.KTO(beta=0.1, desirable_weight=1.5, undesirable_weight=0.25)
    loss = _loss_from([-1.0, -4.0], objective, device, reference_logprob=[-2.0, -2.0], reward=[1.0, -1.0])
    expected = 1.5 / (1 + math.exp(0.1)) + 0.25 / (1 + math.exp(0.2))
    assert loss == pytest.approx(expected / 2)


def test_trl_7062_reference_counts(device):
    """KTO with adapters ran without its reference and said nothing. Here it is a column: a missing one is an error, and
    every reference-based loss depends on it."""
    for objective in (objectives.KTO(), objectives.DPO(), objectives.IPO(), objectives.LNDPO()):
        losses = {
            _loss_from([-1.0, -4.0], objective, device, reference_logprob=[r, -2.0], reward=[1.0, -1.0])
            for r in (-2.0, -3.0)
        }
        assert len(losses) == 2
        with pytest.raises(ValueError, match=r"reference_logprob: .* got None"):
            _loss_from([-1.0, -4.0], objective, device, reward=[1.0, -1.0])
    hidden, weight, target = draw(2, 3, 8, device=device), draw(20, 8, device=device), pick(20, 2, 3, device=device)
    with pytest.raises(ValueError, match="ref_input: expected a tensor"):
        liger.LigerFusedLinearKTOLoss(use_ref_model=True)(
            hidden, weight, target, None, torch.tensor([True, False], device=device)
        )


def test_trl_7062_kto_in_chunks_pairs_each_sequence_with_its_own_label(device):
    """chunk_size > 1 broadcast [chunk] against [batch], and every sequence met every label or KL."""
    hidden, weight = draw(5, 3, 8, device=device), draw(20, 8, seed=1, device=device)
    target = pick(20, 5, 3, device=device)
    label = torch.tensor([True, False, False, True, True], device=device)
    kl = torch.linspace(-1, 1, 5, device=device)
    whole = [
        liger.LigerFusedLinearKTOLoss(chunk_size=n)(hidden, weight, target, None, label, kl=kl)[0] for n in (1, 2, 5)
    ]
    one = [
        liger.LigerFusedLinearKTOLoss()(hidden[i : i + 1], weight, target[i : i + 1], None, label[i : i + 1], kl=kl[i])[
            0
        ]
        for i in range(5)
    ]
    for loss in whole:
        torch.testing.assert_close(loss, torch.stack(one).mean())


def test_trl_3346_masks_of_replies_of_different_lengths(device):
    """Masks and labels were built another way in the fused loss. Here padded pairs of any layout give what the bare
    replies give, whatever stands in prompt and padding."""
    weight = draw(40, 8, device=device)
    replies = [draw(n, 8, seed=n, device=device) for n in (3, 5, 4, 1)]  # chosen, chosen, rejected, rejected
    tokens = [pick(40, len(x), seed=i, device=device) for i, x in enumerate(replies)]
    hidden, target = draw(4, 9, 8, seed=9, device=device) * 50, torch.full((4, 9), -100, device=device)
    for i, start in enumerate((1, 4, 0, 7)):
        hidden[i, start : start + len(replies[i])] = replies[i]
        target[i, start : start + len(replies[i])] = tokens[i]
    loss, aux = liger.LigerFusedLinearDPOLoss(use_ref_model=False, compute_nll_loss=True)(weight, hidden, target)
    order = (0, 2, 1, 3)
    packed = torch.cat([replies[i] for i in order]), torch.cat([tokens[i] for i in order])
    ends = torch.tensor([len(replies[i]) for i in order]).cumsum(0).tolist()
    expected = fastpost.preference_loss(
        packed[0], weight, packed[1], cu(*ends, device=device), objectives.DPO(),
        reference_logprob=torch.zeros(4, device=device),
    )  # fmt: skip
    torch.testing.assert_close(loss, expected.loss - expected.logprob[0::2].sum() / 8)
    torch.testing.assert_close(torch.cat(aux[:2]), expected.logprob[[0, 2, 1, 3]])


def test_trl_5890_mean_over_tokens_of_all_micro_batches(device):
    """The normaliser was that of a micro-batch, so the gradient grew with the number of accumulation steps, and with
    replies of different lengths it was wrong by more than a factor."""
    hidden, weight, target = draw(12, 8, device=device), draw(40, 8, seed=1, device=device), pick(40, 12, device=device)
    whole = fastpost.preference_loss(hidden, weight, target, cu(5, 7, 8, 12, device=device), objectives.SFT())
    parts = [
        fastpost.preference_loss(hidden[a:b], weight, target[a:b], cu(*ends, device=device), objectives.SFT())
        for a, b, ends in ((0, 7, (5, 7)), (7, 12, (1, 5)))
    ]
    total = sum(p.losses.sum() for p in parts) / sum(p.length.sum() for p in parts)
    torch.testing.assert_close(total, whole.loss)
    assert abs((parts[0].loss + parts[1].loss) / 2 - whole.loss) > 1e-3
    halves = [cce.linear_cross_entropy(hidden[a:b], weight, target[a:b], reduction="sum") for a, b in ((0, 7), (7, 12))]
    torch.testing.assert_close(sum(halves) / 12, cce.linear_cross_entropy(hidden, weight, target))


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_trl_5890_policy_loss_over_micro_batches(loss_type, device):
    """The same for the token-averaged policy losses: with the step's count the parts add up to the whole."""
    objective = objectives.GRPO(loss_type, epsilon_high=5.0)
    logprob, target = -draw(12, device=device).abs(), torch.zeros(12, dtype=torch.int64, device=device)
    old, advantage = logprob + 0.1 * draw(12, seed=1, device=device), draw(4, seed=2, device=device)

    def run(begin, end, sequences, *ends):
        return policy_loss_from_logprob(
            logprob[begin:end], target[begin:end], cu(*ends, device=device), objective,
            advantage=advantage[sequences], old_logprob=old[begin:end], num_items=12,
        ).loss  # fmt: skip

    whole = run(0, 12, slice(0, 4), 5, 7, 8, 12)
    torch.testing.assert_close(run(0, 7, slice(0, 2), 5, 7) + run(7, 12, slice(2, 4), 1, 5), whole)


def test_liger_sequence_without_scored_tokens(device):
    """0 / 0 in the mean log-prob: one masked reply made the loss and the whole batch's gradient NaN."""
    hidden, weight = draw(4, 3, 8, device=device), draw(20, 8, seed=1, device=device)
    target = pick(20, 4, 3, device=device)
    target[2] = -100
    for loss in (liger.LigerFusedLinearSimPOLoss(), liger.LigerFusedLinearCPOLoss(average_log_prob=True)):
        value, grads = gradients(lambda h, w, f=loss: f(w, h, target)[0], (hidden, weight))
        assert value.isfinite() and all(g.isfinite().all() for g in grads) and torch.all(grads[0][2] == 0)
    if device == "cpu":  # the op itself names the sequence; on CUDA its mean is 0
        with pytest.raises(ValueError, match="a scored token in every sequence"):
            fastpost.preference_loss(
                hidden.flatten(0, 1), weight, target.flatten(), cu(3, 6, 9, 12), objectives.SimPO()
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_open_instruct_1387_prime_rl_2438_maxtext_5231_no_positive_logprob(dtype, device):
    """Logits rounded before the softmax, or a log-sum-exp rounded after it, gave log-probs above 0."""
    v, n = 1000, 400
    weight, target = draw(v, 32, device=device), pick(v, n, device=device)
    hidden = weight[target] * torch.linspace(0.2, 3, n, device=device)[:, None]
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    top = fastpost.linear_logprob(hidden, weight, target)
    assert torch.all(top <= 0) and (top > -1e-6).any()
    assert torch.all(fastpost.linear_logprob(hidden, weight, target, softcap=30.0, temperature=0.5) <= 0)
    assert torch.all(fastpost.token_logprob((hidden.float() @ weight.float().T).to(dtype), target) <= 0)


# ---- precision of sums ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6000, 16, 300), (64, 16, 60_000)], ids=["weight", "hidden"])
def test_axolotl_1601_megatron_2206_2739_sums_over_chunks(shape, device):
    """Gradients of the weight (over rows) and of the hidden states (over vocabulary slices) were summed in bfloat16:
    past a few chunks of one sign, addends are lost. Through tiles the error must stay that of one rounding."""
    n, d, v = shape
    hidden = (1 + draw(n, d, device=device).abs() / 8).bfloat16()
    weight = (draw(v, d, seed=1, device=device).abs() / 8).bfloat16()
    target = pick(3, n, device=device)
    grad = torch.ones(n, device=device)
    _, ours = gradients(
        lambda h, w: fastpost.linear_logprob(h, w, target, memory_budget=MIB), (hidden, weight), grad=grad
    )
    _, truth = gradients(
        lambda h, w: reference.linear_logprob(h, w, target), (hidden, weight), torch.Tensor.double, grad
    )
    assert error(ours[0], truth[0]) < 6e-3
    assert error(ours[1][:3], truth[1][:3]) < 6e-3  # half a unit of bfloat16 is 2e-3; the rest is p's own rounding


def test_cce_18_small_probabilities_keep_their_gradient(device):
    """Tiles in which every |p - onehot| was under 2^-12 were dropped, and with them most of a flat vocabulary."""
    v = 20_000
    hidden, weight = draw(64, 8, device=device).bfloat16(), (draw(v, 8, seed=1, device=device) / 8).bfloat16()
    target = pick(100, 64, device=device)
    grad = torch.linspace(0.5, 1, 64, device=device)
    _, (truth,) = gradients(
        lambda w: reference.linear_logprob(hidden.double(), w, target), (weight,), torch.Tensor.double, grad
    )
    assert truth[100:].abs().max() / grad.sum() < 2**-12  # each far below the threshold, together not
    for budget in (MIB, None):  # tiles with and without targets in them
        _, (ours,) = gradients(
            lambda w, b=budget: fastpost.linear_logprob(hidden, w, target, memory_budget=b), (weight,), grad=grad
        )
        assert error(ours[100:], truth[100:]) < 2e-2


def test_vllm_speculators_788_difference_of_two_distributions(device):
    """p - q formed from two bfloat16 numbers, or gradients, has no digits left where p is nearly q."""
    v, e = 8, 0.1
    hidden = torch.eye(4, 8, device=device).bfloat16()
    weight = torch.zeros(v, 8, device=device, dtype=torch.bfloat16)
    weight[torch.arange(4), torch.arange(4)] = 4.25  # the smoothed optimum is log(0.9125 / 0.0125) = 4.29
    target = torch.arange(4, device=device)

    def plain(h, w):
        return torch.nn.functional.cross_entropy(h @ w.T, target, label_smoothing=e)

    _, truth = gradients(plain, (hidden, weight), torch.Tensor.double, torch.ones(()))
    _, ours = gradients(
        lambda h, w: compat_torch.linear_cross_entropy(h, w, target, label_smoothing=e), (hidden, weight),
        grad=torch.ones(()),
    )  # fmt: skip
    for a, b in zip(ours, truth):
        assert 0 < b.abs().max() < 0.01 and error(a, b) < 1e-2
