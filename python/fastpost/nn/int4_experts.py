# SPDX-License-Identifier: Apache-2.0
"""Int4Experts: the matrices of all experts [E, N, K] in four bits, where a mixture has had a parameter.

layer.quantize_(group_size=64, scheme="nf4")       # fastpost.nn.MoE or MoA: its experts, in place, and frozen
layer.dequantize_(torch.bfloat16)                  # parameters again
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from fastpost.int4 import Int4Weight, int4_quantize
from fastpost.nn.int4_packed import Packed, nothing
from fastpost.ops._experts import experts as mixture
from fastpost.ops._gated import gated
from fastpost.ops.grouped_gemm import grouped_gemm
from fastpost.ops.moe_combine import moe_combine
from fastpost.ops.moe_route import Plan


class Int4Experts(Packed):
    """A matrix for each expert, [experts, rows, columns] in four bits: fastpost.Int4Weight of experts · rows rows.

    Called with x, offset and grouped_gemm's order and top_k it multiplies (under autocast in its dtype), differentiably
    in x. A new one is W = 0, on the meta device without memory: load a state_dict, or use from_experts and from_int4.
    Arguments beside the sizes are those of Int4Linear.

    Raises:
        ValueError: sizes below 1, a group size or scheme that does not exist, double_quant for another scheme than nf4.
    """

    multiplies = True
    """Called with rows and offset it gives products, as do adapters around it; what holds a float weight does not."""

    def __init__(self, experts: int, rows: int, columns: int, *, group_size: int = 128, scheme: str = "symmetric",
                 scales_dtype: torch.dtype | None = None, double_quant: bool = False, act_order: bool = False,
                 device=None):  # fmt: skip
        super().__init__()
        if min(experts, rows, columns) < 1:
            raise ValueError(f"[Int4Experts] expected at least one expert, row and column, got {experts}, {rows} and "
                             f"{columns}.")  # fmt: skip
        self.experts = experts
        options = {"scales_dtype": scales_dtype, "double_quant": double_quant, "act_order": act_order}
        self._hold(nothing("Int4Experts", experts * rows, columns, group_size=group_size, scheme=scheme, device=device,
                           **options))  # fmt: skip

    @classmethod
    def from_experts(
        cls,
        weight: torch.Tensor,
        group_size: int = 128,
        scheme: str = "symmetric",
        *,
        scales_dtype: torch.dtype | None = None,
        double_quant: bool = False,
    ) -> Int4Experts:
        """Each matrix of weight [E, N, K] to nearest (fastpost.int4_quantize, whose arguments these are), on its
        device; on the meta device one without memory. Raises ValueError: not [E, N, K] floats; see int4_quantize."""
        if not isinstance(weight, torch.Tensor) or weight.ndim != 3 or not weight.is_floating_point():
            got = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise ValueError(f"[Int4Experts] weight: expected floats [E, N, K], got {got}.")
        options = {"group_size": group_size, "scheme": scheme, "scales_dtype": scales_dtype,
                   "double_quant": double_quant}  # fmt: skip
        if weight.is_meta:
            return cls(*weight.shape, device="meta", **options)
        return cls.from_int4(int4_quantize(weight.detach().flatten(0, 1), **options), weight.shape[0])

    @classmethod
    def from_int4(cls, weight: Int4Weight, experts: int) -> Int4Experts:
        """That holds `weight` [experts · N, K] as it is. Raises ValueError as Int4Weight.check, and for other rows."""
        weight.check("Int4Experts")
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        if experts < 1 or len(weight.codes) % experts or not len(weight.codes):
            raise ValueError(f"[Int4Experts] weight: expected as many rows for each of {experts} experts, got "
                             f"{len(weight.codes)}.")  # fmt: skip
        made.experts = experts
        made._hold(weight)
        return made

    @property
    def shape(self) -> torch.Size:
        """[E, N, K], as of the parameter whose place this takes."""
        return torch.Size((self.experts, self.codes.shape[0] // self.experts, self.columns))

    def forward(
        self,
        x: torch.Tensor,
        offset: torch.Tensor,
        *,
        order: torch.Tensor | None = None,
        top_k: int = 1,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x, bias = autocast(x, bias)
        return grouped_gemm(x, self.packed, offset, order=order, top_k=top_k, bias=bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[E, N, K]: float32 arithmetic, rounded once to `dtype`."""
        return self.packed.dequantize(dtype).view(self.shape)

    def extra_repr(self) -> str:
        experts, rows, columns = self.shape
        return ", ".join([f"experts={experts}, rows={rows}, columns={columns}", *self.format_words()])


# ---- computing with what may be in four bits -------------------------------------------------------------------------


def autocast(x: torch.Tensor, *others) -> tuple:
    """All tensors in autocast's dtype, where that is on, as torch does for its own products; else as they are."""
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return (x, *others)
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) else t for t in (x, *others))


