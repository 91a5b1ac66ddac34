# SPDX-License-Identifier: Apache-2.0
"""Objectives that compare the policy with a reference."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn.functional import logsigmoid

from .base import DPO_LOSS_TYPES, Objective, choice, number, smoothed


@dataclasses.dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimization, with TRL's loss types; summed log-probs, z = beta (ratio_c - ratio_r).

        sigmoid    -(1 - e) log s(z) - e log s(-z)        e = label_smoothing; e > 0 is conservative DPO (cDPO)
        hinge      max(0, 1 - z)                           SLiC
        robust     (-(1 - e) log s(z) + e log s(-z)) / (1 - 2e)
        exo_pair   KL( (s(z), s(-z)) || (1 - e, e) )       EXO; e = 1e-3 in the paper, must not be 0
        nca_pair   -log s(x) - log s(-x) / 2 - log s(-y) / 2         x = beta ratio_c, y = beta ratio_r
        bco_pair   -log s(x) - log s(-y)                   without BCO's running reward shift
        sppo_hard  (ratio_c - 1 / 2 beta)^2 + (ratio_r + 1 / 2 beta)^2
        apo_zero   s(-x) + s(y)
        apo_down   s(x) + s(-z)
        discopop   -log s(z) (1 - m) + exp(-z) m           m = s(z / discopop_tau)

    sft_weight adds sft_weight * (-mean_c), the length-averaged negative log-likelihood of the chosen reply (SPaR uses
    0.1; LLaMA-Factory calls it pref_ftx). label_smoothing is 0 by default as in TRL; Online-RLHF trains with 0.1. TRL
    ignores label_smoothing for `sigmoid`; here it counts, as in the cDPO note. Reward: beta ratio.
    For TRL's loss types "ipo" and "sigmoid_norm" see IPO and LNDPO.

    Sources: TRL 1.16 DPOTrainer and the papers named there; Rafailov et al. 2023; Mitchell 2023 (cDPO).
    """

    beta: float = number(0.1, above=0)
    loss_type: str = choice(*DPO_LOSS_TYPES)
    label_smoothing: float = number(0.0, least=0, below=0.5)
    discopop_tau: float = number(0.05, above=0, most=1)  # above 1 the loss grows exponentially in -z
    sft_weight: float = number(0.0, least=0)
    needs_reference = True

    def __post_init__(self):
        super().__post_init__()
        self._check_smoothing(used=self.loss_type in ("sigmoid", "robust", "exo_pair"))
        if self.loss_type == "exo_pair" and self.label_smoothing == 0:
            raise ValueError(
                "[DPO] label_smoothing: expected a number above 0 with loss_type 'exo_pair' (the loss is infinite at "
                "0), got 0. The EXO paper uses 1e-3."
            )

    def _losses(self, chosen, rejected):
        losses = self._preference(self.beta * chosen.ratio, self.beta * rejected.ratio)
        return losses - self.sft_weight * chosen.mean if self.sft_weight else losses

    def _preference(self, x, y):
        z, e = x - y, self.label_smoothing
        match self.loss_type:
            case "hinge":
                return torch.relu(1 - z)
            case "robust":
                return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)
            case "exo_pair":
                chosen = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-e))
                return chosen + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(e))
            case "nca_pair":
                return -logsigmoid(x) - logsigmoid(-x) / 2 - logsigmoid(-y) / 2
            case "bco_pair":
                return -logsigmoid(x) - logsigmoid(-y)
            case "sppo_hard":
                return ((x - 0.5) / self.beta) ** 2 + ((y + 0.5) / self.beta) ** 2
            case "apo_zero":
                return torch.sigmoid(-x) + torch.sigmoid(y)
            case "apo_down":
                return torch.sigmoid(x) + torch.sigmoid(-z)
            case "discopop":  # exp(-z) m in one exponential: at z = -1e4 the factors are inf and 0
                exponential = torch.exp(-z + logsigmoid(z / self.discopop_tau))
                return -logsigmoid(z) * torch.sigmoid(-z / self.discopop_tau) + exponential
            case _:
                return smoothed(z, e)

    def initial_loss(self):
        return None if self.sft_weight else self._loss_at_reference()


