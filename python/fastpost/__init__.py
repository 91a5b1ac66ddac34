# SPDX-License-Identifier: Apache-2.0
"""fastpost: fused losses and kernels for post-training LLMs.

Names load on first use, so `import fastpost` costs about a millisecond; the ops need torch and the compiled core, and
nothing else.
"""

from fastpost import lazy

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "token_logprob": "fastpost.ops.token_logprob",
    "linear_logprob": "fastpost.ops.linear_logprob",
    "preference_loss": "fastpost.ops.preference_loss",
    "preference_loss_from_logprob": "fastpost.ops.preference_loss",
    "PreferenceOutput": "fastpost.ops.preference_loss",
    "policy_loss": "fastpost.ops.policy_loss",
    "policy_loss_from_logprob": "fastpost.ops.policy_loss",
    "PolicyOutput": "fastpost.ops.policy_loss",
    "int4_gemm": "fastpost.ops.int4_gemm",
    "int4_quantize": "fastpost.int4",
    "Int4Weight": "fastpost.int4",
    "moe_route": "fastpost.ops.moe_route",
    "moe_plan": "fastpost.ops.moe_route",
    "moe_dispatch": "fastpost.ops.moe_dispatch",
    "moe_combine": "fastpost.ops.moe_combine",
    "grouped_gemm": "fastpost.ops.grouped_gemm",
    "kv_factorize": "fastpost.ops.kv_factorize",
    "kv_project": "fastpost.ops.kv_factorize",
    "KVFactors": "fastpost.ops.kv_factorize",
    "kv_landmarks": "fastpost.ops.kv_landmarks",
    "kv_select": "fastpost.ops.kv_select",
    "kv_reconstruct": "fastpost.ops.kv_reconstruct",
    "paged_attention": "fastpost.ops.paged_attention",
    "ShadowCache": "fastpost.generate.shadow",
}
_MODULES = ("nn", "objectives", "parallel", "reference")

__all__ = [*_HOME, *_MODULES]

__getattr__, __dir__ = lazy.names(__name__, _HOME, _MODULES)
