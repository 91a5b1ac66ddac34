# SPDX-License-Identifier: Apache-2.0
"""Int4Linear: torch.nn.Linear with a weight in four bits, for inference and for training what lies around it.

layer = fastpost.nn.Int4Linear.from_linear(linear, group_size=64, scheme="nf4", double_quant=True)
fastpost.nn.quantize_linears(model, group_size=128)             # every linear layer of a model but its head
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from fastpost.int4 import Int4Weight, int4_quantize
from fastpost.nn.int4_packed import Packed, nothing
from fastpost.ops.int4_gemm import int4_gemm


class Int4Linear(Packed, nn.Linear):
    """``y = x Wᵀ + bias`` for W [out_features, in_features] in four bits (fastpost.Int4Weight).

    x [..., in_features] float32, bfloat16 or float16 (under autocast: autocast's dtype) -> [..., out_features], of the
    same dtype. Differentiable in x and bias. A subclass of nn.Linear, so that whoever looks for linear layers by their
    type finds it, but with `weight` None: reading it must fail, not make the matrix. Use dequantize().

    A new layer is W = 0, on the meta device without memory: load a state_dict, or use from_linear and from_int4. Moving
    the model to another dtype (.to, .half, .float, .bfloat16) converts the bias alone.

    Args:
        group_size: consecutive columns that share a scale, a multiple of 32; -1: one scale a row.
        scheme: "symmetric", "asymmetric" or "nf4".
        scales_dtype: float32, bfloat16 or float16; None: bfloat16, and float32 for nf4.
        double_quant: nf4's scales in eight bits.
        act_order: the columns are stored in an order of their own (GPTQ's desc_act).
        dtype: of the bias.

    Raises:
        ValueError: sizes below 1, a group size or scheme that does not exist, double_quant for another scheme than nf4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        scheme: str = "symmetric",
        scales_dtype: torch.dtype | None = None,
        double_quant: bool = False,
        act_order: bool = False,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # nn.Linear's own would make the matrix
        if in_features < 1 or out_features < 1:
            raise ValueError(f"[Int4Linear] expected at least one column and row, got {[out_features, in_features]}.")
        self.in_features, self.out_features = in_features, out_features
        self._hold(
            nothing("Int4Linear", out_features, in_features, group_size=group_size, scheme=scheme,
                    scales_dtype=scales_dtype, double_quant=double_quant, act_order=act_order, device=device)
        )  # fmt: skip
        with torch.device(device if device is not None else torch.get_default_device()):
            self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int = 128,
        scheme: str = "symmetric",
        *,
        scales_dtype: torch.dtype | None = None,
        double_quant: bool = False,
    ) -> Int4Linear:
        """The layer with the weight of `linear` to nearest (fastpost.int4_quantize, whose arguments these are), on its
        device, and with its very bias. A layer on the meta device gives one there.

        Raises:
            ValueError: not an nn.Linear with a float weight, NaN or infinity in it; see also int4_quantize.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, Int4Linear):
            raise ValueError(f"[Int4Linear] linear: expected a torch.nn.Linear, got {type(linear).__name__}.")
        options = {"group_size": group_size, "scheme": scheme, "scales_dtype": scales_dtype,
                   "double_quant": double_quant}  # fmt: skip
        if linear.weight.is_meta:
            made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", **options)
            made.bias = linear.bias
            return made.train(linear.training)
        return cls.from_int4(int4_quantize(linear.weight, **options), linear.bias).train(linear.training)

    @classmethod
    def from_int4(cls, weight: Int4Weight, bias: torch.Tensor | None = None) -> Int4Linear:
        """The layer that holds `weight` [N, K] and `bias` [N] as they are. Raises ValueError as Int4Weight.check."""
        weight.check("Int4Linear")
        if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != (len(weight.codes),)):
            raise ValueError(f"[Int4Linear] bias: expected floats [{len(weight.codes)}], got {bias.dtype} "
                             f"{list(bias.shape)}.")  # fmt: skip
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.out_features, made.in_features = weight.shape
        made._hold(weight)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        made.register_parameter("bias", bias)
        return made

    def replace_weight(self, weight: Int4Weight) -> None:
        """Hold another W of the same shape, in any format. Raises ValueError for another shape."""
        weight.check("Int4Linear")
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"[Int4Linear] weight: expected {[self.out_features, self.in_features]}, got "
                             f"{list(weight.shape)}.")  # fmt: skip
        self._hold(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return int4_gemm(x, self.packed, None if self.bias is None else self.bias.to(x.dtype))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W [out_features, in_features]: float32 arithmetic, rounded once to `dtype`."""
        return self.packed.dequantize(dtype)

    def to_linear(self, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
        """An nn.Linear with the dequantised weight, which requires no gradient, and this very bias."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        made.bias = self.bias
        return made.train(self.training)

    def reset_parameters(self) -> None:
        """Nothing: there is no random four-bit weight to begin from."""

    def extra_repr(self) -> str:
        words = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        return ", ".join(words + self.format_words())


# ---- whole models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """What quantize_linears did: the layers' names, their bytes before and after, and the relative error of all their
    weights together, |W' - W| / |W| by Frobenius norms (None on the meta device)."""

    names: list[str]
    bytes_before: int
    bytes_after: int
    error: float | None

    def line(self) -> str:
        error = "" if self.error is None else f", relative error of the weights {self.error:.4f}"
        return (
            f"{len(self.names)} linear layers in four bits: {self.bytes_before / 1e6:.1f} -> "
            f"{self.bytes_after / 1e6:.1f} MB{error}"
        )


def quantize_linears(
    model: nn.Module,
    *,
    group_size: int = 128,
    scheme: str = "symmetric",
    scales_dtype: torch.dtype | None = None,
    double_quant: bool = False,
    skip: Collection[str] | None = None,
    device: torch.device | str | None = None,
    kind: type[Int4Linear] = Int4Linear,
) -> Quantized:
    """Replace the linear layers of `model` by Int4Linear, one at a time and in place; options as in from_linear.

    skip: names of layers to leave, whole ("lm_head") or last parts ("gate"). None: the output head of a transformers
    model, which losses need as a matrix. Only layers that are exactly nn.Linear are meant, each once; a weight that is
    tied to something else (an embedding) is left. device: where to quantise; the result stays where the layer was.
    kind: the class whose from_linear is called.

    Raises:
        ValueError: as from_linear does, naming the layer; a name of `skip` that no linear layer has; no linear layer.
    """
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    if skip is None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        left = {name for name, m in layers.items() if m is head}
    else:
        found = {word: {n for n in layers if n == word or n.endswith(f".{word}")} for word in skip}
        if missing := sorted(word for word, names in found.items() if not names):
            raise ValueError(f"[quantize_linears] skip: expected names of linear layers, got {missing[0]!r}.")
        left = set().union(*found.values())
    owners: dict[int, int] = {}
    for m in model.modules():
        for p in m.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    names = [n for n, m in layers.items() if n not in left and owners[id(m.weight)] == 1]
    if not names:
        raise ValueError(f"[quantize_linears] model: expected linear layers, found none in {type(model).__name__}.")
    before, after, wrong, total = 0, 0, 0.0, 0.0
    for name in names:
        linear = layers[name]
        home, weight = linear.weight.device, linear.weight.detach()
        if device is not None and not linear.weight.is_meta:
            weight = weight.to(device)
        alone = nn.Linear(1, 1, bias=False, device="meta")
        alone.in_features, alone.out_features = linear.in_features, linear.out_features
        alone.weight, alone.bias = nn.Parameter(weight, requires_grad=False), linear.bias
        try:
            made = kind.from_linear(alone, group_size, scheme, scales_dtype=scales_dtype, double_quant=double_quant)
        except ValueError as error:
            raise ValueError(f"[quantize_linears] {name}: {error}") from None
        if not weight.is_meta:
            exact = weight.float()
            wrong += float((made.dequantize() - exact).norm()) ** 2
            total += float(exact.norm()) ** 2
        bytes_ = sum(getattr(made, n).nbytes for n in made.packed_names if getattr(made, n) is not None)
        before, after = before + weight.nbytes, after + bytes_
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made.to(home).train(linear.training))
    return Quantized(names, before, after, (wrong / total) ** 0.5 if total else None)
