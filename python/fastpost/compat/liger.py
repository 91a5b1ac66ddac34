# SPDX-License-Identifier: Apache-2.0
"""Liger's fused preference losses (liger_kernel.chunked_loss, 0.8) on fastpost's ops; they run on CPUs, too.

    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss    # before
    from fastpost.compat.liger import LigerFusedLinearDPOLoss        # after
    loss, aux = LigerFusedLinearDPOLoss(beta=0.1)(head.weight, hidden, target, None, ref_hidden, ref_head.weight)

Constructors, calls, defaults and returned tuples are Liger's: input [2B, T, D] with the chosen half first, targets
[2B, T] already shifted. `compiled` and `chunk_size` tune Liger's loop over chunks and change nothing here. Aux outputs
are float32 and detached; Liger's say that they have a gradient, which is dropped. Different on purpose:

- A sequence without scored tokens has mean log-prob 0 (Liger: NaN, in the loss and in the gradient of the whole batch);
  without any chosen token the NLL term is 0.
- DPO's loss type "sigmoid" uses label_smoothing, as in the cDPO note (Liger drops it); where a loss type has no
  smoothing, label_smoothing > 0 is a ValueError.
- discopop and ORPO stay finite where Liger's formulas overflow (margins below -88, probabilities of 1).
- KTO takes `kl` as a number, one element or [B]; Liger pairs a [B] tensor with the wrong sequences.
- GRPO has the loss types of objectives.GRPO; see liger_grpo.py for what it refuses.
- Unscored rows and the zero gradients of a satisfied hinge cost nothing; weight gradients are summed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost import objectives
from fastpost.compat.liger_grpo import LigerFusedLinearGRPOLoss
from fastpost.compat.logits import sum_of_logits
from fastpost.compat.padded import pack
from fastpost.ops.linear_logprob import linear_logprob
from fastpost.ops.preference_loss import preference_loss

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]


@torch.no_grad()
def _reference_sums(op, ref_input, ref_weight, ref_bias, target, ignore_index, order=None) -> Tensor:
    """[S] summed log-probs under the reference."""
    for name, value in (("ref_input", ref_input), ("ref_weight", ref_weight)):
        if value is None:
            raise ValueError(
                f"[{op}] {name}: expected a tensor with use_ref_model=True, got None. Pass it, or use_ref_model=False."
            )
    packed = pack(op, ref_input, target, ignore_index, order, "ref_input")
    return preference_loss(
        packed.hidden, ref_weight, packed.target, packed.cu_seqlens, objectives.SFT(), bias=ref_bias
    ).logprob


@torch.no_grad()
def _sum_of_all_logits(hidden, weight, bias) -> Tensor:
    """Σ over sequences, positions (prompt and padding, too) and vocabulary of hidden [S, T, D] · weightᵀ + bias."""
    total = hidden.flatten(0, 1).sum(0, dtype=torch.float32)[None]
    if bias is not None:  # once per row
        bias = bias.float() * (hidden.shape[0] * hidden.shape[1])
    return sum_of_logits(total, weight, bias)[0]


class _PairedLoss(torch.nn.Module):
    """What the losses on pairs share: alpha · (NLL per chosen token of the batch) + the objective's mean over pairs."""

    def _run(self, lin_weight, _input, target, bias, objective, *, alpha, compute_nll_loss, average, nll_target=None,
             reference=None):  # fmt: skip
        """(loss, aux). `objective` sees summed log-probs minus the reference's, or their means if `average`.

        reference: None or (ref_input, ref_weight, ref_bias).
        """
        op, b = type(self).__name__, target.shape[0] // 2
        if target.shape[0] % 2:
            raise ValueError(
                f"[{op}] target: expected an even number of sequences, the chosen half first, got {target.shape[0]}."
            )
        order = torch.arange(2 * b, device=target.device).view(2, b).T.flatten()  # pairs side by side
        packed = pack(op, _input, target, self.ignore_index, order)
        if reference is not None:
            reference = _reference_sums(op, *reference, target, self.ignore_index, order)
        other_nll = None
        if compute_nll_loss and nll_target is not None:
            other_nll = self._nll(op, lin_weight, _input[:b], nll_target[:b], bias)

        def scaled(logprob, length):
            return logprob / length.clamp(min=1) if average else logprob

        def ratios(logprob, length):
            return scaled(logprob if reference is None else logprob - reference, length)

        def nll(logprob, length):
            if not compute_nll_loss:
                return logprob.new_zeros(())
            return -logprob[0::2].sum() / length[0::2].sum().clamp(min=1) if other_nll is None else other_nll

        def losses(logprob, length):
            x = ratios(logprob, length)
            return objective(x, torch.ones_like(length), torch.zeros_like(x)) + alpha * nll(logprob, length)

        out = preference_loss(packed.hidden, lin_weight, packed.target, packed.cu_seqlens, losses, bias=bias)
        with torch.no_grad():
            logps, rewards = scaled(out.logprob, out.length), objective.beta * ratios(out.logprob, out.length)
            count = max(1, b * target.shape[1] * len(lin_weight))
            logits_mean = (_sum_of_all_logits(half, lin_weight, bias) / count for half in (_input[:b], _input[b:]))
            pairs = (x[i::2] for x in (logps, rewards) for i in (0, 1))
            chosen, rejected, chosen_rewards, rejected_rewards = pairs
            aux = chosen, rejected, *logits_mean, nll(out.logprob, out.length), chosen_rewards, rejected_rewards
        return out.loss, tuple(x.detach() for x in aux)

    def _nll(self, op, lin_weight, _input, nll_target, bias):
        packed = pack(op, _input, nll_target, self.ignore_index)
        logprob = linear_logprob(packed.hidden, lin_weight, packed.target, bias=bias)
        return -logprob.sum() / max(1, len(logprob))


