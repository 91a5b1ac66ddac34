# SPDX-License-Identifier: Apache-2.0
"""token_logprob in plain torch; works in any float dtype, so float64 input gives the truth."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


def token_logprob(logits, target, *, temperature=1.0, softcap=None, ignore_index=-100, return_entropy=False):
    """Same signature and meaning as :func:`fastpost.token_logprob`."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature, dim=-1)
    scored = target != ignore_index
    picked = logp.gather(1, torch.where(scored, target, 0)[:, None])[:, 0]
    logprob = torch.where(scored, picked, 0)
    if not return_entropy:
        return logprob
    # p log p -> 0 where a logit is -inf
    entropy = -torch.where(logp == -torch.inf, 0, logp.exp() * logp).sum(-1)
    return logprob, torch.where(scored, entropy, 0)


@dataclass(frozen=True)
class Case:
    """One shape with its options; `inputs` draws the tensors."""

    name: str
    n: int
    v: int
    scale: float = 1.0
    ignored: float = 0.0  # share of rows that are not scored
    peaked: bool = False  # the target's logit towers above the rest: p -> 1
    options: dict = field(default_factory=dict)

    def inputs(self, dtype=torch.float32, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        logits = (torch.randn(self.n, self.v, generator=g) * self.scale).to(dtype)
        target = torch.randint(0, self.v, (self.n,), generator=g)
        if self.peaked:
            logits[torch.arange(self.n), target] = 12.0
        if self.ignored:
            target[torch.rand(self.n, generator=g) < self.ignored] = self.options.get("ignore_index", -100)
        return logits.to(device), target.to(device)


def cases() -> list[Case]:
    return [
        Case("empty", 0, 17),
        Case("one-row", 1, 1000),
        Case("one-class", 3, 1),  # log p = 0 whatever the logit
        Case("tail", 5, 4099),  # V divides neither the register nor the block
        Case("below-register", 4, 7),
        Case("blocks", 9, 10000),  # several blocks of the running maximum
        Case("tiny-scale", 8, 333, scale=1e-3),
        Case("huge-scale", 8, 333, scale=1e3),
        Case("peaked", 16, 2000, scale=0.1, peaked=True),
        Case("half-ignored", 32, 515, ignored=0.5),
        Case("all-ignored", 4, 100, ignored=1.1),
        Case("ignore-zero", 16, 50, ignored=0.4, options={"ignore_index": 0}),  # an index that is a class, too
        Case("temperature", 8, 1025, scale=3, options={"temperature": 0.7}),
        Case("softcap", 8, 1025, scale=30, options={"softcap": 30.0}),
        Case("entropy", 8, 2050, scale=2, options={"return_entropy": True}),
        Case("everything", 24, 3001, scale=10, ignored=0.3,
             options={"temperature": 1.3, "softcap": 20.0, "return_entropy": True}),
    ]  # fmt: skip
