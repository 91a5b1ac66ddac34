# SPDX-License-Identifier: Apache-2.0
"""transformers through its official doors only: folders in and out, packed attention, backbone and head.

Importing this makes transformers know the quant_method "fastpost" (hf/int4_quantizer.py), where transformers is there.
"""

import importlib.util

from fastpost import lazy

_HOME = {  # public name -> module that defines it
    "load_int4": "fastpost.hf.int4_folder",
    "save_int4": "fastpost.hf.int4_folder",
    "Int4Config": "fastpost.hf.int4_quantizer",
}

__all__ = [*_HOME]

__getattr__, __dir__ = lazy.names(__name__, _HOME)


def _register() -> None:
    if importlib.util.find_spec("transformers") is not None:
        from fastpost.hf.int4_quantizer import register

        register()


_register()
