# SPDX-License-Identifier: Apache-2.0
"""The plain definitions against TRL's own loss code, in float64.

TRL's methods run unbound on small stand-ins for the trainer and the model, so that nothing of theirs is re-typed here
and no trainer has to be built.
"""

import types
from collections import defaultdict

import pytest
import torch

from fastpost import objectives

trl = pytest.importorskip("trl", minversion="1.16", reason="compared with TRL where it is installed")
PAIRS, LENGTH, VOCAB = 5, 9, 13


def _accelerator():
    same = lambda x: x  # noqa: E731
    return types.SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)


def _interleave(chosen, rejected):
    return torch.stack([chosen, rejected], 1).flatten()


def _assert_same(loss, grads, expected_loss, expected_grads, rtol=1e-12):
    torch.testing.assert_close(loss, expected_loss, rtol=rtol, atol=0)
    assert any(g.abs().max() > 0 for g in expected_grads)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * theirs.abs().max().item())


class Scores:
    """Random token log-probs [n, LENGTH - 1] of n right-padded rows with prompts of different lengths."""

    def __init__(self, n, seed=0):
        g = torch.Generator().manual_seed(seed)
        start = torch.randint(1, 4, (n, 1), generator=g)
        end = torch.randint(5, LENGTH + 1, (n, 1), generator=g)
        position = torch.arange(LENGTH)
        self.completion = ((position >= start) & (position < end)).long()
        self.mask = self.completion[:, 1:]
        self.tokens = (-3 * torch.rand(n, LENGTH - 1, generator=g, dtype=torch.float64) * self.mask).requires_grad_()
        self.reference = self.tokens.detach().sum(1) + 2 * torch.randn(n, generator=g, dtype=torch.float64)
        self.length = self.mask.sum(1)

    def model(self, **kwargs):
        zero = torch.zeros_like(self.tokens)
        outputs = {"log_probs": self.tokens * self.mask, "entropy": zero, "mean_logits": zero, "is_top1": zero.bool()}
        return types.SimpleNamespace(**outputs)


