# SPDX-License-Identifier: Apache-2.0
"""transformers' door for quantised models, with quant_method "fastpost".

    import fastpost.hf                                                     # registers it
    model = AutoModelForCausalLM.from_pretrained(folder)                   # a folder that fastpost wrote
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=fastpost.hf.Int4Config("nf4", 64))
    model.save_pretrained(out)

In config.json: scheme, group_size, scales_dtype, double_quant and act_order of all quantised layers; what differs in
some of them under `layers`, by name; and under `skip` the linear layers that are not quantised.
"""

from __future__ import annotations

from collections import Counter

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastpost.int4 import SCHEMES, Int4Weight, check_group_size
from fastpost.nn import Int4Experts, Int4Linear, ShiftedInt4Linear, quantize_linears

METHOD = "fastpost"
_DTYPES = ("float32", "bfloat16", "float16")
_FIELDS = ("scheme", "group_size", "scales_dtype", "double_quant", "act_order")


class Int4Config(QuantizationConfigMixin):
    """How the linear layers of a model are in four bits; arguments as those of fastpost.int4_quantize.

    skip: names of linear layers that are not (None, only when a model is quantised on loading: its output head).
    layers: {name: {field: value}} where a layer differs. Raises ValueError for a field or value that does not exist.
    """

    def __init__(
        self,
        scheme: str = "symmetric",
        group_size: int = 128,
        *,
        scales_dtype: str | torch.dtype | None = None,
        double_quant: bool = False,
        act_order: bool = False,
        skip: list[str] | None = None,
        layers: dict[str, dict] | None = None,
        **other,
    ):
        if other.pop("quant_method", METHOD) != METHOD or other:
            raise ValueError(
                f"[hf] quantization_config: expected {', '.join(_FIELDS)}, skip and layers, got "
                f"{', '.join(sorted(other)) or 'another quant_method'}. Was it written by a newer fastpost?"
            )
        self.quant_method = METHOD
        if isinstance(scales_dtype, torch.dtype):
            scales_dtype = str(scales_dtype).removeprefix("torch.")
        self.scheme, self.group_size, self.scales_dtype = scheme, group_size, scales_dtype
        self.double_quant, self.act_order = double_quant, act_order
        self.skip, self.layers = skip, layers or {}
        for name in (None, *self.layers):
            self._check(name)

    def of(self, name: str | None) -> dict:
        """The five fields of a layer."""
        found = {field: getattr(self, field) for field in _FIELDS}
        return found | self.layers.get(name, {})

    def _check(self, name: str | None) -> None:
        fields = self.of(name)
        where = "[hf] quantization_config" + (f": layers: {name}" if name else "")
        for field, value, choices in (
            ("scheme", fields["scheme"], SCHEMES), ("scales_dtype", fields["scales_dtype"], (*_DTYPES, None)),
            ("field", next((f for f in fields if f not in _FIELDS), "scheme"), _FIELDS),
        ):  # fmt: skip
            if value not in choices:
                raise ValueError(f"{where}: {field}: expected {', '.join(map(str, choices))}, got {value!r}.")
        check_group_size(where[1:].replace("]", ""), fields["group_size"], 1 << 20)
        if fields["double_quant"] and fields["scheme"] != "nf4":
            raise ValueError(f"{where}: double_quant: expected the scheme nf4, got {fields['scheme']!r}.")


def config_of(weights: dict[str, Int4Weight], skip: list[str]) -> Int4Config:
    """The configuration of layers that are there: what most have, and what differs."""
    fields = {name: _fields(w) for name, w in weights.items()}
    default = dict(Counter(tuple(f.items()) for f in fields.values()).most_common(1)[0][0])
    layers = {}
    for name, found in fields.items():
        usual = default | {"group_size": check_group_size("hf", default["group_size"], weights[name].columns)}
        if odd := {f: v for f, v in found.items() if v != usual[f]}:
            layers[name] = odd
    return Int4Config(**default, skip=sorted(skip), layers=layers)


def _fields(w: Int4Weight) -> dict:
    dtype = "float32" if w.nested is not None else str(w.scales.dtype).removeprefix("torch.")
    return {"scheme": w.scheme, "group_size": w.group_size, "scales_dtype": dtype,
            "double_quant": w.nested is not None, "act_order": w.order is not None}  # fmt: skip


class Int4Quantizer(HfQuantizer):
    """Puts Int4Linear in the place of linear layers: before weights come that are in four bits, or after others."""

    requires_calibration = False
    quantization_config: Int4Config
    written: dict[str, torch.Tensor] | None = None
    """What save_pretrained writes instead of the model's own tensors, while another format is written."""

    def validate_environment(self, *args, **kwargs):
        """Nothing is needed but what is imported already."""

    def _process_model_before_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            if self.quantization_config.act_order or self.quantization_config.layers:
                raise ValueError("[hf] quantization_config: expected no act_order and no layers for a model that is to "
                                 "be quantised, got one.")  # fmt: skip
            return model
        for name, linear in linears(model).items():
            if name in (self.quantization_config.skip or ()):
                continue
            fields = self.quantization_config.of(name)
            fields["scales_dtype"] = fields["scales_dtype"] and getattr(torch, fields["scales_dtype"])
            made = Int4Linear(linear.in_features, linear.out_features, False, device="meta", **fields)
            made.bias = linear.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            config = self.quantization_config
            dtype = config.scales_dtype and getattr(torch, config.scales_dtype)
            quantize_linears(model, group_size=config.group_size, scheme=config.scheme, scales_dtype=dtype,
                             double_quant=config.double_quant, skip=config.skip)  # fmt: skip
            model.config.quantization_config = describe(model)
        return model

    def _dequantize(self, model, dtype=None):
        for name, module in quantized(model).items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.to_linear(dtype or torch.bfloat16))
        return model

    def get_state_dict_and_metadata(self, model):
        return self.written, {}

    def is_serializable(self):
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def quantized(model: torch.nn.Module) -> dict[str, Int4Linear]:
    """The four-bit layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Int4Linear)}


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The ordinary linear layers of a model by name."""
    return {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear}


def describe(model: torch.nn.Module) -> Int4Config:
    """The quantization_config of a model that has four-bit layers. Raises ValueError when it has none."""
    layers = quantized(model)
    if shifted := [name for name, m in layers.items() if isinstance(m, ShiftedInt4Linear)]:
        raise ValueError(f"[hf] {shifted[0]}: expected layers without shifts, which no folder holds, got "
                         "ShiftedInt4Linear. Keep the adapter and quantise the base on loading.")  # fmt: skip
    if packed := [name for name, m in model.named_modules() if isinstance(m, Int4Experts)]:
        raise ValueError(f"[hf] {packed[0]}: expected experts in floats, as folders hold them, got Int4Experts. "
                         "Call fastpost.hf.dequantize_experts(model), or keep the adapter and quantise the base on "
                         "loading.")  # fmt: skip
    weights = {name: m.packed for name, m in layers.items()}
    if not weights:
        raise ValueError(f"[hf] {type(model).__name__}: expected layers in four bits, found none. Quantise it first: "
                         "fastpost.nn.quantize_linears(model).")  # fmt: skip
    return config_of(weights, list(linears(model)))


def register() -> None:
    """Make transformers know quant_method "fastpost". Once is enough; again does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(Int4Config)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(Int4Quantizer)
