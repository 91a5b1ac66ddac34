# SPDX-License-Identifier: Apache-2.0
"""Objectives that need no reference."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn.functional import logsigmoid

from .base import Objective, Sequences, choice, log1mexp, number, smoothed


@dataclasses.dataclass(frozen=True)
class SFT(Objective):
    """Cross-entropy: losses[s] = -lp[s]; the loss is the mean over scored tokens, not over sequences.

    Its implied reward, for want of one, is lp.
    """

    paired = False
    unit = "token"

    def _losses(self, s, kl):
        return -s.logprob

    def _rewards(self, s):
        return s.logprob


@dataclasses.dataclass(frozen=True)
class SimPO(Objective):
    """Simple preference optimization, no reference: z = beta (mean_c - mean_r - gamma_beta_ratio).

        sigmoid    -(1 - e) log s(z) - e log s(-z)         e = label_smoothing
        hinge      max(0, 1 - z)

    gamma_beta_ratio is gamma / beta as in the authors' code; TRL's simpo_gamma and LLaMA-Factory's gamma are absolute
    (divide by beta). sft_weight adds sft_weight * (-mean_c): per pair here, over all chosen tokens of a batch in the
    authors' code. Defaults are the code's (2.0, 0.25); the released models use beta 2 to 10 and ratios 0.1 to 0.8.
    Reward: beta mean. Source: Meng et al. 2024 and princeton-nlp/SimPO.
    """

    beta: float = number(2.0, above=0)
    gamma_beta_ratio: float = number(0.25)
    loss_type: str = choice("sigmoid", "hinge")
    label_smoothing: float = number(0.0, least=0, below=0.5)
    sft_weight: float = number(0.0, least=0)

    def __post_init__(self):
        super().__post_init__()
        self._check_smoothing(used=self.loss_type == "sigmoid")

    def _losses(self, chosen, rejected):
        z = self.beta * (chosen.mean - rejected.mean - self.gamma_beta_ratio)
        losses = torch.relu(1 - z) if self.loss_type == "hinge" else smoothed(z, self.label_smoothing)
        return losses - self.sft_weight * chosen.mean if self.sft_weight else losses

    def _rewards(self, s):
        return self.beta * s.mean


@dataclasses.dataclass(frozen=True)
class CPO(Objective):
    """Contrastive preference optimization, no reference: z = beta (lp_c - lp_r), plus cpo_alpha * (-mean_c).

    loss_type "sigmoid" (with label_smoothing e as in SimPO) or "hinge"; summed log-probs in z. TRL averages the second
    term over all chosen tokens of a batch, here each pair counts alike. Defaults are TRL's. Reward: beta lp.
    Source: Xu et al. 2024 and TRL's CPOTrainer. TRL's loss_type "simpo" is SimPO.
    """

    beta: float = number(0.1, above=0)
    loss_type: str = choice("sigmoid", "hinge")
    label_smoothing: float = number(0.0, least=0, below=0.5)
    cpo_alpha: float = number(1.0, least=0)

    def __post_init__(self):
        super().__post_init__()
        self._check_smoothing(used=self.loss_type == "sigmoid")

    def _losses(self, chosen, rejected):
        z = self.beta * (chosen.logprob - rejected.logprob)
        losses = torch.relu(1 - z) if self.loss_type == "hinge" else smoothed(z, self.label_smoothing)
        return losses - self.cpo_alpha * chosen.mean if self.cpo_alpha else losses

    def _rewards(self, s):
        return self.beta * s.logprob


@dataclasses.dataclass(frozen=True)
class ORPO(Objective):
    """Odds-ratio preference optimization, no reference: -mean_c - beta log s(o), o = logit(p_c) - logit(p_r).

    p = e^mean, so logit(p) = mean - log(1 - e^mean). Means above -1e-6 (p is 1 up to float32 rounding, the odds are
    infinite) count as -1e-6 in value and derivative. beta is the paper's lambda. The first term covers the scored
    tokens; TRL's covers the prompt too. Reward: beta mean. Source: Hong et al. 2024, TRL's ORPOTrainer, LLaMA-Factory.
    """

    beta: float = number(0.1, above=0)

    def _losses(self, chosen, rejected):
        odds = self._log_odds(chosen.mean) - self._log_odds(rejected.mean)
        return -chosen.mean - self.beta * logsigmoid(odds)

    @staticmethod
    def _log_odds(mean: torch.Tensor) -> torch.Tensor:
        # Subtracting a detached excess clamps the value but lets the gradient at the bound through: with a gradient of
        # 0 a rejected sequence of probability 1 would never be pushed down.
        mean = mean - (mean + 1e-6).clamp(min=0).detach()
        return mean - log1mexp(mean)

    def _rewards(self, s):
        return self.beta * s.mean


@dataclasses.dataclass(frozen=True)
class AlphaPO(Objective):
    """SimPO with a bent reward: z = beta (r_c - r_r - gamma_beta_ratio), r = (1 - p^-alpha) / alpha, p = e^mean.

    alpha -> 0 gives r = mean, which is SimPO; above 0 improbable replies weigh more. p^-alpha is followed up to e^40 in
    value and derivative, which is 160 nats per token at alpha 0.25. gamma_beta_ratio and label_smoothing are as in
    SimPO; TRL's simpo_gamma is gamma_beta_ratio beta. TRL spells this CPO with loss_type
    "alphapo". beta and gamma_beta_ratio default to SimPO's, alpha 0 to 1 is usual. Reward: beta r.
    Source: Gupta et al. 2025, TRL's CPOTrainer.
    """

    beta: float = number(2.0, above=0)
    alpha: float = number(0.25)
    gamma_beta_ratio: float = number(0.25)
    label_smoothing: float = number(0.0, least=0, below=0.5)

    def _losses(self, chosen, rejected):
        z = self.beta * (self._bent(chosen.mean) - self._bent(rejected.mean) - self.gamma_beta_ratio)
        return smoothed(z, self.label_smoothing)

    def _bent(self, mean):
        if self.alpha == 0:
            return mean
        x = -self.alpha * mean
        x = x - (x - 40).clamp(min=0).detach()  # detached as in ORPO: a bound, not a dead end
        return -torch.expm1(x) / self.alpha

    def _rewards(self, s):
        return self.beta * self._bent(s.mean)


@dataclasses.dataclass(frozen=True)
class TPO(Objective):
    """Triple preference optimization: a preference loss on (chosen, rejected), and NLL on a gold reply, no reference.

        sigmoid    -(1 - e) log s(z) - e log s(-z)         z = beta (lp_c - lp_r), e = label_smoothing
        hinge      max(0, 1 - z)
        ipo        (mean_c - mean_r - 1 / 2 beta)^2
        tpo-l      as sigmoid, z = beta (mean_c - mean_r) - tpo_l_gamma

    plus tpo_alpha * (-mean_gold). Sequences come in threes: 3i chosen, 3i + 1 rejected, 3i + 2 gold. TRL averages the
    second term over all gold tokens of a batch, here each triple counts alike. Evaluated in plain torch: the compiled
    core and the training recipes know pairs only. Defaults are TRL's. Reward: beta lp, or beta mean for ipo and tpo-l.
    Source: Saeidi et al. 2024 and TRL's TPOTrainer.
    """

    beta: float = number(0.01, above=0)
    loss_type: str = choice("sigmoid", "hinge", "ipo", "tpo-l")
    label_smoothing: float = number(0.0, least=0, below=0.5)
    tpo_alpha: float = number(1.0, least=0)
    tpo_l_gamma: float = number(0.5)
    paired = False
    unit = "triple"

    def __post_init__(self):
        super().__post_init__()
        self._check_smoothing(used=self.loss_type in ("sigmoid", "tpo-l"))

    def _losses(self, s, kl):
        if s.logprob.shape[0] % 3:
            raise ValueError(
                "[TPO] logprob: expected a number of sequences that 3 divides (chosen, rejected, gold, chosen, ...), "
                f"got {s.logprob.shape[0]}. Pass whole triples."
            )
        chosen, rejected, gold = (Sequences(s.logprob[i::3], s.length[i::3]) for i in range(3))
        z = self._rewards(chosen) - self._rewards(rejected)
        match self.loss_type:
            case "hinge":
                losses = torch.relu(1 - z)
            case "ipo":
                losses = ((z - 0.5) / self.beta) ** 2
            case "tpo-l":
                losses = smoothed(z - self.tpo_l_gamma, self.label_smoothing)
            case _:
                losses = smoothed(z, self.label_smoothing)
        return losses - self.tpo_alpha * gold.mean if self.tpo_alpha else losses

    def _rewards(self, s):
        return self.beta * (s.mean if self.loss_type in ("ipo", "tpo-l") else s.logprob)
