# SPDX-License-Identifier: Apache-2.0
"""Preference objectives: one small frozen dataclass each, with its definition in plain torch.

Every objective is a function of per-sequence numbers, all of shape [S]:

    logprob    sum of the log-probs of the sequence's scored tokens (the only input that gets a gradient)
    length     number of scored tokens
    reference  the same sum under a frozen reference model             (needs_reference)
    previous   the same sum under the policy that wrote the replies    (needs_previous)
    reward     what a reward model gave, or a mark (KTO, XPO)          (needs_reward)

In pair objectives sequences 2i and 2i + 1 are the chosen and the rejected reply of pair i. Docstrings write c and r for
them, lp for logprob, mean for logprob / length and ratio for logprob - reference. An empty sequence (length 0) has
logprob 0 and counts as length 1, so its mean is 0; fastpost.preference_loss on a CPU refuses it where a mean is used.

The compiled core has the same formulas with their derivatives in cpp/objectives.h.

Not functions of sequence log-probs, but objectives all the same: GRPO (token log-probs and advantages, for
fastpost.policy_loss) and BradleyTerry (rewards of a reward model).
"""

from __future__ import annotations

import dataclasses

from .base import ALL, DPO_LOSS_TYPES, KINDS, Objective, Sequences, hint
from .dpo import BCO, DPO, DPOP, IPO, KTO, LNDPO, RDPO, XPO
from .policy import GRPO, LEVELS, POLICY_KINDS, group_advantage, leave_one_out_advantage
from .previous import INPO, REBEL, REFUEL
from .reward import BradleyTerry
from .simpo import CPO, ORPO, SFT, TPO, AlphaPO, SimPO
from .two_part import TwoPartSFT

__all__ = ["ALL", "BCO", "BY_NAME", "CPO", "DPO", "DPOP", "DPO_LOSS_TYPES", "GRPO", "INPO", "IPO", "KINDS", "KTO",
           "LEVELS", "LNDPO", "ORPO", "POLICY_KINDS", "RDPO", "REBEL", "REFUEL", "SFT", "TPO", "XPO",
           "AlphaPO", "BradleyTerry", "Objective", "Sequences", "SimPO", "TwoPartSFT", "from_name",
           "group_advantage", "leave_one_out_advantage"]  # fmt: skip

_COMPILED = (SFT, DPO, IPO, SimPO, CPO, ORPO, KTO, LNDPO, INPO, REBEL, REFUEL, BCO, XPO, AlphaPO, RDPO, DPOP)
ALL.update({cls.__name__.lower(): cls for cls in _COMPILED})
BY_NAME = {**ALL, "twopartsft": TwoPartSFT}
"""What a recipe may name: also what is plain torch on top of the core's sums."""


def from_name(name: str, **fields) -> Objective:
    """The objective called `name` ("simpo", "SimPO", "ln-dpo", ...) with these fields, as a recipe spells it.

    Raises ValueError for an unknown name, an unknown field (both with the nearest known one) or a value out of range.
    """
    key = str(name).lower().replace("-", "").replace("_", "")
    if key not in BY_NAME:
        listed = ", ".join(BY_NAME)
        raise ValueError(f"[objective] name: expected one of {listed}, got {name!r}.{hint(key, BY_NAME)}")
    cls = BY_NAME[key]
    known = [f.name for f in dataclasses.fields(cls)]
    for field in fields:
        if field not in known:
            has = f"has {', '.join(known)}" if known else "has no fields"
            raise ValueError(f"[{cls.__name__}] {field}: no such field; {cls.__name__} {has}.{hint(field, known)}")
    return cls(**fields)
