# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders in and out: safetensors only, no missing weights, the same keys and files out as came in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as hf_logging

from fastpost.hf import attention
from fastpost.hf.experts import use_experts
from fastpost.hf.model import verify
from fastpost.train.progress import waiting

FETCH = " Fetch it again: `hf download ORG/NAME --local-dir DIR`."
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip


class Place(NamedTuple):
    """What a path stands for."""

    base: Path  # a model folder: config.json and weights
    adapter: Path | None  # a peft folder to put on it
    tokenizer: Path  # the adapter's folder if it has a tokenizer of its own, else the base's


def locate(path: str | Path) -> Place:
    """`path` is a model folder, an adapter folder (its adapter_config.json names the base) or a run folder (its model/
    or adapter/). Raises ValueError saying what is missing; no weight is read."""
    path = Path(path).expanduser()
    if (path / "config.yaml").is_file():  # a run
        found = [p for p in (path / "model", path / "adapter") if p.is_dir()]
        if not found:
            raise ValueError(
                f"{path}: this run is not finished, so it has no model yet. `fastpost export {path} OUT` takes its "
                "newest checkpoint."
            )
        path = found[0]
    config = path / "adapter_config.json"
    if not config.is_file() or any(path.glob("model*.safetensors")):
        path = _checked(path)
        return Place(path, None, path)
    name = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    # A path in an adapter may be relative to the working directory (peft writes what it was given) or to the adapter.
    base = next((p for p in (Path(name).expanduser(), path / name) if name and (p / "config.json").is_file()), None)
    if base is None:
        raise ValueError(
            f"{config}: base_model_name_or_path: expected the folder of the base model, got '{name}', which is no "
            "model folder here. Set model.path to the base model and model.adapter to this folder, or write the path "
            "there."
        )
    own = (path / "tokenizer_config.json").is_file()
    return Place(base, path, path if own else base)


def load_tokenizer(path: str | Path):
    """The tokenizer of a model, adapter or run folder, with its own chat template, unchanged."""
    path = locate_tokenizer(path)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever came up
        names = sorted(f.name for f in path.iterdir() if "token" in f.name or "vocab" in f.name)
        raise ValueError(
            f"{path}: expected a tokenizer beside the model (model.path), got {', '.join(names) or 'none'} "
            f"({str(error).strip().splitlines()[0][:120]}). Fetch tokenizer.json and tokenizer_config.json, too."
        ) from None


def locate_tokenizer(path: str | Path) -> Path:
    """The folder whose tokenizer files count; `path` may also hold a tokenizer and nothing else."""
    bare = Path(path).expanduser()
    alone = (bare / "tokenizer_config.json").is_file()
    alone &= not any((bare / name).is_file() for name in ("adapter_config.json", "config.json"))
    return bare if alone else locate(bare).tokenizer


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, attention_name: str = "packed", *, check: bool = True
):
    """A causal LM in eval mode on the CPU, weights in `dtype`; those of a four-bit folder as they are (int4_folder.py).
    Mixtures of experts that hf/experts.py knows are computed by fastpost.

    Raises ValueError when the folder holds pickles instead of safetensors (nothing is unpickled), when a weight is
    missing or has another shape (transformers would draw it at random), or when the model's forward is not backbone +
    head (`verify`)."""
    path = _checked(path)
    four_bit = is_quantized(path)
    for file in () if four_bit else weight_files(path):
        header(file)
    name = _attention(attention_name)
    with _no_bar(), waiting(f"load {path}"):
        if four_bit:
            from fastpost.hf.int4_folder import load_int4

            model = load_int4(path, dtype, name)
            if check:
                verify(model)
            return model
        model, loading = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=name, use_safetensors=True, local_files_only=True,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    for what in ("missing_keys", "mismatched_keys"):
        if loading[what]:
            keys = sorted(str(k) for k in loading[what])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"{path}: {what.replace('_', ' ')}: {', '.join(keys[:3])}{more}. Weights and config.json do not fit."
            )
    model.eval()
    use_experts(model, quiet=True)
    if check:
        verify(model)
    return model


