# SPDX-License-Identifier: Apache-2.0
"""Adapters by peft: put on a model, read from a folder, written to one, merged.

An adapted model is a peft.PeftModel around the transformers model. Only the adapter's tensors require gradients: LoRA
matrices and, where asked for, a trained copy of the embedding and of the head (peft's modules_to_save). Where peft only
warns about a key that is missing or not used, this is an error: the adapter that computes is the adapter of the file.

    model = adapter.load("runs/sft/adapter", torch.bfloat16)     # base and adapter; also any plain model folder
    model = adapter.fresh(folder.load_model(base), rank=8, alpha=32)
    with adapter.off(model): ...                                 # the base model
    adapter.save(model, base, "out/adapter")
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastpost.hf import folder, lora
from fastpost.hf.model import verify
from fastpost.nn import Int4Experts
from fastpost.nn.int4_packed import Packed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def load(path: str | Path, dtype: torch.dtype = torch.float32, attention_name: str = "packed", *, check: bool = True):
    """The causal LM of a model, adapter or run folder, in eval mode: folder.load_model, with the adapter on where there
    is one, all of it in `dtype`. Raises ValueError as folder.load_model and `continued` do."""
    return load_place(folder.locate(path), dtype, attention_name, check=check)


def load_place(place: folder.Place, dtype: torch.dtype, attention_name: str = "packed", *, check: bool = True):
    """`load` of what folder.locate found."""
    model = folder.load_model(place.base, dtype, attention_name, check=check and place.adapter is None)
    if place.adapter is not None:
        base_format(place.adapter).apply(model)
        model = continued(model, place.adapter).eval()
        narrow(model, dtype)
        if check:
            verify(model)
    return model


def fresh(
    model: torch.nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: list[str] | tuple[str, ...] = ("all-linear",),
    rslora: bool = False,
    train_embeddings: bool = False,
    train_head: bool = False,
    connections: bool = False,
):
    """A new LoRA adapter on `model`: x W' + scale B(A(dropout(x))), B = 0, scale = alpha / rank (rslora: / sqrt(rank)).

    targets: names of linear layers, whole or last parts, or of stacked matrices of experts ("experts.gate_up_proj",
    "experts.down_proj"), which get an A and a B for each expert; on these there is no dropout.

    connections: IR-QLoRA's, see int4_lora.py. A is drawn from torch's global generator, so seed it. With tied
    embeddings, `train_embeddings` and `train_head` must be given together: one matrix is trained and stays one. Raises
    ValueError for that, for targets that match nothing and for a low-rank change of one of two tied layers, which no
    merged model could hold.
    """
    import peft

    embedding, head, tied = _ends(model)
    targets = [t for t in targets if t]
    _check_tied(tied, embedding, head, targets, train_embeddings, train_head)
    whole = [name for name, asked in ((embedding, train_embeddings), (head, train_head)) if asked]
    packed = {n for n, m in model.named_modules() if isinstance(m, Int4Experts)}
    names = [n for n, _ in model.named_modules() if n not in packed]
    stacks = [*packed, *(n for n, p in model.named_parameters() if p.ndim == 3)]
    parameters = [t for t in targets if _has(stacks, t) and not _has(names, t)]
    targets = [t for t in targets if t not in parameters]
    if parameters and dropout:
        raise ValueError(
            f"[lora] dropout: expected 0 on experts ({parameters[0]}), got {dropout}: peft adds B A to their matrices. "
            "Set it to 0, or leave the experts out of targets."
        )
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules="all-linear" if targets == ["all-linear"] else list(targets) or None,
        target_parameters=parameters or None,
        modules_to_save=whole or None,
        ensure_weight_tying=tied and bool(whole),
        task_type="CAUSAL_LM",
    )
    for target in targets:
        if target != "all-linear" and not _has(names, target):
            layers = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            layers = [*sorted(layers), *sorted({".".join(n.split(".")[-2:]) for n in stacks})]
            raise ValueError(
                f"[lora] targets: expected names of linear layers, got '{target}', which {type(model).__name__} has "
                f"not. It has: {', '.join(layers)}."
            )
    return put_on(model, config, connections)


def continued(model: torch.nn.Module, path: str | Path):
    """The adapter of folder `path` on `model`, trainable. Its tensors are float32 whatever the file holds.

    Raises ValueError when it is a pickle, no LoRA, changes more of the base than it stores, or its keys and shapes are
    not exactly those that its adapter_config.json asks for on this model."""
    import peft

    from fastpost.hf import expert_lora

    path = Path(path)
    tree = read_config(path)
    if expert_lora.is_unfused(path):
        return expert_lora.load_unfused(model, path)
    config = peft.LoraConfig.from_peft_type(**tree)
    config.inference_mode = False
    embedding, head, tied = _ends(model)
    whole = {name.rpartition(".")[2] for name in config.modules_to_save or ()}
    targets = (config.target_modules or []) if not isinstance(config.target_modules, str) else []
    _check_tied(tied, embedding, head, targets, embedding in whole, head in whole or config.ensure_weight_tying)
    tensors, wrapped = load_file(path / WEIGHTS), put_on(model, config, _has_connections(path))
    wanted = tensors_of(wrapped)
    odd = {
        "lacks": sorted(set(wanted) - set(tensors)),
        "has, which its adapter_config.json does not ask for on this model,": sorted(set(tensors) - set(wanted)),
        "has in another shape": sorted(k for k in tensors if k in wanted and tensors[k].shape != wanted[k].shape),
    }
    for what, keys in odd.items():
        if keys:
            more = f" ({len(keys)} in all)" if len(keys) > 1 else ""
            raise ValueError(
                f"{path / WEIGHTS}: {what} {keys[0]}{more}. The adapter belongs to another base model or another "
                "version of it."
            )
    return fill(wrapped, tensors)


def shaped(model: torch.nn.Module, path: Path):
    """`model`, which may be on the meta device, with an untrained adapter like that of folder `path`."""
    import peft

    from fastpost.hf import expert_lora

    if expert_lora.is_unfused(path):
        return expert_lora.load_unfused(model, path)
    config = peft.LoraConfig.from_peft_type(**read_config(path) | {"inference_mode": False})
    return put_on(model, config, _has_connections(path))


def moved(model, base: torch.nn.Module, *, quantize: bool = True):
    """The adapter of `model` on `base`, another copy of its base model, quantised as that was, or left as it is."""
    from fastpost.hf import int4_lora

    if quantize:
        int4_lora.base_format(model).apply(base)
    config = copy.deepcopy(model.peft_config["default"])
    return fill(put_on(base, config, int4_lora.has_connections(model)), tensors_of(model))


def base_format(path: Path):
    """How the base of adapter folder `path` is to be quantised: an int4_lora.BaseFormat."""
    from fastpost.hf import int4_lora

    return int4_lora.read(path)[0]


def _has_connections(path: Path) -> bool:
    from fastpost.hf import int4_lora

    return int4_lora.read(path)[1]


def read_config(path: Path) -> dict:
    """adapter_config.json of a LoRA adapter in safetensors. Raises ValueError for what is not trained here."""
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path}: no {CONFIG}, so this is not an adapter folder.")
    if not (path / WEIGHTS).is_file():
        pickled = sorted(f.name for f in path.iterdir() if f.suffix in folder.PICKLED)
        found = f"{pickled[0]} is a pickle, and reading a pickle can run any code; " if pickled else ""
        raise ValueError(f"{path}: no {WEIGHTS}: {found}only safetensors is read. Save it again with peft.")
    folder.header(path / WEIGHTS)
    tree = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    what = {
        "peft_type": (tree.get("peft_type") == "LORA", "LORA"),
        "bias": (tree.get("bias", "none") == "none", "none (base biases would change, which no adapter file can undo)"),
        "init_lora_weights": (
            not str(tree.get("init_lora_weights", True)).startswith(_CHANGES_BASE),
            "an initialisation that leaves the base model as it is",
        ),
    }
    for name, (good, expected) in what.items():
        if not good:
            raise ValueError(f"{path / CONFIG}: {name}: expected {expected}, got {tree.get(name)!r}. Merge it first.")
    return tree


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether `model` is a base model with an adapter by peft."""
    return lora.inner(model) is not model


