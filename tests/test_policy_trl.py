# SPDX-License-Identifier: Apache-2.0
"""policy_loss against the loss code of TRL's GRPOTrainer and RLOOTrainer, in float64.

As in test_objectives_trl.py, their methods run unbound on small stand-ins.
"""

import itertools
import types
from collections import defaultdict

import pytest
import torch

from fastpost.objectives import GRPO, group_advantage, leave_one_out_advantage
from fastpost.ops.policy_loss import policy_loss_from_logprob

trl = pytest.importorskip("trl", minversion="1.16", reason="compared with TRL where it is installed")
B, LENGTH, GROUP = 8, 11, 4
F64 = torch.float64


class Replies:
    """Random token log-probs of B right-padded replies, and the same packed one after the other."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        draw = lambda scale: scale * torch.randn(B, LENGTH, generator=g, dtype=F64)  # noqa: E731
        self.mask = (torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (B, 1), generator=g)).long()
        self.logprob = (-draw(2.0).abs()).requires_grad_()
        self.old, self.reference = self.logprob.detach() + draw(0.4), self.logprob.detach() + draw(0.5)
        self.reward = torch.randint(0, 3, (B,), generator=g).to(F64)
        self.reward[:GROUP] = 1.0  # a group that teaches nothing

    def pack(self, x):
        return x[self.mask.bool()]

    def loss(self, objective, advantage, **columns):
        length = self.mask.sum(1)
        cu_seqlens = torch.cat([length.new_zeros(1), length.cumsum(0)]).int()
        target = torch.zeros(int(length.sum()), dtype=torch.int64)
        return policy_loss_from_logprob(
            self.pack(self.logprob), target, cu_seqlens, objective, advantage=advantage, **columns
        )


def _accelerator():
    same = lambda x, **_: x  # noqa: E731
    return types.SimpleNamespace(device=torch.device("cpu"), gather=same, reduce=same, num_processes=1)


def _trainer(replies, **fields):
    def logps(*args, **kwargs):
        return replies.logprob, torch.zeros_like(replies.logprob), None

    return types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=_accelerator(), aux_loss_enabled=False,
        _get_per_token_logps_and_entropies=logps, _metrics={"train": defaultdict(list)}, **fields,
    )  # fmt: skip


def _inputs(replies, advantage):
    prompt = torch.zeros(B, 2, dtype=torch.int64)
    completion = torch.zeros(B, LENGTH, dtype=torch.int64)
    return {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": completion, "completion_mask": replies.mask,
            "advantages": advantage}  # fmt: skip


def _same(ours, theirs, leaf):
    grads = [torch.autograd.grad(loss, leaf)[0] for loss in (theirs, ours)]
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-11, atol=1e-14)


KINDS = {"grpo": {}, "dr_grpo": {"max_completion_length": 16}, "dapo": {"epsilon_high": 0.28}, "bnpo": {"delta": 1.4},
         "cispo": {"epsilon_high": 1.5}}  # fmt: skip


@pytest.mark.parametrize("per_token", [False, True], ids=["per sequence", "per token"])
@pytest.mark.parametrize("on_policy", [False, True], ids=["off policy", "on policy"])
@pytest.mark.parametrize("kind, level, beta", itertools.product(KINDS, ["token", "sequence"], [0.0, 0.04]))
def test_grpo_family_equals_trl(kind, level, beta, on_policy, per_token):
    replies = Replies()
    objective = GRPO(kind, level=level, beta=beta, **KINDS[kind])
    advantage = group_advantage(replies.reward, GROUP)
    if per_token:
        advantage = advantage[:, None] * torch.linspace(1, 2, LENGTH, dtype=F64)
    args = types.SimpleNamespace(delta=objective.delta, use_bias_correction_kl=False, steps_per_generation=1)
    trainer = _trainer(
        replies, args=args, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level,
        beta=beta, loss_type=kind, epsilon_low=objective.epsilon_low, epsilon_high=objective.epsilon_high,
        use_vllm=False, current_gradient_accumulation_steps=1, max_completion_length=objective.max_completion_length,
        _entropy_bonus_enabled=False,
    )  # fmt: skip
    items = replies.mask.sum() if kind not in ("dapo", "cispo") else torch.tensor(100.0, dtype=F64)
    inputs = _inputs(replies, advantage) | {"num_items_in_batch": items, "ref_per_token_logps": replies.reference}
    columns = {"reference_logprob": replies.pack(replies.reference)} if beta else {}
    if not on_policy:
        inputs["old_per_token_logps"], columns["old_logprob"] = replies.old, replies.pack(replies.old)
    if kind in ("dapo", "cispo"):
        columns["num_items"] = items
    theirs = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    ours = replies.loss(objective, replies.pack(advantage) if per_token else advantage, **columns)
    _same(ours.loss, theirs, replies.logprob)

    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    if beta:
        assert ours.kl.item() == pytest.approx(logged["kl"], rel=1e-6)
    if not (per_token and level == "sequence"):  # there TRL counts tokens
        low, high = logged.get("clip_ratio/low_mean", 0.0), logged.get("clip_ratio/high_mean")
        assert ours.clip_low.item() == pytest.approx(low, rel=1e-6)
        assert ours.clip_high.item() == pytest.approx(
            logged.get("cispo_clip_ratio") if high is None else high, rel=1e-6
        )
        assert on_policy or level == "sequence" or ours.clip_high > 0


def test_rloo_equals_trl():
    replies = Replies(seed=3)
    objective = GRPO("grpo", level="trajectory", epsilon_high=0.3)
    advantage = leave_one_out_advantage(replies.reward, GROUP)
    trainer = _trainer(replies, epsilon_low=0.2, epsilon_high=0.3)
    inputs = _inputs(replies, advantage) | {"old_logps": (replies.old * replies.mask).sum(1)}
    theirs = trl.RLOOTrainer._compute_loss(trainer, None, inputs)
    ours = replies.loss(objective, advantage, old_logprob=replies.pack(replies.old))
    _same(ours.loss, theirs, replies.logprob)
    assert ours.clip_high.item() == pytest.approx(trainer._metrics["train"]["clip_ratio/high_mean"][0], rel=1e-6)
