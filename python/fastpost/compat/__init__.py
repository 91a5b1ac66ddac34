# SPDX-License-Identifier: Apache-2.0
"""Drop-ins: other libraries' call signatures on fastpost's ops. Change an import, keep the calls.

    fastpost.compat.liger   LigerFusedLinear{SimPO, DPO, CPO, ORPO, KTO, GRPO}Loss
    fastpost.compat.trl     ChunkedLogProbFunction, add_fused_lm_head
    fastpost.compat.cce     linear_cross_entropy of cut-cross-entropy
    fastpost.compat.torch   torch.nn.functional.linear_cross_entropy

None of these libraries is needed or touched, and none of their code is in here; their signatures are facts. Arguments
that only tune speed or memory there (chunk sizes, compile switches, filters) are accepted and change nothing here; an
argument that would change the result and has no counterpart raises a ValueError.
"""