@dataclasses.dataclass(frozen=True)
class IPO(Objective):
    """Identity preference optimization: (h - 1 / 2 beta)^2; beta is the paper's tau.

    normalization "mean": h = ratio_c / length_c - ratio_r / length_r (TRL; the IPO authors confirmed it to them).
    normalization "sum":  h = ratio_c - ratio_r (OpenRLHF; the formula as printed). Fitting betas differ by a factor of
    about the length. Reward: beta ratio, unnormalised in both as in TRL. Source: Azar et al. 2023, eq. 17.
    """

    beta: float = number(0.1, above=0)
    normalization: str = choice("mean", "sum")
    needs_reference = True

    def _losses(self, chosen, rejected):
        if self.normalization == "mean":
            h = chosen.mean_ratio - rejected.mean_ratio
        else:
            h = chosen.ratio - rejected.ratio
        return (h - 1 / (2 * self.beta)) ** 2

    def initial_loss(self):
        return self._loss_at_reference()


@dataclasses.dataclass(frozen=True)
class KTO(Objective):
    """Kahneman-Tversky optimization on single sequences: w (1 - s(+-beta (ratio - kl))).

    `reward` > 0 marks a desirable sequence (sign +, w = desirable_weight), anything else an undesirable one. `kl` is a
    number or a one-element tensor, an estimate of the policy's divergence from mismatched replies; it gets no gradient
    and counts as 0 when negative. Without it this is TRL's loss type "apo_zero_unpaired".
    The loss is the mean over sequences. Reward: beta ratio. Source: Ethayarajh et al. 2024, eq. 7; TRL's KTOTrainer.
    """

    beta: float = number(0.1, above=0)
    desirable_weight: float = number(1.0, least=0)
    undesirable_weight: float = number(1.0, least=0)
    paired = False
    needs_reference = True
    needs_reward = True
    reward_is = "rewards (for KTO, > 0 means desirable)"
    unit = "sequence"

    def _losses(self, s, kl):
        if kl is None:
            kl = 0.0
        kl = max(kl, 0.0) if isinstance(kl, (int, float)) else kl.detach().clamp(min=0)
        desirable = s.reward > 0
        z = self.beta * (s.ratio - kl)
        return torch.where(
            desirable, self.desirable_weight * torch.sigmoid(-z), self.undesirable_weight * torch.sigmoid(z)
        )

    def initial_loss(self):
        return self.desirable_weight / 2 if self.desirable_weight == self.undesirable_weight else None


@dataclasses.dataclass(frozen=True)
class LNDPO(Objective):
    """Length-normalised DPO: -log s(beta (ratio_c / length_c - ratio_r / length_r)).

    TRL's DPO loss type "sigmoid_norm". The default beta 10 is FuseChat-3.0's for Llama. Reward: beta ratio, not divided
    by the length, as TRL logs it. Source: Meng et al. 2024 (as a baseline), FuseChat-3.0.
    """

    beta: float = number(10.0, above=0)
    needs_reference = True

    def _losses(self, chosen, rejected):
        return -logsigmoid(self.beta * (chosen.mean_ratio - rejected.mean_ratio))

    def initial_loss(self):
        return self._loss_at_reference()


@dataclasses.dataclass(frozen=True)
class BCO(Objective):
    """Binary classifier optimization on pairs: -log s(beta ratio_c - delta) - log s(delta - beta ratio_r).

    delta is the reward that a reply must pass to count as good: the running mean of all implied rewards, which the
    caller keeps (`out.rewards.mean()` of each step) and passes as `kl`, a number or a one-element tensor without
    gradient. None counts as 0: then this is DPO(loss_type="bco_pair"). TRL's trainers updated the mean with a batch
    before they used it; from preference_loss the rewards of a batch come with its loss, so delta lags one step.
    Reward: beta ratio. Source: Jung et al. 2024; the loss type bco_pair of earlier versions of TRL's DPOTrainer.
    """

    beta: float = number(0.1, above=0)
    needs_reference = True
    takes_kl = True

    def _losses(self, chosen, rejected, kl):
        delta = 0.0 if kl is None else kl.detach() if isinstance(kl, torch.Tensor) else kl
        return -logsigmoid(self.beta * chosen.ratio - delta) - logsigmoid(delta - self.beta * rejected.ratio)

    def initial_loss(self):
        return self._loss_at_reference()


