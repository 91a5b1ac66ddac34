# SPDX-License-Identifier: Apache-2.0
"""Modules made of fastpost's ops. They load on first use, as `fastpost` itself does."""

from fastpost import lazy

_HOME = {  # public name -> module that defines it
    "DecodeLinear": "fastpost.nn.decode_linear",
    "Int4Experts": "fastpost.nn.int4_experts",
    "Int4Linear": "fastpost.nn.int4_linear",
    "MoA": "fastpost.nn.moa",
    "MoE": "fastpost.nn.moe",
    "Router": "fastpost.nn.moe",
    "ShiftedInt4Linear": "fastpost.nn.int4_shifted",
    "quantize_linears": "fastpost.nn.int4_linear",
    "restore_linear": "fastpost.nn.decode_linear",
    "router_loss": "fastpost.nn.moe",
    "use_decode_linear": "fastpost.nn.decode_linear",
}

__all__ = [*_HOME]

__getattr__, __dir__ = lazy.names(__name__, _HOME)
