# SPDX-License-Identifier: Apache-2.0
"""The methods by name: which bits and groups they do, what they need, and the call for one matrix."""

from __future__ import annotations

import difflib
import zlib
from dataclasses import dataclass

import torch

from .billm import billm
from .db_llm import db_llm
from .gptq import gptq
from .grid import Grid, Quantized, check_groups
from .ir_qlora import ir_qlora
from .nf4 import nf4
from .pb_llm import pb_llm
from .quip import quip
from .rtn import rtn

ALL = tuple(range(1, 9))
FORMATS = ("fastpost", "gptq", "awq", "bf16")


@dataclass(frozen=True)
class Method:
    """What a method does. group_size: its default, None where it has no groups to choose. needs: "nothing", "moments"
    (a Hessian for each matrix) or "block" (the block's activations: scales are moved). int4: it makes Int4Weights."""

    bits: tuple[int, ...]
    default_bits: int
    group_size: int | None
    needs: str
    int4: tuple[str, ...] = ()


METHODS = {
    "rtn": Method(ALL, 4, 128, "nothing", ("fastpost", "gptq", "awq")),
    "gptq": Method(ALL, 4, 128, "moments", ("fastpost", "gptq", "awq")),
    "awq": Method(ALL, 4, 128, "block", ("fastpost", "gptq", "awq")),
    "nf4": Method((4,), 4, 64, "nothing", ("fastpost",)),
    "smoothquant": Method((4, 6, 8), 8, None, "block"),
    "quip": Method(ALL, 2, None, "moments"),
    "pb-llm": Method((1,), 1, None, "moments"),
    "billm": Method((1,), 1, None, "moments"),
    "db-llm": Method((2,), 2, 128, "nothing"),
    "ir-qlora": Method((4,), 4, 64, "nothing"),
}


@dataclass(frozen=True)
class Settings:
    """One way to quantise a model; `settings(...)` fills in what a method says by itself.

    Fields:
        method, bits, group_size: -1: one scale a row; None for methods without a choice.
        format: how the folder is written, one of FORMATS.
        symmetric: grids around 0 without zero points (rtn, gptq, awq).
        act_order: gptq's order of columns.
        double_quant: nf4's scales in eight bits.
        damping: share of the mean diagonal (gptq, pb-llm, billm).
        alpha: smoothquant's share of difficulty that goes to the weights.
        binary_share: pb-llm's share of binarised weights.
        seed: of quip's rotations and of the choice of calibration rows.
    """

    method: str
    bits: int
    group_size: int | None
    format: str
    symmetric: bool = False
    act_order: bool = False
    double_quant: bool = False
    damping: float = 0.01
    alpha: float = 0.5
    binary_share: float = 0.9
    seed: int = 2

    @property
    def needs(self) -> str:
        return METHODS[self.method].needs

    def grid(self) -> Grid:
        # Folders of GPTQ and AWQ hold float16 scales; ours hold bfloat16, whose range nothing exceeds.
        return Grid(self.bits, self.symmetric, torch.float16 if self.format in ("gptq", "awq") else torch.bfloat16)

    def says(self) -> str:
        """One line for people."""
        group = {None: "", -1: ", one scale a row"}.get(self.group_size, f", groups of {self.group_size}")
        extra = [word for word in ("symmetric", "act_order", "double_quant") if getattr(self, word)]
        return f"{self.method}, {self.bits} bit{'s' * (self.bits > 1)}{group}{''.join(f', {word}' for word in extra)}"


OWN_OPTIONS = {
    "symmetric": ("rtn", "gptq", "awq"),
    "act_order": ("gptq",),
    "double_quant": ("nf4",),
    "damping": ("gptq", "pb-llm", "billm"),
    "alpha": ("smoothquant",),
    "binary_share": ("pb-llm",),
}
"""Options that only some methods have."""


def settings(
    method: str, bits: int | None = None, group_size: int | None = None, format: str | None = None, seed: int = 2,
    **options,
) -> Settings:  # fmt: skip
    """Settings with a method's defaults for what is None.

    Raises:
        ValueError: a method that does not exist, bits or a format that it does not do, an option that it does not have.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"quantize: --method: expected one of {', '.join(METHODS)}, got {method!r}.{hint}")
    kind = METHODS[method]
    bits = kind.default_bits if bits is None else bits
    if bits not in kind.bits:
        does = f"{kind.bits[0]} to {kind.bits[-1]}" if kind.bits == ALL else " or ".join(map(str, kind.bits))
        others = [name for name, m in METHODS.items() if bits in m.bits]
        hint = f" {bits} bits: {', '.join(others)}." if others else ""
        raise ValueError(f"quantize: --bits: {method} does {does} bits, got {bits}.{hint}")
    if group_size is not None and kind.group_size is None:
        raise ValueError(f"quantize: --group-size: {method} has no groups to choose. Leave it out.")
    group_size = kind.group_size if group_size is None else group_size
    if group_size is not None:
        check_groups("quantize", group_size, 0)
    options = {name: value for name, value in options.items() if value is not None and value is not False}
    for name in options:
        if method not in OWN_OPTIONS[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"quantize: {flag}: {method} has no such option. Leave it out; {flag} is for "
                             f"{', '.join(OWN_OPTIONS[name])}.")  # fmt: skip
    for name, low, high in (("damping", 0, None), ("alpha", 0, 1), ("binary_share", 0, 1)):
        value = options.get(name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            limits = f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"quantize: --{name.replace('_', '-')}: expected {limits}, got {value:g}.")
    in_groups = bits == 4 and group_size is not None and (group_size == -1 or group_size % 32 == 0)
    possible = (*(kind.int4 if in_groups else ()), "bf16")
    if options.get("act_order"):
        possible = tuple(f for f in possible if f != "awq")
    format = possible[0] if format is None else format
    if format not in possible:
        why = f"{method} with {bits} bits" + ("" if group_size is None else f" and groups of {group_size}")
        raise ValueError(
            f"quantize: --format: {why} can be written as {' or '.join(possible)}, got {format!r}."
            + (" AWQ's format has no column order: leave --act-order out." if options.get("act_order") else "")
        )
    if format == "awq" and options.get("symmetric"):
        raise ValueError("quantize: --format: awq's format has zero points. Leave --symmetric out, or take gptq.")
    return Settings(method, bits, group_size, format, seed=seed, **options)


def quantize_matrix(how: Settings, name: str, weight: torch.Tensor, hessian: torch.Tensor | None) -> Quantized:
    """One matrix by a method that works on matrices; awq and smoothquant take whole blocks (run.py).

    Raises:
        ValueError: naming the matrix, whatever the method found wrong.
    """
    group_size = how.group_size
    calls = {
        "rtn": lambda: rtn(weight, how.grid(), group_size),
        "gptq": lambda: gptq(weight, hessian, how.grid(), group_size, act_order=how.act_order, damping=how.damping),
        "nf4": lambda: nf4(weight, group_size, double_quant=how.double_quant),
        "quip": lambda: quip(weight, hessian, how.bits, seed=how.seed + zlib.crc32(name.encode())),
        "pb-llm": lambda: pb_llm(weight, hessian, binary_share=how.binary_share, damping=how.damping),
        "billm": lambda: billm(weight, hessian, damping=how.damping),
        "db-llm": lambda: db_llm(weight, group_size),
        "ir-qlora": lambda: ir_qlora(weight, group_size),
    }
    try:
        return calls[how.method]()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
