# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders in and out: safetensors only, no missing weights, the same keys and files out as came in."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from fastpost.hf import attention
from fastpost.hf.model import verify

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_tokenizer(path: str | Path):
    """The folder's own tokenizer with its own chat template, unchanged."""
    return AutoTokenizer.from_pretrained(_checked(path), local_files_only=True, trust_remote_code=False)


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, attention_name: str = "packed", *, check: bool = True
):
    """A causal LM in eval mode on the CPU, weights in `dtype`.

    Raises ValueError when the folder holds pickles instead of safetensors (nothing is unpickled), when a weight is
    missing or has another shape (transformers would draw it at random), or when the model's forward is not backbone +
    head (`verify`)."""
    path = _checked(path)
    for file in weight_files(path):
        _header(file)
    attention.register()
    name = attention.NAME if attention_name == "packed" else attention_name
    bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=name, use_safetensors=True, local_files_only=True,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    finally:
        if bar:
            hf_logging.enable_progress_bar()
    for what in ("missing_keys", "mismatched_keys"):
        if loading[what]:
            keys = sorted(str(k) for k in loading[what])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"{path}: {what.replace('_', ' ')}: {', '.join(keys[:3])}{more}. Weights and config.json do not fit."
            )
    model.eval()
    if check:
        verify(model)
    return model


def save_folder(model, source: str | Path, out: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write `model` as the folder `source` with other numbers: same keys, same shards, every other file byte for byte.

    dtype None = each tensor in the dtype it has in `source`. Written beside `out` and renamed, so `out` is whole or
    absent. Of a sharded model one rank calls this while the others call `give_parts`. Raises ValueError when `out`
    exists and is not empty."""
    source, out = _checked(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: already exists and is not empty; nothing is overwritten. Choose another folder.")
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_weights(model, source, aside, dtype)
        for file in source.iterdir():
            weights = file.suffix in (".safetensors", *PICKLED) or file.name.endswith(".index.json")
            if file.is_file() and not file.name.startswith(".") and not weights:
                shutil.copyfile(file, aside / file.name)
        if dtype is not None:
            _set_config_dtype(aside / "config.json", dtype)
        for file in aside.glob("*.safetensors"):  # written for the owner alone, unlike every other file
            file.chmod((aside / "config.json").stat().st_mode & 0o777)
        if out.exists():
            out.rmdir()
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return out


def give_parts(model, source: str | Path) -> None:
    """What the other ranks do while one is in save_folder: gather a sharded model with it, tensor by tensor."""
    headers, state, renamed = _layout(model, Path(source))
    for key in state if renamed else (key for header in headers.values() for key in header if key in state):
        _whole(state[key])


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises ValueError when there are none, naming the pickles if these are
    there."""
    files = sorted(path.glob("model*.safetensors"))
    if files:
        return files
    pickled = sorted(f.name for f in path.iterdir() if f.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"{path}: {pickled[0]} is a pickle, and reading a pickle can run any code; only safetensors is read. "
            "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)."
        )
    adapter = " It is an adapter: give the folder of its base model." if (path / "adapter_config.json").exists() else ""
    raise ValueError(f"{path}: no model*.safetensors here.{adapter}")


def _checked(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(
            f"{path}: no such folder. fastpost reads local Hugging Face folders; fetch one with "
            "`hf download ORG/NAME --local-dir DIR`."
        )
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: no config.json, so this is not a Hugging Face model folder.")
    return path


def _header(file: Path) -> dict[str, dict]:
    """{key: {"dtype", "shape"}} from a safetensors header; ValueError when the file has none (a renamed pickle)."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length)) if length < size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{file} is not a safetensors file (or was cut short). Fetch it again.")
    header.pop("__metadata__", None)
    return header


def _layout(model, source: Path) -> tuple[dict[Path, dict], dict[str, torch.Tensor], bool]:
    """(header of each file of `source`, the model's tensors, whether transformers renamed or fused tensors on the way
    in, as it does for mixtures of experts; only it knows how to undo that)."""
    headers = {file: _header(file) for file in weight_files(source)}
    wanted = {key for header in headers.values() for key in header}
    state = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return headers, state, bool(set(state) - wanted - tied)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor put together, a collective of all ranks; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _write_weights(model, source: Path, out: Path, dtype: torch.dtype | None) -> None:
    headers, state, renamed = _layout(model, source)
    wanted = {key for header in headers.values() for key in header}
    if renamed:
        kind = dtype or _dtype(next(iter(next(iter(headers.values())).values())))
        whole = ((key, _whole(value)) for key, value in state.items())
        model.save_pretrained(out, state_dict={k: v.to("cpu", kind) if v.is_floating_point() else v for k, v in whole})
        written = {key for file in out.glob("*.safetensors") for key in _header(file)}
        if written != wanted:
            missing, extra = sorted(wanted - written)[:3], sorted(written - wanted)[:3]
            raise ValueError(
                f"[save] {type(model).__name__}: keys would change: missing {missing}, new {extra}. Nothing is kept."
            )
        return
    size = 0
    for file, header in headers.items():
        with safe_open(file, "pt") as old:
            # A key the model does not have (an old buffer) keeps its value. Each tensor is copied: safetensors refuses
            # shared memory, and a folder with both halves of a tied pair stays one.
            tensors = {
                key: _whole(state[key]).to("cpu", dtype or _dtype(entry), copy=True).contiguous()
                if key in state
                else old.get_tensor(key)
                for key, entry in header.items()
            }
        size += sum(t.nbytes for t in tensors.values())
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    index = source / "model.safetensors.index.json"
    if index.exists():
        tree = json.loads(index.read_text())
        if tree.get("metadata", {}).get("total_size") == size:
            shutil.copyfile(index, out / index.name)
        else:  # another dtype, another size
            tree.setdefault("metadata", {})["total_size"] = size
            (out / index.name).write_text(json.dumps(tree, indent=2) + "\n")


def _dtype(entry: dict) -> torch.dtype:
    """The torch dtype of a safetensors header entry."""
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"}
    return getattr(torch, names.get(entry["dtype"]) or entry["dtype"].replace("I", "int"))


def _set_config_dtype(file: Path, dtype: torch.dtype) -> None:
    tree, name = json.loads(file.read_text()), str(dtype).removeprefix("torch.")
    keys = [k for k in ("dtype", "torch_dtype") if k in tree] or ["dtype"]
    if all(tree.get(k) == name for k in keys):
        return
    tree.update({k: name for k in keys})
    file.write_text(json.dumps(tree, indent=2) + "\n")
