# SPDX-License-Identifier: Apache-2.0
"""Public names that load on first use, so that importing a package costs next to nothing."""

import importlib
import sys
from collections.abc import Callable


def names(package: str, home: dict[str, str], modules: tuple[str, ...] = ()) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of a package, from the module that defines each name, and its submodules."""
    found = vars(sys.modules[package])

    def get(name: str):
        if name in home:
            value = getattr(importlib.import_module(home[name]), name)
        elif name in modules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        found[name] = value
        return value

    return get, lambda: sorted({*found, *home, *modules})