def _trl_dpo(loss_type, scores, beta, label_smoothing, tau):
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=_accelerator(),
        args=types.SimpleNamespace(discopop_tau=tau),
        precompute_ref_logps=True,
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = scores.reference.chunk(2)
    inputs = {
        "input_ids": torch.ones_like(scores.completion),
        "attention_mask": torch.ones_like(scores.completion),
        "completion_mask": scores.completion,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = trl.DPOTrainer._compute_loss(trainer, scores.model, inputs, return_outputs=False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


DPO_CASES = [
    *[(t, objectives.DPO(beta=0.3, loss_type=t)) for t in objectives.DPO_LOSS_TYPES if t != "exo_pair"],
    ("robust", objectives.DPO(beta=0.3, loss_type="robust", label_smoothing=0.2)),
    ("exo_pair", objectives.DPO(beta=0.3, loss_type="exo_pair", label_smoothing=0.01)),
    ("discopop", objectives.DPO(beta=0.3, loss_type="discopop", discopop_tau=0.7)),
    ("ipo", objectives.IPO(beta=0.3)),
    ("sigmoid_norm", objectives.LNDPO(beta=0.3)),
    ("bco_pair", objectives.BCO(beta=0.3)),  # TRL's delta is 0 by now
]


@pytest.mark.parametrize("loss_type, objective", DPO_CASES, ids=lambda x: x if isinstance(x, str) else repr(x))
def test_dpo_family_equals_trl(loss_type, objective):
    scores = Scores(2 * PAIRS)  # TRL's order: all chosen, then all rejected
    smoothing, tau = getattr(objective, "label_smoothing", 0.0), getattr(objective, "discopop_tau", 0.05)
    loss, metrics = _trl_dpo(loss_type, scores, objective.beta, smoothing, tau)
    expected = torch.autograd.grad(loss, scores.tokens)

    length = _interleave(*scores.length.chunk(2))
    logprob = _interleave(*scores.tokens.sum(1).chunk(2))
    reference = _interleave(*scores.reference.chunk(2))
    ours = objective(logprob, length, reference).sum() / objective.count(length)
    # TRL keeps exo_pair's epsilon as a float32 tensor
    rtol = 1e-6 if loss_type == "exo_pair" else 1e-12
    grads = torch.autograd.grad(ours, scores.tokens)
    _assert_same(ours, [grads[0] * scores.mask], loss, [expected[0]], rtol)

    rewards = objective.rewards(logprob, length, reference)
    means = {"rewards/chosen": rewards[0::2].mean(), "rewards/rejected": rewards[1::2].mean()}
    means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    means["rewards/accuracies"] = (rewards[0::2] > rewards[1::2]).double().mean()
    for name, value in means.items():
        assert value.item() == pytest.approx(metrics[name], rel=1e-6), name


@pytest.mark.parametrize("kl_logps", [2.0, -2.0, None], ids=["kl", "negative kl", "unpaired apo"])
def test_kto_equals_trl(kl_logps):
    n = 7
    scores, objective = Scores(n, seed=1), objectives.KTO(beta=0.3, desirable_weight=1.3, undesirable_weight=0.8)
    label = torch.arange(n) % 3 != 0
    kl = None if kl_logps is None else torch.tensor([kl_logps, kl_logps + 1])
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=_accelerator(),
        precompute_ref_logps=True,
        calculate_KL=kl is not None,
        _compute_kl_logps=lambda model, batch: kl,
        loss_type="apo_zero_unpaired" if kl is None else "kto",
        beta=objective.beta,
        desirable_weight=objective.desirable_weight,
        undesirable_weight=objective.undesirable_weight,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones_like(scores.completion),
        "attention_mask": torch.ones_like(scores.completion),
        "completion_mask": scores.completion,
        "label": label,
        "ref_logps": scores.reference,
        "ref_KL_logps": torch.zeros(2),
    }
    loss = trl.KTOTrainer._compute_loss(trainer, scores.model, inputs, return_outputs=False)
    expected = torch.autograd.grad(loss, scores.tokens)

    reward = label.double() * 2 - 1
    logprob = scores.tokens.sum(1)
    mean_kl = None if kl is None else kl.mean()
    ours = objective(logprob, scores.length, scores.reference, reward=reward, kl=mean_kl).mean()
    grads = torch.autograd.grad(ours, scores.tokens, retain_graph=True)
    _assert_same(ours, [grads[0] * scores.mask], loss, expected)
    rewards = objective.rewards(logprob, scores.length, scores.reference)
    logged = trainer._metrics["train"]
    assert rewards[label].mean().item() == pytest.approx(logged["rewards/chosen"][0])
    assert rewards[~label].mean().item() == pytest.approx(logged["rewards/rejected"][0])


class Logits:
    """Padded pairs as TRL's reference-free trainers get them. Chosen replies are equally long, because TRL averages
    their likelihood over the tokens of a batch and the objectives here over those of a pair."""

    def __init__(self, prompt):
        g = torch.Generator().manual_seed(prompt)
        self.logits = torch.randn(2 * PAIRS, LENGTH, VOCAB, generator=g, dtype=torch.float64).requires_grad_()
        self.batch, labels = {}, []
        for side, shortest in (("chosen", LENGTH), ("rejected", 5)):
            end = torch.randint(shortest, LENGTH + 1, (PAIRS, 1), generator=g)
            mask = (torch.arange(LENGTH) < end).long()
            tokens = torch.randint(0, VOCAB, (PAIRS, LENGTH), generator=g)
            label = tokens.masked_fill((mask == 0) | (torch.arange(LENGTH) < prompt), -100)
            self.batch |= {f"{side}_input_ids": tokens, f"{side}_attention_mask": mask, f"{side}_labels": label}
            labels.append(label)
        self.labels = torch.cat(labels)

    def model(self, *args, **kwargs):
        return types.SimpleNamespace(logits=self.logits)

    def sums(self):
        target = self.labels[:, 1:]
        scored = target != -100
        logps = self.logits[:, :-1].log_softmax(-1).gather(2, target.clamp(min=0).unsqueeze(2)).squeeze(2)
        logprob, length = (logps * scored).sum(1), scored.sum(1)
        return _interleave(*logprob.chunk(2)), _interleave(*length.chunk(2))


def _trl_reference_free(cls, case, **fields):
    trainer = types.SimpleNamespace(
        accelerator=_accelerator(),
        is_encoder_decoder=False,
        aux_loss_enabled=False,
        pad_token_id=0,
        padding_value=0,
        concatenated_inputs=cls.concatenated_inputs,
        get_batch_logps=cls.get_batch_logps,
        **fields,
    )
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(cls, name):
            setattr(trainer, name, types.MethodType(getattr(cls, name), trainer))
    return cls.get_batch_loss_metrics(trainer, case.model, case.batch)


REFERENCE_FREE = [
    (
        objectives.SimPO(beta=2.5, gamma_beta_ratio=0.55),
        {"loss_type": "simpo", "simpo_gamma": 2.5 * 0.55, "cpo_alpha": 0.0},
    ),
    (
        objectives.SimPO(beta=2.0, gamma_beta_ratio=0.5, label_smoothing=0.1, sft_weight=0.3),
        {"loss_type": "simpo", "simpo_gamma": 1.0, "label_smoothing": 0.1, "cpo_alpha": 0.3},
    ),
    (objectives.CPO(beta=0.2), {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
    (
        objectives.CPO(beta=0.2, label_smoothing=0.1, cpo_alpha=0.0),
        {"loss_type": "sigmoid", "label_smoothing": 0.1, "cpo_alpha": 0.0},
    ),
    (objectives.CPO(beta=0.2, loss_type="hinge", cpo_alpha=0.5), {"loss_type": "hinge", "cpo_alpha": 0.5}),
    (
        objectives.AlphaPO(beta=2.5, alpha=0.25, gamma_beta_ratio=0.4, label_smoothing=0.1),
        {"loss_type": "simpo", "alpha": 0.25, "simpo_gamma": 1.0, "label_smoothing": 0.1, "cpo_alpha": 0.0},
    ),
    (
        objectives.AlphaPO(beta=2.0, alpha=-0.5, gamma_beta_ratio=0.1),
        {"loss_type": "simpo", "alpha": -0.5, "simpo_gamma": 0.2, "cpo_alpha": 0.0},
    ),
]


def _compare_reference_free(objective, case, loss, metrics, rtol):
    expected = torch.autograd.grad(loss, case.logits)
    logprob, length = case.sums()
    ours = objective(logprob, length).sum() / objective.count(length)
    _assert_same(ours, torch.autograd.grad(ours, case.logits, retain_graph=True), loss, expected, rtol)
    rewards = objective.rewards(logprob, length)
    assert rewards[0::2].mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-6)
    assert (rewards[0::2] - rewards[1::2]).mean().item() == pytest.approx(metrics["rewards/margins"], rel=1e-6)


@pytest.mark.parametrize("objective, fields", REFERENCE_FREE, ids=lambda x: x if isinstance(x, str) else "")
def test_simpo_and_cpo_equal_trl(objective, fields):
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    case = Logits(prompt=3)
    fields = {"alpha": 0.0, "label_smoothing": 0.0, "beta": objective.beta} | fields
    loss, metrics = _trl_reference_free(trainer, case, **fields)
    _compare_reference_free(objective, case, loss, metrics, rtol=1e-10)


def test_orpo_equals_trl():
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    # TRL's likelihood term covers the prompt too: with a prompt of one token, which nothing predicts, both agree.
    objective, case = objectives.ORPO(beta=0.4), Logits(prompt=1)
    loss, metrics = _trl_reference_free(trainer, case, beta=objective.beta)
    _compare_reference_free(objective, case, loss, metrics, rtol=1e-5)  # TRL computes the odds in float32


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
def test_tpo_equals_trl(loss_type):
    trainer_class = pytest.importorskip("trl.experimental.tpo").TPOTrainer
    smoothing = 0.1 if loss_type in ("sigmoid", "tpo-l") else 0.0
    objective = objectives.TPO(0.3, loss_type, smoothing, tpo_alpha=0.7, tpo_l_gamma=0.2)
    g = torch.Generator().manual_seed(2)
    n, prompt = 3 * PAIRS, 3  # TRL's order: all chosen, all rejected, all gold
    logits = torch.randn(n, LENGTH, VOCAB, generator=g, dtype=torch.float64).requires_grad_()
    ids = torch.randint(0, VOCAB, (n, LENGTH), generator=g)
    end = torch.randint(5, LENGTH + 1, (n, 1), generator=g)
    end[2 * PAIRS :] = LENGTH  # TRL averages over the gold tokens of the batch
    attention = (torch.arange(LENGTH) < end).long()
    completion = attention * (torch.arange(LENGTH) >= prompt)
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=_accelerator(), _tp_size=1, _total_train_tokens=0,
        _metrics={"train": defaultdict(list)}, loss_type=loss_type, beta=objective.beta, label_smoothing=smoothing,
        tpo_alpha=objective.tpo_alpha, tpo_l_gamma=objective.tpo_l_gamma,
    )  # fmt: skip
    inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
    model = lambda **kwargs: types.SimpleNamespace(logits=logits)  # noqa: E731
    loss = trainer_class._compute_loss(trainer, model, inputs, return_outputs=False)
    expected = torch.autograd.grad(loss, logits)

    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2) * completion[:, 1:]
    logprob, length = (torch.stack(x.chunk(3), 1).flatten() for x in (logps.sum(1), completion[:, 1:].sum(1)))
    ours = objective(logprob, length).sum() / objective.count(length)
    _assert_same(ours, torch.autograd.grad(ours, logits, retain_graph=True), loss, expected, rtol=1e-6)
    rewards = objective.rewards(logprob, length)
    assert rewards[0::3].mean().item() == pytest.approx(trainer._metrics["train"]["rewards/chosen"][0], rel=1e-6)


@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, 0.0, 1.0, 2.0], dtype=torch.float64)])
def test_bradley_terry_equals_trl(margin):
    reward = torch.randn(8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=_accelerator(), _tp_size=1, _total_train_tokens=0,
        _metrics={"train": defaultdict(list)}, args=types.SimpleNamespace(center_rewards_coefficient=0.01),
    )  # fmt: skip
    inputs = {"attention_mask": torch.ones(8, 2)} | ({} if margin is None else {"margin": margin})
    model = lambda **kwargs: types.SimpleNamespace(logits=reward)  # noqa: E731
    loss = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    expected = torch.autograd.grad(loss, reward)
    ours = objectives.BradleyTerry(0.01)(_interleave(*reward[:, 0].chunk(2)), 0.0 if margin is None else margin).mean()
    _assert_same(ours, torch.autograd.grad(ours, reward), loss, expected)
