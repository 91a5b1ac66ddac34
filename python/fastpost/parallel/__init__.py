# SPDX-License-Identifier: Apache-2.0
"""Log-probs from an output head whose weight is spread over ranks, so that no rank holds it whole.

fastpost.preference_loss_from_logprob makes losses of them, as of any log-probs.
"""

from fastpost.parallel.fsdp import fsdp_head_logprob
from fastpost.parallel.vocab import vocab_parallel_logprob

__all__ = ["fsdp_head_logprob", "vocab_parallel_logprob"]
