# SPDX-License-Identifier: Apache-2.0
"""transformers through its official doors only: folders in and out, packed attention, backbone and head.

Importing this makes transformers know the quant_method "fastpost" (hf/int4_quantizer.py) and the experts implementation
"fastpost" (hf/experts.py), where transformers is there.
"""

import importlib.util

from fastpost import lazy

_HOME = {  # public name -> module that defines it
    "dequantize_experts": "fastpost.hf.int4_experts",
    "load_int4": "fastpost.hf.int4_folder",
    "quantize_experts": "fastpost.hf.int4_experts",
    "save_int4": "fastpost.hf.int4_folder",
    "Int4Config": "fastpost.hf.int4_quantizer",
    "use_experts": "fastpost.hf.experts",
}

__all__ = [*_HOME]

__getattr__, __dir__ = lazy.names(__name__, _HOME)


def _register() -> None:
    if importlib.util.find_spec("transformers") is not None:
        from fastpost.hf import experts, int4_quantizer

        int4_quantizer.register()
        experts.register()


_register()
