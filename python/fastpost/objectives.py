# SPDX-License-Identifier: Apache-2.0
"""Preference objectives: one small frozen dataclass each, with its definition in plain torch.

Every objective is a function of per-sequence numbers, all of shape [S]:

    logprob    sum of the log-probs of the sequence's scored tokens (the only input that gets a gradient)
    length     number of scored tokens
    reference  the same sum under a frozen reference model             (needs_reference)
    previous   the same sum under the policy that wrote the replies    (needs_previous)
    reward     what a reward model gave, or for KTO > 0 = desirable    (needs_reward)

In pair objectives sequences 2i and 2i + 1 are the chosen and the rejected reply of pair i. Docstrings write c and r for
them, lp for logprob, mean for logprob / length and ratio for logprob - reference. An empty sequence (length 0) has
logprob 0 and counts as length 1, so its mean is 0; fastpost.preference_loss on a CPU refuses it where a mean is used.

The compiled core has the same formulas with their derivatives in cpp/objectives.h.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

DPO_LOSS_TYPES = (
    *("sigmoid", "hinge", "robust", "exo_pair", "nca_pair"),
    *("bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"),
)
# Position = the number that the compiled core knows a formula by (FP_OBJECTIVES in cpp/objectives.h).
KINDS = (
    "sft",
    *("dpo_" + loss_type for loss_type in DPO_LOSS_TYPES),
    *("ipo_mean", "ipo_sum", "simpo_sigmoid", "simpo_hinge", "cpo_sigmoid", "cpo_hinge"),
    *("orpo", "kto", "lndpo", "inpo", "rebel", "refuel"),
)


def _number(default: float, **limits: float):
    """A float field; limits are `above`, `below` (exclusive), `least` and `most` (inclusive)."""
    return dataclasses.field(default=default, metadata={"limits": limits})


def _choice(default: str, *others: str):
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


class Sequences(NamedTuple):
    """The numbers of some sequences: of all, of the chosen, or of the rejected ones. Each [n] or None."""

    logprob: Tensor
    length: Tensor
    reference: Tensor | None = None
    previous: Tensor | None = None
    reward: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        return self.logprob / self.length.clamp(min=1)

    @property
    def ratio(self) -> Tensor:
        return self.logprob - self.reference

    @property
    def mean_ratio(self) -> Tensor:
        return self.ratio / self.length.clamp(min=1)


class Objective:
    """Base of all objectives. Subclasses are frozen dataclasses that define `_losses` and `_rewards`."""

    paired = True
    needs_reference = False
    needs_previous = False
    needs_reward = False
    unit = "pair"  # what the loss is a mean over: "pair", "sequence" or "token"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "choices" in field.metadata:
                self._check_choice(field.name, value, field.metadata["choices"])
            elif "limits" in field.metadata:
                self._check_number(field.name, value, **field.metadata["limits"])
                object.__setattr__(self, field.name, float(value))
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        kind = "_".join([self.name.lower(), *(v for v in values if isinstance(v, str))])
        known = ALL.get(self.name.lower()) is type(self)
        core = (KINDS.index(kind), tuple(v for v in values if isinstance(v, float))) if known else None
        object.__setattr__(self, "_core", core)  # once, so that torch.compile sees a constant

    def __call__(self, logprob, length, reference_logprob=None, previous_logprob=None, reward=None, kl=None) -> Tensor:
        """Losses, one per pair [S / 2] or per sequence [S], in the dtype of logprob; differentiable in logprob.

        Plain torch in any float dtype. `loss = losses.sum() / self.count(length)`. Raises ValueError when an input that
        the objective needs is missing or an odd number of sequences cannot be pairs.
        """
        s = self._sequences(logprob, length, reference_logprob, previous_logprob, reward)
        if not self.paired:
            return self._losses(s, kl)
        if logprob.shape[0] % 2:
            raise ValueError(
                f"[{self.name}] logprob: expected an even number of sequences (chosen, rejected, chosen, ...), "
                f"got {logprob.shape[0]}. Pass whole pairs."
            )
        chosen, rejected = (Sequences(*(None if x is None else x[i::2] for x in s)) for i in (0, 1))
        return self._losses(chosen, rejected)

    def rewards(self, logprob, length, reference_logprob=None, previous_logprob=None) -> Tensor:
        """The reward [S] that the policy implies for each sequence, detached: what TRL logs as rewards/chosen, ..."""
        s = self._sequences(logprob, length, reference_logprob, previous_logprob, reward=logprob)
        return self._rewards(s).detach()

    def count(self, length: Tensor) -> int | Tensor:
        """What to divide losses.sum() by: pairs, sequences, or scored tokens (then a 0-d tensor)."""
        return {"pair": length.shape[0] // 2, "sequence": length.shape[0]}.get(self.unit, length.sum())

    def initial_loss(self) -> float | None:
        """Mean loss while the policy still equals its reference, or None where that depends on the data."""
        return None

    def core(self) -> tuple[int, tuple[float, ...]] | None:
        """(kind, parameters) for the compiled core: the index in KINDS and the numeric fields in order.

        None for a subclass that it does not know: preference_loss then evaluates the definition in torch.
        """
        return self._core

    @property
    def name(self) -> str:
        return type(self).__name__

    def _losses(self, chosen: Sequences, rejected: Sequences) -> Tensor:  # unpaired: (sequences, kl)
        raise NotImplementedError

    def _rewards(self, s: Sequences) -> Tensor:
        return self.beta * s.ratio

    def _sequences(self, logprob, length, reference_logprob, previous_logprob, reward) -> Sequences:
        for name, value, needed, what in (
            ("reference_logprob", reference_logprob, self.needs_reference, "log-prob sums under the reference"),
            ("previous_logprob", previous_logprob, self.needs_previous, "log-prob sums under the previous policy"),
            ("reward", reward, self.needs_reward, "rewards (for KTO, > 0 means desirable)"),
        ):
            if needed and value is None:
                raise ValueError(
                    f"[{self.name}] {name}: expected a tensor [{logprob.shape[0]}], got None: pass {what}."
                )
        return Sequences(logprob, length, reference_logprob, previous_logprob, reward)

    def _loss_at_reference(self) -> float:
        zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2)
        return self(zero, one, reference_logprob=zero, previous_logprob=zero).item()

    def _check_number(self, name, value, above=-math.inf, below=math.inf, least=-math.inf, most=math.inf):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if number and above < value < below and least <= value <= most:
            return
        low = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        high = f" below {below:g}" if below < math.inf else f" at most {most:g}" if most < math.inf else ""
        limits = low + (" and" if low and high else "") + high
        raise ValueError(f"[{self.name}] {name}: expected a finite number{limits}, got {value!r}.")

    def _check_choice(self, name, value, choices):
        if value not in choices:
            listed = ", ".join(map(repr, choices))
            raise ValueError(f"[{self.name}] {name}: expected one of {listed}, got {value!r}.{_hint(value, choices)}")

    def _check_smoothing(self, used: bool):
        if self.label_smoothing and not used:
            raise ValueError(
                f"[{self.name}] label_smoothing: expected 0 with loss_type {self.loss_type!r}, which has no smoothing, "
                f"got {self.label_smoothing:g}. Leave it out or choose another loss_type."
            )


def _smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0. The inner where keeps the branch not taken from putting NaN into the gradient."""
    split = -math.log(2)
    small = x < split
    far = torch.log1p(-torch.exp(torch.where(small, x, split)))
    near = torch.log(-torch.expm1(torch.where(small, split, x)))
    return torch.where(small, far, near)


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

    beta: float = _number(0.1, above=0)
    loss_type: str = _choice(*DPO_LOSS_TYPES)
    label_smoothing: float = _number(0.0, least=0, below=0.5)
    discopop_tau: float = _number(0.05, above=0, most=1)  # above 1 the loss grows exponentially in -z
    sft_weight: float = _number(0.0, least=0)
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
                return _smoothed(z, e)

    def initial_loss(self):
        return None if self.sft_weight else self._loss_at_reference()


