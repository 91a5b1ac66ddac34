# SPDX-License-Identifier: Apache-2.0
"""Objectives that know the policy that wrote the replies: one step of an iterated method."""

from __future__ import annotations

import dataclasses

from .base import Objective, number


@dataclasses.dataclass(frozen=True)
class INPO(Objective):
    """Iterative Nash policy optimization: (h - 1 / 2 eta)^2 on summed log-probs, with d = c - r,

        h = d lp - ratio * d reference - (1 - ratio) * d previous        ratio = tau / eta in (0, 1]

    ratio = 1 is IPO with normalization "sum" and beta = eta. Defaults are the released code's (target 1 / 2 eta =
    66.67). Reward: eta (lp - reference). Source: Zhang et al. 2024 and derivatives of the authors' code.
    """

    eta: float = number(0.0075, above=0)
    ratio: float = number(1 / 3, above=0, most=1)
    needs_reference = True
    needs_previous = True

    def _losses(self, chosen, rejected):
        policy, reference, previous = (
            getattr(chosen, name) - getattr(rejected, name) for name in ("logprob", "reference", "previous")
        )
        h = policy - self.ratio * reference - (1 - self.ratio) * previous
        return (h - 1 / (2 * self.eta)) ** 2

    def _rewards(self, s):
        return self.eta * s.ratio

    def initial_loss(self):
        return self._loss_at_reference()


@dataclasses.dataclass(frozen=True)
class REBEL(Objective):
    """Regression to relative rewards: (A - eta (reward_c - reward_r))^2, A = (lp - previous)_c - (lp - previous)_r.

    Summed log-probs; previous is the policy that wrote the replies, both at the sampling temperature (pass
    temperature= to preference_loss). The paper scales A by 1 / eta, the code the rewards by eta: this is the code's
    form, which is eta^2 times the paper's. eta is 1 in the TL;DR script and 1e4 to 1e6 for UltraFeedback.
    Reward: (lp - previous) / eta. Source: Gao et al. 2024 and ZhaolinGao/REBEL.
    """

    eta: float = number(1.0, above=0)
    needs_previous = True
    needs_reward = True

    def _losses(self, chosen, rejected):
        a = (chosen.logprob - chosen.previous) - (rejected.logprob - rejected.previous)
        return (a - self.eta * (chosen.reward - rejected.reward)) ** 2

    def _rewards(self, s):
        return (s.logprob - s.previous) / self.eta


@dataclasses.dataclass(frozen=True)
class REFUEL(REBEL):
    """REBEL on one turn of a dialogue: score only the tokens of the re-sampled assistant turn (all else -100).

    The rewards are those of the dialogue up to its cut, so their difference estimates the difference in reward to go.
    eta 1e3 is the default of the authors' first setting. Source: Gao et al. 2024 (REFUEL) and ZhaolinGao/REFUEL.
    """

    eta: float = number(1e3, above=0)