def matrices(weight) -> torch.Tensor | Int4Weight | nn.Module:
    """What a mixture has for a weight, as ops take it; a module with an adapter around it stays the module."""
    return weight.packed if isinstance(weight, Int4Experts) else weight


def multiply(x: torch.Tensor, weight, offset, *, order=None, top_k: int = 1, bias=None, activation=None):
    """fastpost.grouped_gemm with a tensor, an Int4Weight, or a module that multiplies."""
    options = {"order": order, "top_k": top_k, "bias": bias}
    if not isinstance(weight, nn.Module):
        return grouped_gemm(x, weight, offset, activation=activation, **options)
    out = weight(x, offset, **options)
    return out if activation is None else gated(out, activation)


def mix(x, plan: Plan, gate, up, down, *, activation: str, recompute: bool = False) -> torch.Tensor:
    """A mixture of feed-forward experts (ops/_experts.py) of such weights. Adapters take the products one by one."""
    if not any(isinstance(w, nn.Module) for w in (up, down)):
        return mixture(x, plan, gate, up, down, activation=activation, recompute=recompute)
    hidden = multiply(x, up, plan.offset, order=plan.order, top_k=plan.place.shape[1], activation=activation)
    return moe_combine(multiply(hidden, down, plan.offset), plan, gate)


# ---- in place --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedExperts:
    """Names, bytes before and after, and |W' - W| / |W| by Frobenius norms over all (None on the meta device)."""

    names: list[str]
    bytes_before: int
    bytes_after: int
    error: float | None

    def line(self) -> str:
        error = "" if self.error is None else f", relative error of the weights {self.error:.4f}"
        return (
            f"{len(self.names)} stacks of experts in four bits: {self.bytes_before / 1e6:.1f} -> "
            f"{self.bytes_after / 1e6:.1f} MB{error}"
        )


def quantize_parameters(places: dict[str, tuple[nn.Module, str]], *, device=None, **options) -> QuantizedExperts:
    """Put Int4Experts where modules have parameters [E, N, K], one at a time: {name: (module, name there)}. Options are
    those of from_experts; device: where to quantise, the result stays where the parameter was. A module there with such
    a `weight` makes way as a whole."""
    before, after, wrong, total = 0, 0, 0.0, 0.0
    for name, (module, leaf) in places.items():
        held = getattr(module, leaf)
        weight = (held if isinstance(held, torch.Tensor) else held.weight).detach()
        home = weight.device
        if device is not None and not weight.is_meta:
            weight = weight.to(device)
        try:
            made = Int4Experts.from_experts(weight, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if not weight.is_meta:
            flat, n = replace(made.packed, scales=made.packed.float_scales(), nested=None), made.shape[1]
            for e in range(made.experts):  # one expert's matrix is float32 at a time
                theirs, part = weight[e].float(), _rows(flat, e * n, (e + 1) * n).dequantize()
                wrong += float((part - theirs).norm()) ** 2
                total += float(theirs.norm()) ** 2
        before, after = before + weight.nbytes, after + made.packed.nbytes()
        delattr(module, leaf)
        setattr(module, leaf, made.to(home).train(module.training))
    return QuantizedExperts(list(places), before, after, (wrong / total) ** 0.5 if total else None)


def _rows(weight: Int4Weight, begin: int, end: int) -> Int4Weight:
    zeros = None if weight.zeros is None else weight.zeros[begin:end]
    return replace(weight, codes=weight.codes[begin:end], scales=weight.scales[begin:end], zeros=zeros)


class InFourBits:
    """quantize_ and dequantize_ of a mixture whose experts' matrices are the parameters `expert_names`."""

    expert_names: tuple[str, str]

    def quantize_(
        self,
        *,
        group_size: int = 128,
        scheme: str = "symmetric",
        scales_dtype: torch.dtype | None = None,
        double_quant: bool = False,
    ) -> QuantizedExperts:
        """The experts' matrices to nearest in four bits, in place and frozen; arguments are fastpost.int4_quantize's.
        What trains or is sharded must be set up afterwards. Raises ValueError as int4_quantize, or when they are."""
        who = type(self).__name__
        done = [name for name in self.expert_names if not isinstance(getattr(self, name), nn.Parameter)]
        if done:
            raise ValueError(f"[{who}] {done[0]}: expected a parameter, got {type(getattr(self, done[0])).__name__}.")
        places = {f"[{who}] {name}": (self, name) for name in self.expert_names}
        found = quantize_parameters(places, group_size=group_size, scheme=scheme, scales_dtype=scales_dtype,
                                    double_quant=double_quant)  # fmt: skip
        return QuantizedExperts(list(self.expert_names), found.bytes_before, found.bytes_after, found.error)

    def dequantize_(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """Parameters again, in `dtype`, that require no gradient; nothing where they are parameters already."""
        for name in self.expert_names:
            held = getattr(self, name)
            if isinstance(held, Int4Experts):
                delattr(self, name)
                setattr(self, name, nn.Parameter(held.dequantize(dtype), requires_grad=False))
