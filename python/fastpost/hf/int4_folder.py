# SPDX-License-Identifier: Apache-2.0
"""Four-bit model folders in and out: GPTQ, AWQ, bitsandbytes NF4, compressed-tensors and fastpost's own.

    model = load_int4("Llama-3.1-8B-Instruct-GPTQ", torch.bfloat16)     # linear layers are fastpost.nn.Int4Linear
    save_int4(model, "out", format="awq", tokenizer="Llama-3.1-8B-Instruct-GPTQ")

Reading needs none of the libraries that wrote the folder and loses nothing: the dequantised weights are theirs, bit for
bit. What is not four bits in groups of a multiple of 32 columns is refused, by file and tensor.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from fastpost.hf import folder, int4_awq, int4_bitsandbytes, int4_compressed, int4_gptq, int4_quantizer
from fastpost.hf.experts import use_experts
from fastpost.hf.int4_quantizer import METHOD, config_of, describe, linears, quantized
from fastpost.hf.int4_tensors import Part, Tensors
from fastpost.int4 import Int4Weight
from fastpost.nn import Int4Linear

FORMATS = {m.METHOD: m for m in (int4_gptq, int4_awq, int4_bitsandbytes, int4_compressed)}
WRITTEN = {METHOD: None, int4_gptq.METHOD: int4_gptq, int4_awq.METHOD: int4_awq}


def quantization_of(path: str | Path) -> dict | None:
    """The quantization_config of a model folder; None for one in ordinary floats."""
    tree = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    return tree.get("quantization_config") or (tree.get("text_config") or {}).get("quantization_config")


def load_int4(path: str | Path, dtype: torch.dtype | None = None, attn_implementation: str | None = None):
    """The causal LM of a four-bit folder, in eval mode on the CPU. Its quantised layers are Int4Linear; an output head
    that is quantised becomes an ordinary matrix, which losses need. Experts, which stay floats, are computed
    by fastpost. dtype: of everything that is not quantised; None = as stored in config.json.

    Raises ValueError, naming file, tensor and remedy, for pickles, files cut short, other numbers of bits, groups that
    are no multiple of 32 columns, missing weights, and layers that this model does not have.
    """
    path = Path(path).expanduser()
    stored = quantization_of(path)
    where = f"{path / 'config.json'}: quantization_config"
    if stored is None:
        raise ValueError(f"{where}: missing, so this is no quantised model. Use fastpost.nn.quantize_linears on it.")
    method = str(stored.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in stored else ""))
    options = {"attn_implementation": attn_implementation, "dtype": dtype or "auto"}
    int4_quantizer.register()
    if method == METHOD:
        Tensors(path)  # whole files only
        model, report = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True,
            **options,
        )  # fmt: skip
        for name, layer in quantized(model).items():
            layer.packed.check(f"{path}: {name}")
    elif method in FORMATS:
        FORMATS[method].check(stored, where)
        model, report = _foreign(path, FORMATS[method], stored, options)
    else:
        raise ValueError(f"{where}: quant_method: expected {', '.join([METHOD, *FORMATS])}, got {method!r}. Quantise "
                         "the original model again in one of these.")  # fmt: skip
    for what in ("missing_keys", "mismatched_keys"):
        if report[what]:
            key = sorted(str(k[0] if isinstance(k, tuple) else k) for k in report[what])[0]
            raise ValueError(
                f"{path}: tensor '{key}': {what.split('_')[0]} ({len(report[what])} in all). Weights and config.json "
                "do not fit. Fetch the folder again."
            )
    use_experts(model, quiet=True)
    return model.eval()


def read_layers(path: Path, form, stored: dict, shapes: dict[str, tuple[int, int]]) -> tuple[dict, dict]:
    """({name: Int4Weight} of the quantised layers, {key: tensor} of everything else) of a folder in a foreign format.
    shapes: [N, K] of the model's linear layers."""
    tensors = Tensors(path)
    for ending, what in getattr(form, "REFUSED", {}).items():
        if found := next((key for key in tensors.keys() if key.endswith(ending)), None):  # noqa: SIM118
            raise ValueError(f"{tensors.where(found)}: expected bitsandbytes in NF4, got {what}. Quantise the original "
                             "model again with bnb_4bit_quant_type='nf4'.")  # fmt: skip
    names = [key.removesuffix(form.ANCHOR) for key in tensors.keys() if key.endswith(form.ANCHOR)]  # noqa: SIM118
    if not names:
        raise ValueError(f"{path}: expected tensors named *{form.ANCHOR}, as {form.METHOD} writes them, found none. "
                         "Its config.json says that it is quantised.")  # fmt: skip
    weights = {}
    for name in names:
        if name not in shapes:
            raise ValueError(
                f"{tensors.where(name + form.ANCHOR)}: this model has no linear layer '{name}' (experts that "
                "transformers stacks into one tensor are none), so it cannot stay in four bits. Take the original "
                "model."
            )
        weights[name] = form.read(Part(tensors, name, shapes[name]), stored)
    taken = {name + suffix for name in names for suffix in form.SUFFIXES}
    rest = {key: tensors.get(key) for key in tensors.keys() if key not in taken}  # noqa: SIM118
    return weights, rest


