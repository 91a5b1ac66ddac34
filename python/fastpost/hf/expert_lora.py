# SPDX-License-Identifier: Apache-2.0
"""LoRA on experts in the form that inference servers read: a pair of matrices for each expert and projection.

peft trains experts as parameters (target_parameters=["experts.gate_up_proj", "experts.down_proj"]) and saves all
experts of a layer in one pair, A [E·r, in] with the expert slowest and B [out, r·E] with the expert fastest, where gate
and up are one matrix. Servers want `experts.3.gate_proj.lora_A.weight` [r, in] and so on, by the names of the base
model's checkpoint (w1, w3, w2 in Mixtral). Gate and up then have the same A, and the halves of B.

    expert_lora.save_unfused(model, base, "out/served")       # model: peft's, with the adapter on
    model = expert_lora.load_unfused(base_model, "out/served")

Nothing is rounded: what load_unfused reads back are the same tensors. An adapter by others, in which gate and up have
an A each, is read as one of twice the rank. adapter.continued reads either form.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fastpost.hf import adapter, folder, int4_expert_lora, int4_lora

ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_PEFT = "base_model.model."
_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<name>\w+)\.lora_(?P<side>[AB])\.weight$")
_STORED = re.compile(r"^(?P<experts>.*\.experts)\.0\.(?P<name>\w+)\.weight$")
_LAYER = re.compile(r"^(?P<layer>.*\blayers\.\d+)\.(?P<rest>.+)\.experts$")


def save_unfused(
    model, base: str | Path, out: str | Path, *, tokenizer: str | Path | None = None, dtype: torch.dtype | None = None
) -> Path:
    """adapter.save with a pair of matrices for each expert; names are those of the checkpoint in folder `base`.

    Raises ValueError for a model without an adapter on experts, for experts whose gate and up are interleaved or whose
    checkpoint has no matrices of single experts (there the form of peft is the one that servers read), and when `out`
    exists and is not empty."""
    out, config = Path(out), model.peft_config["default"]
    wrappers = _wrappers(model)
    if not wrappers:
        raise ValueError(
            "[lora] experts: expected an adapter on experts (target_parameters), found none. adapter.save writes this "
            "one."
        )
    stored = _stored_names(Path(base))
    tensors = {k: folder.whole(v.detach()).cpu() for k, v in adapter.tensors_of(model).items()}
    unfused, renamed, names, ranks, alphas = {}, {}, set(), {}, {}
    for key, wrapper in wrappers.items():
        experts = key.removesuffix(".base_layer")
        place, leaf = _place(experts, stored)
        renamed[experts.removesuffix("experts")] = place.removesuffix("experts")
        a, b = (tensors.pop(f"{key}.lora_{side}.weight") for side in "AB")
        for role, part_a, part_b in _split(wrapper, a, b):
            names.add(leaf[role])
            rank, alpha = wrapper.r["default"], wrapper.lora_alpha["default"]
            if (rank, alpha) != (config.r, config.lora_alpha):
                ranks[leaf[role]], alphas[leaf[role]] = rank, alpha
            for number, (one_a, one_b) in enumerate(zip(part_a, part_b, strict=True)):
                unfused[f"{place}.{number}.{leaf[role]}.lora_A.weight"] = one_a
                unfused[f"{place}.{number}.{leaf[role]}.lora_B.weight"] = one_b
    unfused |= {_renamed(key, renamed): tensor for key, tensor in tensors.items()}
    tree = config.to_dict()
    others = tree["target_modules"] or []
    tree |= {
        "base_model_name_or_path": str(Path(base).resolve()), "inference_mode": True, "target_parameters": None,
        "target_modules": sorted({*others, *names}) if not isinstance(others, str) else others,
        "rank_pattern": ranks, "alpha_pattern": alphas,
    }  # fmt: skip
    with folder.written_aside(out) as aside:
        kept = {k: v.to(dtype=dtype, copy=True).contiguous() for k, v in unfused.items()}
        save_file(kept, aside / adapter.WEIGHTS, metadata={"format": "pt"})
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in tree.items()}
        (aside / adapter.CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        int4_lora.write(model, aside)
        folder.copy_tokenizer(Path(tokenizer or base), aside)
        (aside / adapter.WEIGHTS).chmod((aside / adapter.CONFIG).stat().st_mode & 0o777)
    return out


def is_unfused(path: str | Path) -> bool:
    """Whether the adapter folder has pairs of matrices for single experts."""
    file = Path(path) / adapter.WEIGHTS
    return file.is_file() and any(_EXPERT.match(key) for key in folder.header(file))


def load_unfused(model: torch.nn.Module, path: str | Path):
    """The adapter of folder `path` on `model`, trainable, as peft has adapters on experts; float32 as in
    adapter.continued. What the folder lacks for an expert is 0.

    Raises ValueError when the folder has no pairs for single experts, or such as do not fit the model."""
    path = Path(path)
    file, tree, tensors = path / adapter.WEIGHTS, adapter.read_config(path), load_file(path / adapter.WEIGHTS)
    pairs: dict[str, dict] = {}
    for key in [k for k in tensors if _EXPERT.match(k)]:
        found = _EXPERT.match(key)
        role = ROLES.get(found["name"])
        if role is None:
            raise ValueError(f"{file}: {key}: expected one of {', '.join(ROLES)}.")
        pairs.setdefault(found["experts"], {})[role, int(found["number"]), found["side"]] = tensors.pop(key)
    if not pairs:
        raise ValueError(f"{file}: expected matrices of single experts, found none. adapter.load reads it.")

    own, joined, renamed = _modules(model), {}, {}
    for place, given in pairs.items():
        name = next((n for n in own if _layer(n) == _layer(place.removeprefix(_PEFT))), None)
        if name is None:
            raise ValueError(f"{file}: {place}: expected a layer of experts in the model, found none there.")
        renamed[place.removesuffix("experts")] = _PEFT + name.removesuffix("experts")
        joined |= {(name, parameter): pair for parameter, pair in _joined(own[name], given, place).items()}
    tensors = {_renamed(key, renamed): tensor for key, tensor in tensors.items()}
    wrapped = adapter.put_on(model, _config(tree, tensors, joined))
    for key, wrapper in _wrappers(wrapped).items():
        tensors |= _flat(key, wrapper, joined, file)
    unknown = sorted(set(tensors) - set(adapter.tensors_of(wrapped)))
    if unknown:
        raise ValueError(f"{file}: has {unknown[0]}, which the model has no place for.")
    return adapter.fill(wrapped, tensors)


def _config(tree: dict, rest: dict, joined: dict):
    """That of a folder for single experts, `tree`, for `joined` ones and the modules of which `rest` has tensors."""
    import peft

    rank, scale, ranks = tree["r"], tree.get("lora_alpha", 8) / tree["r"], {}
    for (_, parameter), (a, _) in joined.items():
        ranks[parameter] = max(a.shape[1], ranks.get(parameter, 0))
    other = {rf".*\.{parameter}": r for parameter, r in ranks.items() if r != rank}
    return peft.LoraConfig.from_peft_type(
        **tree
        | {
            "target_modules": sorted({k.split(".lora_")[0].rpartition(".")[2] for k in rest if ".lora_" in k}) or None,
            "target_parameters": sorted(f"experts.{parameter}" for parameter in ranks),
            "rank_pattern": other, "alpha_pattern": {name: scale * r for name, r in other.items()},
            "inference_mode": False,
        }
    )  # fmt: skip


def _flat(key: str, wrapper, joined: dict, file: Path) -> dict[str, torch.Tensor]:
    """The two tensors of one of peft's wrappers."""
    name, rank = key.removesuffix(".base_layer").removeprefix(_PEFT), wrapper.r["default"]
    like = [getattr(wrapper, f"lora_{side}")["default"].weight for side in "AB"]
    flat = [torch.zeros_like(t) for t in like]
    if (name, wrapper.parameter_name) in joined:
        a, b = joined[name, wrapper.parameter_name]
        a, b = F.pad(a, (0, 0, 0, rank - a.shape[1])), F.pad(b, (0, rank - b.shape[2]))
        flat = [a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)]
    if [t.shape for t in flat] != [t.shape for t in like]:
        wanted, got = (" and ".join(str(list(t.shape)) for t in pair) for pair in (like, flat))
        raise ValueError(f"{file}: {name}: expected A and B of all experts together to be {wanted}, got {got}. The "
                         "adapter belongs to another model.")  # fmt: skip
    return {f"{key}.lora_{side}.weight": t.contiguous() for side, t in zip("AB", flat, strict=True)}