class LigerFusedLinearSimPOLoss(_PairedLoss):
    """-log s(beta (mean_c - mean_r) - gamma) with label smoothing, plus alpha · NLL of the chosen replies.

    `gamma` is absolute: fastpost's and the paper's gamma_beta_ratio is gamma / beta. Defaults are Liger's (beta 0.1,
    NLL on); the paper uses beta 2 to 10 and no NLL.
    """

    def __init__(self, ignore_index: int = -100, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
                 compute_nll_loss: bool = True, compiled: bool = True, gamma: float = 0.5,
                 chunk_size: int = 1):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.compiled, self.gamma, self.chunk_size = (
            compute_nll_loss,
            compiled,
            gamma,
            chunk_size,
        )

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None):
        """lin_weight [V, D], _input [2B, T, D], target [2B, T] int64, bias [V] or None -> (loss [], (chosen_logps [B],
        rejected_logps [B], chosen_logits_mean [], rejected_logits_mean [], nll_loss [], chosen_rewards [B],
        rejected_rewards [B])); logps are means per token."""
        ratio = self.gamma / self.beta if self.beta else 0.0  # SimPO says what is wrong with a beta of 0
        objective = objectives.SimPO(self.beta, ratio, label_smoothing=self.label_smoothing)
        return self._run(lin_weight, _input, target, bias, objective, alpha=self.alpha,
                         compute_nll_loss=self.compute_nll_loss, average=True)  # fmt: skip


class LigerFusedLinearCPOLoss(_PairedLoss):
    """-log s(beta (lp_c - lp_r)) with label smoothing, plus alpha · NLL of the chosen replies."""

    def __init__(self, ignore_index: int = -100, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
                 compute_nll_loss: bool = True, compiled: bool = True, average_log_prob: bool = False,
                 chunk_size: int = 1):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.compiled, self.chunk_size = compute_nll_loss, compiled, chunk_size
        self.average_log_prob = average_log_prob

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None):
        """As in LigerFusedLinearSimPOLoss; logps are sums, or means per token with `average_log_prob`."""
        objective = objectives.CPO(self.beta, label_smoothing=self.label_smoothing, cpo_alpha=0.0)
        return self._run(lin_weight, _input, target, bias, objective, alpha=self.alpha,
                         compute_nll_loss=self.compute_nll_loss, average=self.average_log_prob)  # fmt: skip


class LigerFusedLinearORPOLoss(_PairedLoss):
    """-beta log s(log odds_c - log odds_r) of mean log-probs, plus the NLL of the chosen replies."""

    def __init__(self, ignore_index: int = -100, beta: float = 0.1, compute_nll_loss: bool = True,
                 compiled: bool = True, chunk_size: int = 1):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.compute_nll_loss = ignore_index, beta, compute_nll_loss
        self.compiled, self.chunk_size = compiled, chunk_size

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
                nll_target: Tensor | None = None):  # fmt: skip
        """As in LigerFusedLinearSimPOLoss, and two more aux outputs: log_odds_ratio [] (mean log s of the difference)
        and log_odds_chosen [] (mean difference). nll_target [2B, T]: what the NLL term scores, if not `target`; costs a
        second pass over its rows."""
        objective = _OddsRatio(self.beta)
        loss, aux = self._run(lin_weight, _input, target, bias, objective, alpha=1.0,
                              compute_nll_loss=self.compute_nll_loss, average=True, nll_target=nll_target)  # fmt: skip
        odds = objective.difference(*aux[:2])
        return loss, (*aux, torch.nn.functional.logsigmoid(odds).mean(), odds.mean())


class _OddsRatio:
    """The odds-ratio term of objectives.ORPO without its NLL term, which Liger counts per batch."""

    def __init__(self, beta):
        self.beta = objectives.ORPO(beta).beta

    def difference(self, chosen, rejected):
        log_odds = objectives.ORPO._log_odds
        return log_odds(chosen) - log_odds(rejected)

    def __call__(self, mean, length, reference):
        return -self.beta * torch.nn.functional.logsigmoid(self.difference(mean[0::2], mean[1::2]))


