# SPDX-License-Identifier: Apache-2.0
"""transformers through its official doors only: folders in and out, packed attention, backbone and head.

Importing this makes transformers know the quant_method "fastpost" (hf/int4_quantizer.py), where transformers is there.
"""

import importlib
import importlib.util

_HOME = {  # public name -> module that defines it
    "load_int4": "fastpost.hf.int4_folder",
    "save_int4": "fastpost.hf.int4_folder",
    "Int4Config": "fastpost.hf.int4_quantizer",
}

__all__ = [*_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'fastpost.hf' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])


def _register() -> None:
    if importlib.util.find_spec("transformers") is not None:
        from fastpost.hf.int4_quantizer import register

        register()


_register()
