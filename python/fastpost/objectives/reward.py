# SPDX-License-Identifier: Apache-2.0
"""The loss of a reward model: on scalar rewards of sequences, not on log-probs."""

from __future__ import annotations

import dataclasses

from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Hyperparameters, number


@dataclasses.dataclass(frozen=True)
class BradleyTerry(Hyperparameters):
    """Bradley-Terry loss of a reward model: -log s(reward_c - reward_r - margin) + center (reward_c + reward_r)^2.

    loss = BradleyTerry()(reward).mean(). Only differences of rewards matter to the first term; center > 0 keeps their
    mean near 0 (Eisenstein et al. 2023, 0.01 there). margin is how much better the chosen reply was judged to be
    (Llama 2). Defaults and terms are those of TRL's RewardTrainer (center_rewards_coefficient there).
    """

    center: float = number(0.0, least=0)

    def __call__(self, reward: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        """Losses [S / 2], differentiable in reward [S]: 2i, 2i + 1 are the chosen and the rejected reply of pair i.

        Any float dtype; margin [S / 2] or a number, >= 0. Raises ValueError for other shapes.
        """
        if reward.ndim != 1 or reward.shape[0] % 2:
            raise ValueError(
                "[BradleyTerry] reward: expected one number per sequence, an even number of them (chosen, rejected, "
                f"chosen, ...), got shape {list(reward.shape)}. Pass whole pairs."
            )
        if isinstance(margin, Tensor) and margin.shape != (reward.shape[0] // 2,):
            raise ValueError(
                f"[BradleyTerry] margin: expected a number or a tensor [{reward.shape[0] // 2}], got shape "
                f"{list(margin.shape)}. Pass one margin per pair."
            )
        chosen, rejected = reward[0::2], reward[1::2]
        losses = -logsigmoid(chosen - rejected - margin)
        return losses + self.center * (chosen + rejected) ** 2 if self.center else losses