def new_model(path: str | Path, dtype: torch.dtype, attention_name: str = "packed", *, seed: int = 0):
    """The causal LM of a folder without weights, drawn as transformers' own initialisation draws it: the same numbers
    for the same seed, on every rank. They are drawn in float32 and rounded to `dtype`."""
    path = check_new(path)
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    name = _attention(attention_name)
    with waiting(f"draw {path}"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=name)
    use_experts(model, quiet=True)
    return model.to(dtype).eval()


def check_new(path: str | Path) -> Path:
    """The folder, if it is one of config.json and tokenizer without weights. Raises ValueError otherwise."""
    path = _checked(path)
    if has_weights(path):
        found = min(f.name for f in path.iterdir() if f.suffix in (".safetensors", *PICKLED))
        raise ValueError(
            f"[train] model.from_scratch: expected a folder with config.json and tokenizer but no weights, got {path} "
            f"with {found}. Leave it out to train these weights, or copy config.json and the tokenizer's files into a "
            "folder of their own."
        )
    if is_quantized(path):
        raise ValueError(
            f"[train] model.from_scratch: expected a config.json without quantization_config, got {path}. Take it out: "
            "a new model is trained in floating point."
        )
    return path


def has_weights(path: Path) -> bool:
    """False for a folder that holds nothing like weights; pickles and adapters are left to load_model to refuse."""
    return any(path.glob("*.safetensors")) or any(f.suffix in PICKLED for f in path.iterdir())


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' own progress bars: `waiting` says what is going on."""
    before = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            hf_logging.enable_progress_bar()


def _attention(name: str) -> str:
    """What transformers calls model.attention. Raises ValueError for a name that it does not know."""
    attention.register()
    name = attention.NAME if name == "packed" else name
    known = sorted(k for k in ALL_ATTENTION_FUNCTIONS if "|" not in k and not k.startswith("fastpost"))
    if name not in (attention.NAME, "eager", *known):
        raise ValueError(
            f"[hf] model.attention: expected packed or a name that transformers knows, got {name!r}. Known: "
            f"{', '.join(known)}."
        )
    return name


def is_quantized(path: str | Path) -> bool:
    """Whether the model folder says that its weights are quantised."""
    tree = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    return bool(tree.get("quantization_config") or (tree.get("text_config") or {}).get("quantization_config"))


def expect_new(out: Path) -> None:
    """Raise ValueError when `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: already exists and is not empty; nothing is overwritten. Choose another folder.")


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end: `out` is whole or absent. Raises as expect_new does."""
    expect_new(out)
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if out.exists():
            out.rmdir()
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def save_folder(
    model, source: str | Path, out: str | Path, dtype: torch.dtype | None = None, *, unchanged: Collection[str] = ()
) -> Path:
    """Write `model` as the folder `source` with other numbers: same keys, same shards, every other file byte for byte.
    A `source` without weights (a model that was trained from scratch) leaves keys and shards to transformers.

    dtype None = each tensor in the dtype it has in `source`, or in the model. `unchanged`: keys whose tensors are taken
    from `source` (frozen weights, of which the model may hold a rounded copy). Written beside `out` and renamed, so
    `out` is whole or absent. Of a sharded model one rank calls this while the others call `give_parts`. Raises
    ValueError when `out` exists and is not empty."""
    source, out = _checked(source), Path(out)
    if not has_weights(source):
        dtype = dtype or model.dtype
    with written_aside(out) as aside:
        with waiting(f"save {out}", lambda: _written(aside), _size(model, source, dtype), "MB"):
            _write_weights(model, source, aside, dtype, unchanged)
        for file in source.iterdir():
            weights = file.suffix in (".safetensors", *PICKLED) or file.name.endswith(".index.json")
            if file.is_file() and not file.name.startswith(".") and not weights:
                shutil.copyfile(file, aside / file.name)
        if dtype is not None:
            _set_config_dtype(aside / "config.json", dtype)
        for file in aside.glob("*.safetensors"):  # written for the owner alone, unlike every other file
            file.chmod((aside / "config.json").stat().st_mode & 0o777)
    return out