# ---- between the forms -----------------------------------------------------------------------------------------------


def _split(wrapper, a: torch.Tensor, b: torch.Tensor):
    """(role, A [E, r, in], B [E, out, r]) of the projections in one of peft's pairs."""
    experts, count = wrapper.get_base_layer(), wrapper.num_experts
    a = a.view(count, -1, a.shape[1])
    b = b.view(b.shape[0], -1, count).permute(2, 0, 1)
    if wrapper.parameter_name != "gate_up_proj":
        return [(wrapper.parameter_name.removesuffix("_proj"), a, b)]
    if not getattr(experts, "is_concatenated", True):
        raise ValueError(f"[lora] {type(experts).__name__}: expected gate and up one after the other, got interleaved "
                         "rows. Servers read peft's own form for such models: adapter.save.")  # fmt: skip
    gate, up = b.chunk(2, 1)
    return [("gate", a, gate), ("up", a, up)]


def _joined(experts, given: dict, place: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{parameter: (A [E, r, in], B [E, out, r])} from {(role, expert, side): matrix}."""
    stacked = {}
    for role in {role for role, _, _ in given}:
        pair = []
        for side in "AB":
            some = next(iter(t for (r, _, s), t in given.items() if (r, s) == (role, side)), None)
            if some is None or max(n for _, n, _ in given) >= experts.num_experts:
                raise ValueError(f"[lora] {place}: expected both matrices of experts 0 to {experts.num_experts - 1}.")
            zero = torch.zeros_like(some)
            pair.append(torch.stack([given.get((role, e, side), zero) for e in range(experts.num_experts)]))
        stacked[role] = pair
    found = {"down_proj": tuple(stacked["down"])} if "down" in stacked else {}
    if not experts.has_gate:
        return found | ({"up_proj": tuple(stacked["up"])} if "up" in stacked else {})
    some = stacked.get("gate") or stacked.get("up")
    if some is None:
        return found
    (gate_a, gate_b), (up_a, up_b) = (
        stacked.get(role) or [torch.zeros_like(t) for t in some] for role in ("gate", "up")
    )
    if torch.equal(gate_a, up_a):
        return found | {"gate_up_proj": (gate_a, torch.cat([gate_b, up_b], 1))}
    upper = torch.cat([gate_b, gate_b.new_zeros(*gate_b.shape[:2], up_b.shape[2])], 2)
    lower = torch.cat([up_b.new_zeros(*up_b.shape[:2], gate_b.shape[2]), up_b], 2)
    return found | {"gate_up_proj": (torch.cat([gate_a, up_a], 1), torch.cat([upper, lower], 1))}


# ---- names -----------------------------------------------------------------------------------------------------------


def _wrappers(model) -> dict[str, torch.nn.Module]:
    """peft's wrappers of experts by the names that their tensors begin with."""
    from peft.tuners.lora.layer import ParamWrapper

    found = {n: m for n, m in model.named_modules() if isinstance(m, ParamWrapper)} | int4_expert_lora.wrappers(model)
    return {n: m for n, m in found.items() if n.removesuffix(".base_layer").endswith(".experts")}


def _modules(model) -> dict[str, torch.nn.Module]:
    """Modules of experts by name."""
    return {n: m for n, m in model.named_modules() if n.endswith(".experts") and hasattr(m, "has_gate")}


def _stored_names(base: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """{layer: (name of its experts, {role: name of the projection})} of the checkpoint in folder `base`."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for file in folder.weight_files(base):
        for match in filter(None, map(_STORED.match, folder.header(file))):
            names = found.setdefault(_layer(match["experts"]), (match["experts"], {}))[1]
            names[ROLES.get(match["name"], match["name"])] = match["name"]
    return found


def _place(experts: str, stored: dict) -> tuple[str, dict[str, str]]:
    """Where a server looks for what peft calls base_model.model.….experts."""
    name = experts.removeprefix(_PEFT)
    if _layer(name) not in stored:
        raise ValueError(f"[lora] {name}: expected matrices of single experts in the base model's checkpoint, found "
                         "none. Servers read peft's own form for such models: adapter.save.")  # fmt: skip
    place, names = stored[_layer(name)]
    return _PEFT + place, names


def _renamed(key: str, parents: dict[str, str]) -> str:
    """For what lies beside experts, such as a router, where a checkpoint calls their parent otherwise."""
    old = next((parent for parent in parents if key.startswith(parent)), None)
    return key if old is None else parents[old] + key[len(old) :]


def _layer(experts: str) -> str:
    """What "model.layers.3.mlp.experts" and "model.layers.3.block_sparse_moe.experts" have in common."""
    found = _LAYER.match(experts)
    return found["layer"] if found else experts