def _foreign(path: Path, form, stored: dict, options: dict):
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    layers, head = linears(shape), shape.get_output_embeddings()
    shapes = {name: (m.out_features, m.in_features) for name, m in layers.items()}
    weights, state = read_layers(path, form, stored, shapes)
    if heads := [name for name, m in layers.items() if m is head and name in weights]:
        kind = options["dtype"] if isinstance(options["dtype"], torch.dtype) else config.dtype or torch.bfloat16
        state[f"{heads[0]}.weight"] = weights.pop(heads[0]).dequantize(kind)
    for name, weight in weights.items():
        state |= Int4Linear.from_int4(weight).state_dict(prefix=f"{name}.")
    config.quantization_config = config_of(weights, [n for n in layers if n not in weights]).to_dict()
    model, report = type(shape).from_pretrained(
        None, config=config, state_dict=state, trust_remote_code=False, output_loading_info=True, **options
    )
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    model.config._name_or_path = str(path)
    return model, report


def save_int4(
    model: torch.nn.Module, out: str | Path, *, format: str = METHOD, tokenizer: str | Path | None = None
) -> Path:
    """Write a model with Int4Linear layers as a Hugging Face folder. It is whole or absent, and nothing is overwritten.

    format: "fastpost" holds every scheme; "gptq" and "awq" hold symmetric and asymmetric codes, with their scales in
    float16, for the libraries that read these. tokenizer: a folder whose tokenizer files are copied.

    Raises ValueError when `out` exists and is not empty, when the model has no four-bit layer, and, naming the layer,
    for what the format cannot hold without a change.
    """
    if format not in WRITTEN:
        raise ValueError(f"[save_int4] format: expected {', '.join(WRITTEN)}, got {format!r}.")
    own, out, layers = describe(model), Path(out), quantized(model)
    weights = {name: _on_cpu(layer.packed) for name, layer in layers.items()}
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    if format == METHOD:
        written = own.to_dict()
    else:
        tensors, written = WRITTEN[format].tensors(weights)
        if format == int4_awq.METHOD:
            written["modules_to_not_convert"] = own.skip
        packed = {f"{n}.{p}" for n, layer in layers.items() for p, _ in layer.named_parameters() if p != "bias"}
        state = {key: tensor for key, tensor in state.items() if key not in packed} | tensors
    with folder.written_aside(out) as aside:
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None:  # it is asked instead of the argument
            quantizer.written = state
        try:
            model.save_pretrained(aside, state_dict=state)
        finally:
            if quantizer is not None:
                quantizer.written = None
        file = aside / "config.json"
        tree = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": written}
        file.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            folder.copy_tokenizer(Path(tokenizer), aside)
        for weights_file in aside.glob("*.safetensors"):  # written for the owner alone, unlike every other file
            weights_file.chmod(file.stat().st_mode & 0o777)
    return out


def _on_cpu(weight: Int4Weight) -> Int4Weight:
    return weight.to("cpu")