@dataclasses.dataclass(frozen=True)
class IPO(Objective):
    """Identity preference optimization: (h - 1 / 2 beta)^2; beta is the paper's tau.

    normalization "mean": h = ratio_c / length_c - ratio_r / length_r (TRL; the IPO authors confirmed it to them).
    normalization "sum":  h = ratio_c - ratio_r (OpenRLHF; the formula as printed). Fitting betas differ by a factor of
    about the length. Reward: beta ratio, unnormalised in both as in TRL. Source: Azar et al. 2023, eq. 17.
    """

    beta: float = _number(0.1, above=0)
    normalization: str = _choice("mean", "sum")
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
class SimPO(Objective):
    """Simple preference optimization, no reference: z = beta (mean_c - mean_r - gamma_beta_ratio).

        sigmoid    -(1 - e) log s(z) - e log s(-z)         e = label_smoothing
        hinge      max(0, 1 - z)

    gamma_beta_ratio is gamma / beta as in the authors' code; TRL's simpo_gamma and LLaMA-Factory's gamma are absolute
    (divide by beta). sft_weight adds sft_weight * (-mean_c): per pair here, over all chosen tokens of a batch in the
    authors' code. Defaults are the code's (2.0, 0.25); the released models use beta 2 to 10 and ratios 0.1 to 0.8.
    Reward: beta mean. Source: Meng et al. 2024 and princeton-nlp/SimPO.
    """

    beta: float = _number(2.0, above=0)
    gamma_beta_ratio: float = _number(0.25)
    loss_type: str = _choice("sigmoid", "hinge")
    label_smoothing: float = _number(0.0, least=0, below=0.5)
    sft_weight: float = _number(0.0, least=0)

    def __post_init__(self):
        super().__post_init__()
        self._check_smoothing(used=self.loss_type == "sigmoid")

    def _losses(self, chosen, rejected):
        z = self.beta * (chosen.mean - rejected.mean - self.gamma_beta_ratio)
        losses = torch.relu(1 - z) if self.loss_type == "hinge" else _smoothed(z, self.label_smoothing)
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

    beta: float = _number(0.1, above=0)
    loss_type: str = _choice("sigmoid", "hinge")
    label_smoothing: float = _number(0.0, least=0, below=0.5)
    cpo_alpha: float = _number(1.0, least=0)

    def __post_init__(self):
        super().__post_init__()
        self._check_smoothing(used=self.loss_type == "sigmoid")

    def _losses(self, chosen, rejected):
        z = self.beta * (chosen.logprob - rejected.logprob)
        losses = torch.relu(1 - z) if self.loss_type == "hinge" else _smoothed(z, self.label_smoothing)
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

    beta: float = _number(0.1, above=0)

    def _losses(self, chosen, rejected):
        odds = self._log_odds(chosen.mean) - self._log_odds(rejected.mean)
        return -chosen.mean - self.beta * logsigmoid(odds)

    @staticmethod
    def _log_odds(mean: Tensor) -> Tensor:
        # Subtracting a detached excess clamps the value but lets the gradient at the bound through: with a gradient of
        # 0 a rejected sequence of probability 1 would never be pushed down.
        mean = mean - (mean + 1e-6).clamp(min=0).detach()
        return mean - _log1mexp(mean)

    def _rewards(self, s):
        return self.beta * s.mean