def give_parts(model, source: str | Path, unchanged: Collection[str] = ()) -> None:
    """What the other ranks do while one is in save_folder: gather a sharded model with it, tensor by tensor."""
    headers, state, renamed = _layout(model, Path(source))
    wanted = (key for entries in headers.values() for key in entries if key in state and key not in unchanged)
    for key in state if renamed else wanted:
        whole(state[key])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor put together, a collective of all ranks; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copy_tokenizer(source: Path, out: Path) -> None:
    """The tokenizer's files and its template, byte for byte."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def stored_dtype(path: Path) -> torch.dtype:
    """The narrowest floating dtype among the tensors of a model or adapter folder."""
    files = (
        [path / "adapter_model.safetensors"] if (path / "adapter_model.safetensors").is_file() else weight_files(path)
    )
    found = {_dtype(entry) for file in files for entry in header(file).values()}
    return min((d for d in found if d.is_floating_point), key=lambda d: -torch.finfo(d).eps)


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
    scratch = " To train its config.json from a random start: model.from_scratch."
    raise ValueError(f"{path}: expected model*.safetensors, found none.{adapter or FETCH + scratch}")


def _checked(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(
            f"{path}: no such folder. Expected a local Hugging Face folder (model.path); fetch one with "
            "`hf download ORG/NAME --local-dir DIR`."
        )
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: expected a Hugging Face model folder (model.path), found no config.json in it.{FETCH}"
        )
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}/config.json: expected JSON with a model_type, got something else ({error}). Fetch it again."
        ) from None
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{path}/config.json: model.path: expected a causal language model that this transformers "
            f"({transformers.__version__}) knows, got model_type {kind!r}. Take another model, or a newer transformers."
        )
    return path


def header(file: Path) -> dict[str, dict]:
    """{key: {"dtype", "shape"}} from a safetensors header; ValueError when the file has none (a renamed pickle)."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            found = json.loads(stream.read(length)) if length < size else None
        except ValueError:
            found = None
    if isinstance(found, dict):
        found.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in found.values()), default=0)
    if not isinstance(found, dict) or size < end:
        raise ValueError(
            f"{file} is not a safetensors file (or was cut short): expected a safetensors file, got {size} bytes that "
            "are not a whole one. Fetch it again."
        )
    return found


def _layout(model, source: Path) -> tuple[dict[Path, dict], dict[str, torch.Tensor], bool]:
    """(header of each file of `source`, the model's tensors, whether transformers renamed or fused tensors on the way
    in, as it does for mixtures of experts; only it knows how to undo that)."""
    headers = {file: header(file) for file in (weight_files(source) if has_weights(source) else ())}
    wanted = {key for entries in headers.values() for key in entries}
    state = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return headers, state, bool(set(state) - wanted - tied)


def _write_weights(model, source: Path, out: Path, dtype: torch.dtype | None, unchanged: Collection[str]) -> None:
    headers, state, renamed = _layout(model, source)
    wanted = {key for entries in headers.values() for key in entries}
    if renamed:
        kind = dtype or _dtype(next(iter(next(iter(headers.values())).values())))
        complete = ((key, whole(value)) for key, value in state.items())
        # Put together from shards, the two of a tied pair no longer share memory, by which transformers knows them.
        second = set(getattr(model, "all_tied_weights_keys", None) or {}) - wanted
        state = {k: v.to("cpu", kind) if v.is_floating_point() else v for k, v in complete if k not in second}
        with _no_bar():
            model.save_pretrained(out, state_dict=state)
        written = {key for file in out.glob("*.safetensors") for key in header(file)}
        if wanted and written != wanted:
            missing, extra = sorted(wanted - written)[:3], sorted(written - wanted)[:3]
            raise ValueError(
                f"[save] {type(model).__name__}: keys would change: missing {missing}, new {extra}. Nothing is kept."
            )
        return
    size = 0
    for file, entries in headers.items():
        with safe_open(file, "pt") as old:
            # A key the model does not have (an old buffer) keeps its value. Each tensor is copied: safetensors refuses
            # shared memory, and a folder with both halves of a tied pair stays one.
            tensors = {}
            for key, entry in entries.items():
                stored = key not in state or key in unchanged
                tensor = old.get_tensor(key) if stored else whole(state[key])
                if key in state:
                    tensor = tensor.to("cpu", dtype or _dtype(entry), copy=not stored).contiguous()
                tensors[key] = tensor
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


def _size(model, source: Path, dtype: torch.dtype | None) -> float:
    """MB that _write_weights will write, about."""
    if dtype is None:
        return sum(file.stat().st_size for file in weight_files(source)) / 1e6
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize / 1e6


def _written(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


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
