# SPDX-License-Identifier: Apache-2.0
"""What all objectives share: fields that check themselves, the numbers of a sequence, the base class."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import ClassVar, NamedTuple

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
    *("bco", "xpo_sigmoid", "xpo_ipo", "alphapo", "rdpo", "dpop"),
)
ALL: dict[str, type[Objective]] = {}  # those that the core knows, by lower-case name; filled by objectives/__init__.py


def number(default: float | None, **limits: float):
    """A float field; limits are `above`, `below` (exclusive), `least` and `most` (inclusive). None: optional."""
    return dataclasses.field(default=default, metadata={"limits": limits})


def choice(default: str, *others: str):
    """A string field: one of these."""
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


class Hyperparameters:
    """Base of frozen dataclasses whose fields are made by `number` and `choice`, and checked when they are set."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "choices" in field.metadata:
                self._check_choice(field.name, value, field.metadata["choices"])
            elif "limits" in field.metadata and not (value is None and field.default is None):
                self._check_number(field.name, value, **field.metadata["limits"])
                object.__setattr__(self, field.name, float(value))

    @property
    def name(self) -> str:
        return type(self).__name__

    def _check_number(self, name, value, above=-math.inf, below=math.inf, least=-math.inf, most=math.inf):
        finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if finite and above < value < below and least <= value <= most:
            return
        low = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        high = f" below {below:g}" if below < math.inf else f" at most {most:g}" if most < math.inf else ""
        limits = low + (" and" if low and high else "") + high
        raise ValueError(f"[{self.name}] {name}: expected a finite number{limits}, got {value!r}.")

    def _check_choice(self, name, value, choices):
        if value not in choices:
            listed = ", ".join(map(repr, choices))
            raise ValueError(f"[{self.name}] {name}: expected one of {listed}, got {value!r}.{hint(value, choices)}")

    def _check_smoothing(self, used: bool):
        if self.label_smoothing and not used:
            raise ValueError(
                f"[{self.name}] label_smoothing: expected 0 with loss_type {self.loss_type!r}, which has no smoothing, "
                f"got {self.label_smoothing:g}. Leave it out or choose another loss_type."
            )


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


class Objective(Hyperparameters):
    """Base of all objectives. Subclasses are frozen dataclasses that define `_losses` and `_rewards`."""

    paired = True
    needs_reference = False
    needs_previous = False
    needs_reward = False
    reward_is = "rewards"
    row_type: ClassVar[str | None] = None  # the rows that only it takes (fastpost.data.columns.TYPES)
    takes_kl = False  # a pair objective with it gets kl as third argument of _losses; those without pairs always do
    unit = "pair"  # what the loss is a mean over: "pair", "triple", "sequence" or "token"

    def __post_init__(self):
        super().__post_init__()
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
        return self._losses(chosen, rejected, kl) if self.takes_kl else self._losses(chosen, rejected)

    def rewards(self, logprob, length, reference_logprob=None, previous_logprob=None) -> Tensor:
        """The reward [S] that the policy implies for each sequence, detached: what TRL logs as rewards/chosen, ..."""
        s = self._sequences(logprob, length, reference_logprob, previous_logprob, reward=logprob)
        return self._rewards(s).detach()

    def count(self, length: Tensor) -> int | Tensor:
        """What to divide losses.sum() by: pairs, triples, sequences, or scored tokens (then a 0-d tensor)."""
        size = {"pair": 2, "triple": 3, "sequence": 1}.get(self.unit)
        return length.sum() if size is None else length.shape[0] // size

    def initial_loss(self) -> float | None:
        """Mean loss while the policy still equals its reference, or None where that depends on the data."""
        return None

    def core(self) -> tuple[int, tuple[float, ...]] | None:
        """(kind, parameters) for the compiled core: the index in KINDS and the numeric fields in order.

        None for a subclass that it does not know: preference_loss then evaluates the definition in torch.
        """
        return self._core

    def _losses(self, chosen: Sequences, rejected: Sequences) -> Tensor:  # unpaired: (sequences, kl)
        raise NotImplementedError

    def _rewards(self, s: Sequences) -> Tensor:
        return self.beta * s.ratio

    def _sequences(self, logprob, length, reference_logprob, previous_logprob, reward) -> Sequences:
        for name, value, needed, what in (
            ("reference_logprob", reference_logprob, self.needs_reference, "log-prob sums under the reference"),
            ("previous_logprob", previous_logprob, self.needs_previous, "log-prob sums under the previous policy"),
            ("reward", reward, self.needs_reward, self.reward_is),
        ):
            if needed and value is None:
                raise ValueError(
                    f"[{self.name}] {name}: expected a tensor [{logprob.shape[0]}], got None: pass {what}."
                )
        return Sequences(logprob, length, reference_logprob, previous_logprob, reward)

    def _loss_at_reference(self) -> float:
        zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2)
        return self(zero, one, reference_logprob=zero, previous_logprob=zero).item()


def smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log s(z) - e log s(-z)."""
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0. The inner where keeps the branch not taken from putting NaN into the gradient."""
    split = -math.log(2)
    small = x < split
    far = torch.log1p(-torch.exp(torch.where(small, x, split)))
    near = torch.log(-torch.expm1(torch.where(small, split, x)))
    return torch.where(small, far, near)


def hint(got: object, known) -> str:
    near = difflib.get_close_matches(str(got), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
