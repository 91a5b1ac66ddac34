# SPDX-License-Identifier: Apache-2.0
"""LoRA on layers in four bits, by peft's door for layers of one's own; and merging it, into floats or four bits again.

peft takes Int4Linear for the linear layer that it is, so training needs none of this. Merging does: `register` makes
peft wrap it in Int4LoraLinear, whose merge() makes new codes. Connections (IR-QLoRA) are here, too.

    config = peft.LoraConfig(...); int4_lora.register(config); peft.get_peft_model(model, config)
    merged(model)                    # floats: what training saw, W' + scale B A, and nothing is rounded again
    requantized(model, like)         # four bits again, in the formats of the layers of `like`
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge

from fastpost.hf.int4_expert_lora import merge_into_floats
from fastpost.hf.int4_experts import quantize_experts, routers
from fastpost.int4 import int4_quantize
from fastpost.nn import Int4Linear, ShiftedInt4Linear, quantize_linears
from fastpost.nn.int4_experts import QuantizedExperts
from fastpost.nn.int4_linear import Quantized

FILE = "fastpost.json"
"""In an adapter folder: what its adapter_config.json has no words for."""


class Int4LoraLinear(LoraLinear):
    """peft's LoRA around an Int4Linear: plain LoRA (also rsLoRA, dropout), no DoRA and the like.

    merge() replaces the codes by those of W + scale B A, to nearest, in groups of the same size and scheme; `rounding`
    then is what that cost, |W'' - W'| / |W'| by Frobenius norms. unmerge() brings the former codes back, to the bit."""

    rounding: float | None = None

    @property
    def lora_variants(self):
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if not isinstance(base, Int4Linear):  # dequantised meanwhile
            return super().merge(safe_merge, adapter_names)
        names = [n for n in check_adapters_to_merge(self, adapter_names) or () if n in self.lora_A]
        if not names:
            return None
        weight = base.dequantize()
        for name in names:
            if self.lora_bias[name]:
                raise ValueError("[lora] lora_bias: expected false around a four-bit layer to merge, got true.")
            weight += self.get_delta_weight(name).detach().float()
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(f"[lora] {', '.join(names)}: the merged weights hold NaN or infinity; nothing is merged.")
        self._before = base
        self.base_layer, self.rounding = requantized_layer(weight, base)
        self.merged_adapters += names
        return None

    def unmerge(self) -> None:
        if getattr(self, "_before", None) is None:
            return super().unmerge()
        self.base_layer, self._before, self.rounding = self._before, None, None
        self.merged_adapters.clear()
        return None


def requantized_layer(weight: torch.Tensor, like: Int4Linear) -> tuple[Int4Linear, float]:
    """W [N, K] float32 in the format of `like`, with its bias, and the relative error of rounding."""
    packed = like.packed
    if isinstance(like, ShiftedInt4Linear):
        linear = torch.nn.Linear(like.in_features, like.out_features, bias=False, device="meta")
        linear.weight, linear.bias = torch.nn.Parameter(weight, requires_grad=False), like.bias
        made = ShiftedInt4Linear.from_linear(linear, like.group_size, double_quant=packed.nested is not None)
    else:
        columns = weight if packed.order is None else weight.index_select(1, packed.order)
        new = int4_quantize(
            columns, group_size=packed.group_size, scheme=packed.scheme, double_quant=packed.nested is not None,
            scales_dtype=packed.scales.dtype if packed.nested is None else None,
        )  # fmt: skip
        made = Int4Linear.from_int4(_ordered(new, packed.order), like.bias)
    error = (made.dequantize() - weight).norm() / weight.norm().clamp(min=1e-30)
    return made.train(like.training), float(error)


def _ordered(weight, order):
    from dataclasses import replace

    return weight if order is None else replace(weight, order=order)


# ---- connections of IR-QLoRA -----------------------------------------------------------------------------------------


class _Connected:
    """IR-QLoRA's elastic connections: h = A(dropout(x)) + b1 pool(x), out = B(h) + b2 repeat(h), times alpha / rank.

    pool(x) [..., r] are means of in / r neighbours, repeat(h) [..., out] has each h out / r times in a row; the numbers
    b1 and b2 are trained and begin at 0, so a new adapter changes nothing. All of it is linear: merging is exact."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_connection_in", "lora_connection_out")

    def update_layer(self, adapter_name, r, *args, **kwargs):
        for what, size in (("in", self.in_features), ("out", self.out_features)):
            if size % r:
                raise ValueError(
                    f"[lora] connections: expected a rank that divides {what}puts of {size}, got {r}. Choose another "
                    "rank, or leave such layers out of targets."
                )
        if "lora_connection_in" not in self._modules:
            self.lora_connection_in, self.lora_connection_out = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        for pair in (self.lora_connection_in, self.lora_connection_out):
            pair[adapter_name] = torch.nn.Parameter(torch.zeros(1))
        super().update_layer(adapter_name, r, *args, **kwargs)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = self.lora_A[name], self.lora_B[name]
                narrow = self._cast_input_dtype(x, down.weight.dtype)
                hidden = down(self.lora_dropout[name](narrow))
                hidden = hidden + self.lora_connection_in[name] * narrow.unflatten(-1, (self.r[name], -1)).mean(-1)
                again = hidden.repeat_interleave(self.out_features // self.r[name], -1)
                out = up(hidden) + self.lora_connection_out[name] * again
                result = result + (out * self.scaling[name]).to(result.dtype)
        return result

    def get_delta_weight(self, adapter) -> torch.Tensor:
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        eye = torch.eye(len(down), dtype=down.dtype, device=down.device)
        pool = eye.repeat_interleave(self.in_features // len(down), 1) * (len(down) / self.in_features)
        repeat = eye.repeat_interleave(self.out_features // len(down), 0)
        down = down + self.lora_connection_in[adapter] * pool
        return (up + self.lora_connection_out[adapter] * repeat) @ down * self.scaling[adapter]


class ConnectedLinear(_Connected, LoraLinear):
    """peft's LoRA around an nn.Linear, with IR-QLoRA's connections."""

    @property
    def lora_variants(self):
        return {(): None}


class ConnectedInt4Linear(_Connected, Int4LoraLinear):
    """LoRA around an Int4Linear, with IR-QLoRA's connections."""


def register(config: LoraConfig, *, connections: bool = False) -> None:
    """Make peft wrap layers with the classes of this file, for this configuration."""
    config._register_custom_module({Int4Linear: ConnectedInt4Linear if connections else Int4LoraLinear})
    if connections:
        config._register_custom_module({torch.nn.Linear: ConnectedLinear})


def has_connections(model: torch.nn.Module) -> bool:
    return any(isinstance(m, _Connected) for m in model.modules())


# ---- the base of an adapter ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseFormat:
    """How the layers of an adapter's base model were quantised when it was loaded. scheme "none": they were not, or the
    folder was in four bits itself."""

    scheme: str = "none"
    group_size: int = 64
    double_quant: bool = False
    shift: bool = False

    def apply(self, model: torch.nn.Module, device: torch.device | None = None):
        """Quantise the linear layers of `model`, a transformers model, and its experts, in place, and note it there.
        Head and routers are left. None for "none"."""
        if self.scheme == "none":
            return None
        kind = ShiftedInt4Linear if self.shift else Int4Linear
        options = {"group_size": self.group_size, "scheme": self.scheme, "double_quant": self.double_quant,
                   "device": device}  # fmt: skip
        done = quantize_linears(model, kind=kind, skip=_kept(model), **options)
        experts = quantize_experts(model, **options)  # without shifts: NF4 as it is
        model.base_format = self
        return Done(done, experts)


@dataclass(frozen=True)
class Done:
    """What BaseFormat.apply did. experts: None where there are none."""

    linears: Quantized
    experts: QuantizedExperts | None

    def line(self) -> str:
        return "; ".join(part.line() for part in (self.linears, self.experts) if part is not None)


def _kept(model: torch.nn.Module) -> set[str] | None:
    """Names of linear layers that stay: None, quantize_linears' own choice, unless there are routers."""
    names = routers(model)
    if not names:
        return None
    head = model.get_output_embeddings()
    return names | {n for n, m in model.named_modules() if m is head and type(m) is torch.nn.Linear}


def base_format(model: torch.nn.Module) -> BaseFormat:
    """That of `model`, a transformers model or peft's wrapper of one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, "base_format", BaseFormat())


def read(path: Path) -> tuple[BaseFormat, bool]:
    """(base, whether there are connections) of an adapter folder. Raises ValueError for a file that is neither."""
    if not (path / FILE).is_file():
        return BaseFormat(), False
    try:
        tree = json.loads((path / FILE).read_text(encoding="utf-8"))
        return BaseFormat(**tree.pop("base", {})), bool(tree.pop("connections", False))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / FILE}: expected what fastpost writes beside an adapter, got {error}.") from None


def write(model: torch.nn.Module, out: Path) -> None:
    """The file that `read` reads, where there is something to say."""
    base, connections = base_format(model), has_connections(model)
    if base.scheme != "none" or connections:
        tree = {"base": asdict(base), "connections": connections}
        (out / FILE).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


# ---- merging ---------------------------------------------------------------------------------------------------------


def dequantized(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Every Int4Linear of `model` (with or without adapters) replaced by nn.Linear, in place; experts in four bits by
    parameters, adapters on them merged."""
    merge_into_floats(model, dtype)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, Int4Linear)]:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.to_linear(dtype))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(inner, "hf_quantizer", None) is not None:
        inner.hf_quantizer.remove_quantization_config(inner)
    return model


def formats(model: torch.nn.Module) -> dict[str, Int4Linear]:
    """{name: a layer of the same format without memory} of the four-bit layers of a model, named as without
    adapters."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {name.removesuffix(".base_layer"): m for name, m in inner.named_modules() if isinstance(m, Int4Linear)}


def requantized(model: torch.nn.Module, like: dict[str, Int4Linear]) -> float:
    """Put the linear layers of `model` that `like` names in four bits again, in the format of each, in place. Returns
    the relative error of these weights together."""
    wrong = total = 0.0
    for name, layer in like.items():
        weight = model.get_submodule(name).weight.detach().float()
        made, error = requantized_layer(weight, layer)
        size = float(weight.norm()) ** 2
        wrong, total = wrong + error**2 * size, total + size
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
    return (wrong / total) ** 0.5 if total else 0.0