class LigerFusedLinearDPOLoss(_PairedLoss):
    """DPO and its variants on ratios to a reference model, plus alpha · NLL of the chosen replies if asked for.

    `loss_type` as in objectives.DPO. use_ref_model=False means a reference log-prob of 0.
    """

    def __init__(self, ignore_index: int = -100, beta: float = 0.1, alpha: float = 1.0, compute_nll_loss: bool = False,
                 compiled: bool = True, use_ref_model: bool = True, average_log_prob: bool = False,
                 chunk_size: int = 1, loss_type: str = "sigmoid", label_smoothing: float = 0.0,
                 discopop_tau: float = 0.05):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.compiled, self.chunk_size, self.use_ref_model = compiled, chunk_size, use_ref_model
        self.average_log_prob, self.loss_type = average_log_prob, loss_type
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau
        self._objective()  # says now what is wrong with loss_type or label_smoothing

    def _objective(self):
        return objectives.DPO(self.beta, self.loss_type, self.label_smoothing, self.discopop_tau)

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
                ref_input: Tensor | None = None, ref_weight: Tensor | None = None,
                ref_bias: Tensor | None = None):  # fmt: skip
        """As in LigerFusedLinearSimPOLoss; ref_input [2B, T, D'], ref_weight [V, D'], ref_bias [V] of the reference
        model. logps are sums, or means per token with `average_log_prob`."""
        reference = (ref_input, ref_weight, ref_bias) if self.use_ref_model else None
        return self._run(lin_weight, _input, target, bias, self._objective(), alpha=self.alpha,
                         compute_nll_loss=self.compute_nll_loss, average=self.average_log_prob,
                         reference=reference)  # fmt: skip


class LigerFusedLinearKTOLoss(torch.nn.Module):
    """1 - s(+-beta (lp - ref - kl)) per sequence, + for desirable ones; the input comes before the weight.

    use_ref_model=False means a reference log-prob of 0. Unlike objectives.KTO, a negative `kl` counts as it is.
    """

    def __init__(self, ignore_index: int = -100, beta: float = 0.1, compiled: bool = True, use_ref_model: bool = False,
                 average_log_prob: bool = False, chunk_size: int = 1):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.compiled, self.use_ref_model = ignore_index, beta, compiled, use_ref_model
        self.average_log_prob, self.chunk_size = average_log_prob, chunk_size

    def forward(self, _input: Tensor, lin_weight: Tensor, target: Tensor, bias: Tensor | None = None,
                preference_labels: Tensor | None = None, ref_input: Tensor | None = None,
                ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
                kl: Tensor | float | None = None):  # fmt: skip
        """_input [B, T, D], lin_weight [V, D], target [B, T], preference_labels [B] bool (True = desirable), kl a
        number, one element or [B] -> (loss [] mean over sequences, (chosen_logps_sum, rejected_logps_sum,
        chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum, rejected_rewards_sum)), all []."""
        op, b = type(self).__name__, target.shape[0]
        if preference_labels is None or preference_labels.dtype != torch.bool or preference_labels.shape != (b,):
            got = "None" if preference_labels is None else f"{preference_labels.dtype} {list(preference_labels.shape)}"
            raise ValueError(f"[{op}] preference_labels: expected bool [{b}], got {got}.")
        if isinstance(kl, Tensor) and kl.numel() not in (1, b):
            raise ValueError(f"[{op}] kl: expected a number, one element or [{b}], got {list(kl.shape)}.")
        kl = 0.0 if kl is None else kl.detach().float().flatten() if isinstance(kl, Tensor) else kl
        packed = pack(op, _input, target, self.ignore_index)
        reference = 0.0
        if self.use_ref_model:
            reference = _reference_sums(op, ref_input, ref_weight, ref_bias, target, self.ignore_index)
        objective = objectives.KTO(self.beta)
        label = preference_labels.float() * 2 - 1

        def scaled(logprob, length):
            return logprob / length.clamp(min=1) if self.average_log_prob else logprob

        def losses(logprob, length):
            ratios = scaled(logprob - reference, length)
            return objective(ratios, length, torch.zeros_like(ratios) + kl, reward=label)

        out = preference_loss(packed.hidden, lin_weight, packed.target, packed.cu_seqlens, losses, bias=bias)
        logprob = out.logprob.detach()
        logps, rewards = scaled(logprob, out.length), self.beta * scaled(logprob - reference, out.length)

        def split(x):
            return x[preference_labels].sum(), x[~preference_labels].sum()

        logits = [
            _sum_of_all_logits(_input[rows], lin_weight, bias) for rows in (preference_labels, ~preference_labels)
        ]
        return out.loss, (*split(logps), *logits, *split(rewards))