def narrow(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters in place, not the buffers: the frequencies of rotary embeddings stay float32. Nor what
    four-bit layers are packed in."""
    for module in model.modules():
        packed = module.packed_names if isinstance(module, Packed) else ()
        for name, p in module.named_parameters(recurse=False):
            if name not in packed:
                p.data = p.data.to(dtype)


@contextlib.contextmanager
def off(model: torch.nn.Module):
    """The base model: adapters off, trained copies of embedding and head replaced by the originals. Which parameters
    require gradients is as before afterwards. Does nothing to a model without an adapter."""
    if not is_adapted(model):
        yield model
        return
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield model
    finally:
        for p, was in trained:
            p.requires_grad_(was)


def tensors_of(model) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names of a peft folder: base_model.model.<module>.lora_A.weight, ..."""
    import peft

    from fastpost.hf import int4_expert_lora

    # False: peft would else look the base model up on the hub to compare vocabularies.
    return int4_expert_lora.renamed(model, peft.get_peft_model_state_dict(model, save_embedding_layers=False))


def save(
    model, base: str | Path, out: str | Path, *, tokenizer: str | Path | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write the adapter of `model` as a peft folder, with the tokenizer files of folder `tokenizer` (None = base) byte
    for byte. dtype None = as the tensors are. Written beside `out` and renamed, so it is whole or absent."""
    from fastpost.hf import int4_lora

    out = Path(out)
    with folder.written_aside(out) as aside:
        whole = ((k, folder.whole(v.detach())) for k, v in tensors_of(model).items())
        tensors = {k: v.to("cpu", dtype, copy=True).contiguous() for k, v in whole}
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        tree = model.peft_config["default"].to_dict()
        tree |= {"base_model_name_or_path": str(Path(base).resolve()), "inference_mode": True}
        if tree.get("modules_to_save"):  # as asked for; peft drops the head from it where it is tied
            ends = [n for n in _ends(model)[:2] if any(k.endswith(f".{n}.weight") for k in tensors)]
            tree["modules_to_save"] = ends + [n for n in tree["modules_to_save"] if n.rpartition(".")[2] not in ends]
        text = json.dumps(
            {k: sorted(v) if isinstance(v, set) else v for k, v in tree.items()}, indent=2, sort_keys=True
        )
        (aside / CONFIG).write_text(text + "\n", encoding="utf-8")
        int4_lora.write(model, aside)
        folder.copy_tokenizer(Path(tokenizer or base), aside)
        (aside / WEIGHTS).chmod((aside / CONFIG).stat().st_mode & 0o777)
    return out


def give_parts(model) -> None:
    """What the other ranks do while one is in `save`: gather the adapter of a sharded model with it."""
    for tensor in tensors_of(model).values():
        folder.whole(tensor.detach())


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model with the adapter in its weights (W + scale B A), in their dtype: load it in float32.
    Four-bit layers become float32 ones."""
    from fastpost.hf import int4_lora

    return int4_lora.dequantized(model).merge_and_unload(safe_merge=True)


def fill(model, tensors: dict[str, torch.Tensor]):
    """Copy an adapter's tensors into `model`, as float32."""
    import peft

    from fastpost.hf import int4_expert_lora

    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    peft.set_peft_model_state_dict(model, int4_expert_lora.fill(model, tensors))
    return model


def put_on(model, config, connections: bool = False):
    """peft's wrapper of `model` with a new adapter as `config` says."""
    from fastpost.hf import int4_expert_lora, int4_lora

    int4_lora.register(config, connections=connections)
    with warnings.catch_warnings():  # about tied layers: _check_tied is stricter
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        try:
            return int4_expert_lora.put_on(model, config)
        except ValueError as error:
            raise ValueError(f"[lora] targets: {error}") from None


def _has(names: list[str], target: str) -> bool:
    return any(n == target or n.endswith(f".{target}") for n in names)


def _ends(model) -> tuple[str, str, bool]:
    """Last names of the input embedding and of the head, and whether they are one matrix."""
    inner = lora.inner(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    names = {m: n for n, m in inner.named_modules()}
    tied = inner.config.get_text_config().tie_word_embeddings
    return names[embedding].rpartition(".")[2], names[head].rpartition(".")[2], bool(tied)


def _check_tied(tied: bool, embedding: str, head: str, targets, train_embeddings: bool, train_head: bool) -> None:
    if not tied:
        return
    if train_embeddings != train_head:
        one, other = ("train_embeddings", "train_head") if train_embeddings else ("train_head", "train_embeddings")
        raise ValueError(
            f"[lora] {one}: in this model {embedding} and {head} are one matrix (tie_word_embeddings), which cannot be "
            f"trained at one end and kept at the other. Set {other}, too, or neither."
        )
    for name in targets:
        if name.rpartition(".")[2] in (embedding, head):
            raise ValueError(
                f"[lora] targets: in this model {embedding} and {head} are one matrix (tie_word_embeddings), so a "
                f"low-rank change of '{name}' alone fits no merged model. Leave it out, or train both whole with "
                "train_embeddings and train_head."
            )