@dataclasses.dataclass(frozen=True)
class XPO(Objective):
    """Exploratory preference optimization: DPO on pairs written on the way, plus alpha times an optimism term.

        sigmoid    -log s(beta (ratio_c - ratio_r)) + alpha lp~
        ipo        (ratio_c - ratio_r - 1 / 2 beta)^2 + alpha lp~

    One reply of each pair was sampled from the policy, the other from the reference. lp~ is the log-prob sum of the
    latter, whichever of the two won: `reward` > 0 marks it. (With marks on both or none, lp~ is the sum over marks.)
    Lowering it moves probability to what the reference does not say. Defaults are TRL's. Reward: beta ratio.
    Source: Xie et al. 2024, algorithm 1; TRL's XPOTrainer (no longer in 1.16).
    """

    beta: float = number(0.1, above=0)
    alpha: float = number(1e-5, least=0)
    loss_type: str = choice("sigmoid", "ipo")
    needs_reference = True
    needs_reward = True
    reward_is = "marks (for XPO, > 0 means written by the reference)"

    def _losses(self, chosen, rejected):
        z = chosen.ratio - rejected.ratio
        losses = (z - 1 / (2 * self.beta)) ** 2 if self.loss_type == "ipo" else -logsigmoid(self.beta * z)
        return losses + self.alpha * sum(torch.where(s.reward > 0, s.logprob, 0) for s in (chosen, rejected))


@dataclasses.dataclass(frozen=True)
class RDPO(Objective):
    """R-DPO, length-regularised DPO: z = beta (ratio_c - ratio_r) + alpha (length_c - length_r), loss as in DPO.

        -(1 - e) log s(z) - e log s(-z)                    e = label_smoothing

    The plus sign is right: a reply that is longer anyway has part of its margin from its length and need not gain it in
    probability. It follows from maximising reward - alpha length under a KL penalty. alpha is in nats per scored token;
    SimPO's authors searched 0.05 to 1. Reward: beta ratio, without the length. Source: Park et al. 2024, eq. 9.
    """

    beta: float = number(0.1, above=0)
    alpha: float = number(0.05, least=0)
    label_smoothing: float = number(0.0, least=0, below=0.5)
    needs_reference = True

    def _losses(self, chosen, rejected):
        longer = (chosen.length - rejected.length).to(chosen.logprob.dtype)
        z = self.beta * (chosen.ratio - rejected.ratio) + self.alpha * longer
        return smoothed(z, self.label_smoothing)


@dataclasses.dataclass(frozen=True)
class DPOP(Objective):
    """DPO-positive: z = beta (ratio_c - ratio_r - penalty max(0, -ratio_c)), loss as in DPO with label_smoothing.

    The penalty (the paper's lambda) holds the chosen reply at least as probable as under the reference, which matters
    where the two replies differ in few tokens. At ratio_c = 0, where training starts, its derivative counts as 0.
    Reward: beta ratio. Source: Pal et al. 2024 (Smaug), eq. 3; defaults beta 0.3 and lambda 50 are the paper's.
    """

    beta: float = number(0.3, above=0)
    penalty: float = number(50.0, least=0)
    label_smoothing: float = number(0.0, least=0, below=0.5)
    needs_reference = True

    def _losses(self, chosen, rejected):
        z = self.beta * (chosen.ratio - rejected.ratio - self.penalty * torch.relu(-chosen.ratio))
        return smoothed(z, self.label_smoothing)

    def initial_loss(self):
        return self._loss_at_reference()
