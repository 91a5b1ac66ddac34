# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient objectives on token log-probs, and the advantages that they weigh tokens with."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .base import Hyperparameters, choice, number

# Position = the number that the compiled core knows them by (cpp/policy_objectives.h).
POLICY_KINDS = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")
LEVELS = ("token", "sequence", "trajectory")


@dataclasses.dataclass(frozen=True)
class GRPO(Hyperparameters):
    """Group relative policy optimization and its relatives, for fastpost.policy_loss.

    Each scored token has an advantage A and a probability ratio r to the policy that wrote it. Its loss is

        -min(r A, clamp(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta k3         all but cispo
        -stop_gradient(min(r, epsilon_high)) A lp + beta k3                        cispo

    with k3 = e^d - 1 - d, d = reference lp - lp. delta, above 1 + epsilon_high, caps r in the first term, which bounds
    the loss where A < 0 (two-sided clipping). log r is lp - old lp of the token (level "token"), its mean over the
    sequence ("sequence": GSPO) or its sum ("trajectory": the ratio of whole replies).

        loss_type    tokens of a sequence are          the loss divides by
        grpo         averaged                          sequences
        dr_grpo      summed / max_completion_length    sequences
        dapo         summed                            scored tokens
        bnpo         summed                            scored tokens
        cispo        summed                            scored tokens

    The divisors are those of the call; num_items of policy_loss replaces them by those of a whole step. TRL always does
    that for dapo and cispo and never for bnpo, which is all that sets dapo and bnpo apart. TRL's RLOOTrainer is
    GRPO("grpo", level="trajectory") with leave_one_out_advantage; without old log-probs all of them are REINFORCE.

    Defaults are TRL's: epsilon_high None equals epsilon_low. For cispo it caps the ratio itself and must be given (5 in
    ScaleRL). Sources: TRL 1.16 GRPOTrainer; Shao et al. 2024 (grpo), Liu et al. 2025 (dr_grpo), Yu et al. 2025 (dapo,
    asymmetric clip), Zheng et al. 2025 (GSPO), MiniMax 2025 (cispo), Prime Intellect 2025 (delta), Schulman 2020 (k3).
    """

    loss_type: str = choice("dapo", "grpo", "dr_grpo", "bnpo", "cispo")
    epsilon_low: float = number(0.2, least=0, most=1)
    epsilon_high: float | None = number(None, least=0)
    delta: float | None = number(None, above=0)
    beta: float = number(0.0, least=0)
    level: str = choice("token", "sequence", "trajectory")
    max_completion_length: float | None = number(None, least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.loss_type == "cispo":
            if self.epsilon_high is None or self.epsilon_high < 1:
                raise ValueError(
                    "[GRPO] epsilon_high: expected a number of at least 1 with loss_type 'cispo', where it caps the "
                    f"ratio itself, got {self.epsilon_high}. ScaleRL uses 5."
                )
            if self.delta is not None:
                raise ValueError(
                    f"[GRPO] delta: expected None with loss_type 'cispo', got {self.delta:g}. Leave it out."
                )
        elif self.epsilon_high is None:
            object.__setattr__(self, "epsilon_high", self.epsilon_low)
        if (self.loss_type == "dr_grpo") != (self.max_completion_length is not None):
            expected = "the limit of the rollouts in tokens" if self.loss_type == "dr_grpo" else "None"
            raise ValueError(
                f"[GRPO] max_completion_length: expected {expected} with loss_type {self.loss_type!r}, got "
                f"{self.max_completion_length}. It divides the loss of dr_grpo only."
            )
        params = self.epsilon_low, self.epsilon_high, self.delta or 0.0, self.beta, self.max_completion_length or 1.0
        core = POLICY_KINDS.index(self.loss_type), LEVELS.index(self.level), params
        object.__setattr__(self, "_core", core if type(self) is GRPO else None)

    def core(self) -> tuple[int, int, tuple[float, ...]] | None:
        """(kind, level, parameters) for the compiled core; None for a subclass, which runs as plain torch."""
        return self._core

    def __call__(
        self,
        logprob: Tensor,
        sequence: Tensor,
        length: Tensor,
        advantage: Tensor,
        old_logprob: Tensor | None = None,
        reference_logprob: Tensor | None = None,
    ) -> Tensor:
        """Losses [S] in plain torch, any float dtype, differentiable in logprob. The loss is their sum / count(length).

        For the N scored tokens alone: logprob [N], sequence [N] int64 (of each token), length [S] (scored tokens),
        advantage [N], old_logprob [N] (None: logprob itself), reference_logprob [N] (with beta).
        """
        ratio = self.ratio(logprob, sequence, length, old_logprob)
        if self.loss_type == "cispo":
            losses = -ratio.clamp(max=self.epsilon_high).detach() * advantage * logprob
        else:
            clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
            free = ratio if self.delta is None else ratio.clamp(max=self.delta)
            losses = -torch.minimum(free * advantage, clipped * advantage)
        if self.beta:
            if reference_logprob is None:
                raise ValueError("[GRPO] reference_logprob: expected log-probs of tokens, got None: beta is not 0.")
            losses = losses + self.beta * self.kl(logprob, reference_logprob)
        losses = logprob.new_zeros(length.shape[0]).index_add(0, sequence, losses)
        if self.loss_type == "grpo":
            return losses / length.clamp(min=1)
        return losses / self.max_completion_length if self.loss_type == "dr_grpo" else losses

    def ratio(self, logprob: Tensor, sequence: Tensor, length: Tensor, old_logprob: Tensor | None) -> Tensor:
        """The probability ratio [N] of each scored token, or of its sequence, as `level` says."""
        log_ratio = logprob - (logprob.detach() if old_logprob is None else old_logprob)
        if self.level == "token":
            return log_ratio.exp()
        sums = logprob.new_zeros(length.shape[0]).index_add(0, sequence, log_ratio)
        return (sums / length.clamp(min=1) if self.level == "sequence" else sums).exp()[sequence]

    @staticmethod
    def kl(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
        """The estimate k3 of KL(policy || reference) of each token: never negative, unbiased on the policy's tokens."""
        d = reference_logprob - logprob
        return torch.expm1(d) - d

    def count(self, length: Tensor) -> int | Tensor:
        """What to divide losses.sum() by: sequences, or scored tokens (then a 0-d tensor)."""
        return length.shape[0] if self.loss_type in ("grpo", "dr_grpo") else length.sum()


def group_advantage(reward: Tensor, group_size: int, *, scale: str = "group", correction: int = 1) -> Tensor:
    """Advantages [S] of GRPO: (reward - mean of its group) / (std + 1e-4).

    reward [S], float, groups of `group_size` replies to one prompt one after the other. scale: what std is of, "group",
    "batch" or "none" (no division: Dr. GRPO). correction: 1 for the sample std (TRL), 0 for the population's. A reward
    of NaN means that the reply could not be judged: it gets advantage 0 and the others are as if it were not there.
    Groups of equal rewards get exactly 0, whatever rounding does to their mean. Raises ValueError when groups are not
    whole. Source: Shao et al. 2024; TRL 1.16 GRPOTrainer.
    """
    shifted, known = _groups("group_advantage", reward, group_size)
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"[group_advantage] scale: expected 'group', 'batch' or 'none', got {scale!r}.")
    advantage = _minus_mean(shifted, known)
    if scale != "none":
        values, mask = (advantage, known) if scale == "group" else (reward.view(1, -1), known.view(1, -1))
        deviation = _minus_mean(torch.where(mask, values, 0), mask)
        n = mask.sum(1, keepdim=True)
        std = (deviation.square().sum(1, keepdim=True) / (n - correction).clamp(min=1)).sqrt()
        advantage = advantage / (std + 1e-4)
    return advantage.view(-1)


def leave_one_out_advantage(reward: Tensor, group_size: int) -> Tensor:
    """Advantages [S] of RLOO: reward - mean of the other rewards of its group.

    Arguments, NaN, exact zeros and errors as in group_advantage; alone in its group a reply gets 0. Source: Ahmadian et
    al. 2024; TRL 1.16 RLOOTrainer.
    """
    shifted, known = _groups("leave_one_out_advantage", reward, group_size)
    n = known.sum(1, keepdim=True)
    return (_minus_mean(shifted, known) * (n / (n - 1).clamp(min=1))).view(-1)


def _groups(name: str, reward: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Rewards [G, group_size] less the largest of their group, 0 where unknown, and which are known."""
    if reward.ndim != 1 or group_size < 1 or reward.shape[0] % group_size:
        raise ValueError(
            f"[{name}] reward: expected one number per reply, whole groups of {group_size}, got shape "
            f"{list(reward.shape)}. Pass the replies to a prompt one after the other."
        )
    reward = reward.view(-1, group_size)
    known = ~reward.isnan()
    largest = torch.where(known, reward, -torch.inf).amax(1, keepdim=True)
    return torch.where(known, reward - largest, 0), known


def _minus_mean(values: Tensor, known: Tensor) -> Tensor:
    mean = values.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    return torch.where(known, values - mean, 0)
