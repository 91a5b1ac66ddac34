# SPDX-License-Identifier: Apache-2.0
"""Modules made of fastpost's ops. They load on first use, as `fastpost` itself does."""

import importlib

_HOME = {  # public name -> module that defines it
    "Int4Linear": "fastpost.nn.int4_linear",
    "ShiftedInt4Linear": "fastpost.nn.int4_shifted",
    "quantize_linears": "fastpost.nn.int4_linear",
}

__all__ = [*_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'fastpost.nn' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
