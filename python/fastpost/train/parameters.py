# SPDX-License-Identifier: Apache-2.0
"""Which parameters a recipe means: "last:4", "first:5", or a regular expression over their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from .strict import suggest


class Parameters:
    """The names of a model's parameters; tied weights are one parameter that answers to each of its names.

    `model`: a module, or (name, parameter) pairs.
    """

    def __init__(self, model: torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]]):
        module = isinstance(model, torch.nn.Module)
        pairs = list(model.named_parameters(remove_duplicate=False) if module else model)
        self._named: dict[str, torch.nn.Parameter] = {}
        self._names: dict[int, list[str]] = {}
        for name, parameter in pairs:
            if id(parameter) not in self._names:
                self._named[name] = parameter
            self._names.setdefault(id(parameter), []).append(name)
        self.layers = 1 + max((n for name in self._named if (n := layer(name)) is not None), default=-1)

    def items(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """(name, parameter), each parameter once, under its first name."""
        return self._named.items()

    def names(self, parameter: torch.nn.Parameter) -> list[str]:
        """Every name of a parameter."""
        return self._names[id(parameter)]

    def select(self, pattern: str, field: str) -> list[str]:
        """First names of the trainable parameters that `pattern` means; never empty.

        "last:N" and "first:N": the parameters of so many of the model's layers. Anything else is a regular expression,
        searched in every name. Raises ValueError that names `field` when it is none or matches nothing.
        """
        if ends := re.fullmatch(r"(first|last):(\d+)", pattern):
            which, count = ends[1], int(ends[2])
            if not 1 <= count <= self.layers:
                raise ValueError(f"[train] {field}: expected 1 to {self.layers} layers of this model, got '{pattern}'.")
            wanted = range(count) if which == "first" else range(self.layers - count, self.layers)
            found = [name for name in self._named if layer(name) in wanted]
        else:
            try:
                expression = re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"[train] {field}: expected first:N, last:N or a regular expression, got '{pattern}' ({error})."
                ) from None
            found = [name for name, p in self.items() if any(map(expression.search, self._names[id(p)]))]
        if not found:
            raise ValueError(f"[train] {field}: no parameter matches '{pattern}'.{suggest(pattern, self._words())}")
        trained = [name for name in found if self._named[name].requires_grad]
        if not trained:
            raise ValueError(
                f"[train] {field}: '{pattern}' matches {found[0]} ({len(found)} in all), but what it matches is frozen "
                "already. Leave it out, or see model.train and model.freeze."
            )
        return trained

    def _words(self) -> set[str]:
        """What names are made of, for suggestions: embed_tokens, layers, self_attn, q_proj, …"""
        return {word for names in self._names.values() for name in names for word in name.split(".")[:-1]} - {
            str(n) for n in range(self.layers)
        }


def layer(name: str) -> int | None:
    """The number of the layer that a parameter belongs to (the first number in its name), None outside of layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