@dataclasses.dataclass(frozen=True)
class KTO(Objective):
    """Kahneman-Tversky optimization on single sequences: w (1 - s(+-beta (ratio - kl))).

    `reward` > 0 marks a desirable sequence (sign +, w = desirable_weight), anything else an undesirable one. `kl` is a
    number or a one-element tensor, an estimate of the policy's divergence from mismatched replies; it gets no gradient
    and counts as 0 when negative. Without it this is TRL's loss type "apo_zero_unpaired".
    The loss is the mean over sequences. Reward: beta ratio. Source: Ethayarajh et al. 2024, eq. 7; TRL's KTOTrainer.
    """

    beta: float = _number(0.1, above=0)
    desirable_weight: float = _number(1.0, least=0)
    undesirable_weight: float = _number(1.0, least=0)
    paired = False
    needs_reference = True
    needs_reward = True
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

    beta: float = _number(10.0, above=0)
    needs_reference = True

    def _losses(self, chosen, rejected):
        return -logsigmoid(self.beta * (chosen.mean_ratio - rejected.mean_ratio))

    def initial_loss(self):
        return self._loss_at_reference()


@dataclasses.dataclass(frozen=True)
class INPO(Objective):
    """Iterative Nash policy optimization: (h - 1 / 2 eta)^2 on summed log-probs, with d = c - r,

        h = d lp - ratio * d reference - (1 - ratio) * d previous        ratio = tau / eta in (0, 1]

    ratio = 1 is IPO with normalization "sum" and beta = eta. Defaults are the released code's (target 1 / 2 eta =
    66.67). Reward: eta (lp - reference). Source: Zhang et al. 2024 and derivatives of the authors' code.
    """

    eta: float = _number(0.0075, above=0)
    ratio: float = _number(1 / 3, above=0, most=1)
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

    eta: float = _number(1.0, above=0)
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

    eta: float = _number(1e3, above=0)


ALL: dict[str, type[Objective]] = {
    cls.__name__.lower(): cls for cls in (SFT, DPO, IPO, SimPO, CPO, ORPO, KTO, LNDPO, INPO, REBEL, REFUEL)
}


def from_name(name: str, **fields) -> Objective:
    """The objective called `name` ("simpo", "SimPO", "ln-dpo", ...) with these fields, as a recipe spells it.

    Raises ValueError for an unknown name, an unknown field (both with the nearest known one) or a value out of range.
    """
    key = str(name).lower().replace("-", "").replace("_", "")
    if key not in ALL:
        listed = ", ".join(ALL)
        raise ValueError(f"[objective] name: expected one of {listed}, got {name!r}.{_hint(key, ALL)}")
    cls = ALL[key]
    known = [f.name for f in dataclasses.fields(cls)]
    for field in fields:
        if field not in known:
            has = f"has {', '.join(known)}" if known else "has no fields"
            raise ValueError(f"[{cls.__name__}] {field}: no such field; {cls.__name__} {has}.{_hint(field, known)}")
    return cls(**fields)


def _hint(got: object, known) -> str:
    near = difflib.get_close_matches(str(got), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
