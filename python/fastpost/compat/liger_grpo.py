# SPDX-License-Identifier: Apache-2.0
"""Liger's fused GRPO loss on fastpost.policy_loss; import it from fastpost.compat.liger.

from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss   # before
from fastpost.compat.liger import LigerFusedLinearGRPOLoss       # after
loss, metrics = LigerFusedLinearGRPOLoss(beta=0.0)(hidden, head.weight, ids, mask, advantages)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost import objectives
from fastpost.compat.padded import pack
from fastpost.ops.linear_logprob import linear_logprob
from fastpost.ops.policy_loss import policy_loss

OP = "LigerFusedLinearGRPOLoss"
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """GRPO and its relatives, see objectives.GRPO; the input comes before the weight.

    loss_type "grpo", "bnpo", "dr_grpo", "dapo" or "cispo" (which needs an epsilon_high of at least 1, the cap of the
    ratio; Liger takes its default 0.2 for that). `compiled` and `chunk_size` change nothing here, and neither do the
    sapo_ and vespo_ parameters, which belong to loss types without a counterpart: those raise a ValueError, and so does
    use_bias_correction_kl.
    """

    def __init__(self, beta: float = 0.04, compiled: bool = True, use_ref_model: bool = True, chunk_size: int = 1,
                 epsilon_low: float = 0.2, epsilon_high: float = 0.2, loss_type: str = "dapo",
                 max_completion_length: int | None = None, importance_sampling_level: str = "token",
                 sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05, temperature: float = 1.0,
                 delta: float | None = None, use_bias_correction_kl: bool = False, vespo_k_pos: float = 2.0,
                 vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0):  # fmt: skip
        super().__init__()
        self.beta, self.compiled, self.use_ref_model, self.chunk_size = beta, compiled, use_ref_model, chunk_size
        self.epsilon_low, self.epsilon_high, self.loss_type = epsilon_low, epsilon_high, loss_type
        self.max_completion_length, self.importance_sampling_level = max_completion_length, importance_sampling_level
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.temperature, self.delta, self.use_bias_correction_kl = temperature, delta, use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        self._objective()  # says now what is wrong

    def _objective(self) -> objectives.GRPO:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"[{OP}] loss_type: expected one of {', '.join(LOSS_TYPES)}, got {self.loss_type!r}.")
        level, levels = self.importance_sampling_level, ("token", "sequence")
        if level not in levels or (level == "sequence" and self.loss_type == "cispo"):
            raise ValueError(
                f"[{OP}] importance_sampling_level: expected 'token' or, but for cispo, 'sequence', got {level!r}."
            )
        if self.use_bias_correction_kl:
            raise ValueError(f"[{OP}] use_bias_correction_kl: expected False, got True: it has no counterpart here.")
        return objectives.GRPO(
            self.loss_type,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            beta=self.beta if self.use_ref_model else 0.0,  # against itself the policy's KL and its gradient are 0
            level=level,
            max_completion_length=self.max_completion_length if self.loss_type == "dr_grpo" else None,
        )

    def forward(self, _input: Tensor, lin_weight: Tensor, selected_token_ids: Tensor, attention_mask: Tensor,
                advantages: Tensor, bias: Tensor | None = None, ref_per_token_logps: Tensor | None = None,
                old_per_token_logps: Tensor | None = None, ref_input: Tensor | None = None,
                ref_weight: Tensor | None = None, ref_bias: Tensor | None = None, vllm_is_ratio: Tensor | None = None,
                num_items_in_batch: Tensor | float | None = None):  # fmt: skip
        """_input [B, T, D], lin_weight [V, D], selected_token_ids [B, T], attention_mask [B, T] (0: not scored),
        advantages [B], bias [V]; log-probs of the reference [B, T] (or ref_input, ref_weight, ref_bias) and of the
        policy that wrote the replies [B, T]; vllm_is_ratio [B], [B, 1] or [B, T], not negative, multiplies the policy
        term; num_items_in_batch replaces the number of tokens in "dapo" and "cispo" and is divided by the ranks ->
        (loss [], metrics): mean KL (with beta != 0) and the share of clipped tokens, both []."""
        objective = self._objective()
        target = torch.where(attention_mask != 0, selected_token_ids, -100)
        packed = pack(OP, _input, target)
        reference = self._reference(packed, target, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        old = None if old_per_token_logps is None else old_per_token_logps.flatten()[packed.rows].float()
        advantage = advantages.float()
        if vllm_is_ratio is not None:  # a ratio that is not negative goes through min(r A, clip(r) A)
            ratio = vllm_is_ratio.float().view(len(target), -1)
            advantage = (advantage[:, None] * ratio).expand(target.shape).flatten()[packed.rows]
            packed, old, reference = _not_as_many_tokens_as_sequences(packed, old, reference)
            advantage = torch.nn.functional.pad(advantage, (0, len(packed.target) - len(advantage)))
        num_items = self._items(target, num_items_in_batch)
        out = policy_loss(packed.hidden, lin_weight, packed.target, packed.cu_seqlens, objective, advantage=advantage,
                          old_logprob=old, reference_logprob=reference, num_items=num_items, bias=bias,
                          temperature=self.temperature)  # fmt: skip
        clipped = out.clip_low + out.clip_high
        if objective.level == "sequence":  # counted in sequences there, in tokens by Liger
            clipped = self._clipped_tokens(objective, out, old, advantages)
        return out.loss, ((out.kl, clipped) if self.beta else (clipped,))

    def _reference(self, packed, target, logps, ref_input, ref_weight, ref_bias):
        if not self.use_ref_model:
            if logps is not None or ref_input is not None:
                raise ValueError(f"[{OP}] use_ref_model: expected True with a reference, got False. Leave one out.")
            return None
        if logps is not None:
            return logps.flatten()[packed.rows].float()
        if ref_input is None or ref_weight is None:
            raise ValueError(
                f"[{OP}] ref_per_token_logps: expected a tensor [B, T], or ref_input and ref_weight, with "
                "use_ref_model=True, got None. Pass it, or use_ref_model=False."
            )
        with torch.no_grad():
            theirs = pack(OP, ref_input, target, name="ref_input")
            return linear_logprob(theirs.hidden, ref_weight, theirs.target, bias=ref_bias, temperature=self.temperature)

    def _items(self, target, num_items):
        """What "dapo" and "cispo" divide by: the scored tokens of all ranks, or num_items, per rank."""
        if self.loss_type not in ("dapo", "cispo"):
            return None
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if num_items is None:
            num_items = (target != -100).sum().float()
            if distributed:
                torch.distributed.all_reduce(num_items)
        num_items = torch.as_tensor(num_items, dtype=torch.float32, device=target.device)
        return (num_items / (torch.distributed.get_world_size() if distributed else 1)).clamp(min=1)

    @torch.no_grad()
    def _clipped_tokens(self, objective, out, old, advantages):
        sequence = torch.repeat_interleave(out.length.long())
        n = len(sequence)
        ratio = out.logprob.new_ones(len(out.length))
        ratio[sequence] = objective.ratio(out.logprob[:n], sequence, out.length, None if old is None else old[:n])
        low = (ratio < 1 - objective.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + objective.epsilon_high) & (advantages > 0)
        return ((low | high) * out.length).sum() / max(1, n)


def _not_as_many_tokens_as_sequences(packed, old, reference):
    """policy_loss reads [S] as one advantage per sequence, so that [T] needs T != S: one more row, not scored."""
    if len(packed.target) != len(packed.cu_seqlens) - 1:
        return packed, old, reference
    pad = torch.nn.functional.pad
    ends = torch.cat([packed.cu_seqlens[:-1], packed.cu_seqlens[-1:] + 1])
    longer = packed._replace(
        hidden=pad(packed.hidden, (0, 0, 0, 1)), target=pad(packed.target, (0, 1), value=-100), cu_seqlens=ends
    )
    return longer, *(None if x is None else pad(x, (0, 1)) for x in (old, reference))
