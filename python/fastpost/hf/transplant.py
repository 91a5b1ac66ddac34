# SPDX-License-Identifier: Apache-2.0
"""Another vocabulary under a trained model: each new row of the embedding and of the head is a weighted average of old
rows, so the model keeps what it knows about words that have a counterpart.

    python -m fastpost.hf.transplant MODEL TOKENIZER OUT [--map MAP.json]

MAP.json is {new token: {old token: weight, ...}}, tokens as the tokenizers spell them; a token that it does not name
falls back to the row of the old unknown token. Without --map a new token is matched by itself: the same token is
copied, any other is the average of the old tokens that spell its text.

One counterpart is a copy, bit for bit; several are averaged in float64 and rounded once. Source: ChocoLlama (Meeus et
al. 2024), which follows trans-tokenization (Remy et al. 2024).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastpost.hf import folder

Mix = Mapping[int, float]
"""Old row -> weight above 0; divided by their sum. Empty: no counterpart."""


def transplant(old: torch.Tensor, mixes: Sequence[Mix], unknown: int) -> torch.Tensor:
    """old [V, D] -> new [len(mixes), D] in its dtype: row i is the average of old rows by mixes[i], else old[unknown].

    Raises ValueError for a row that does not exist or a weight that is not a number above 0.
    """
    rows, columns, weights = [], [], []
    for i, mix in enumerate(mixes):
        mix = dict(mix) or {unknown: 1.0}
        for j, weight in mix.items():
            if not 0 <= j < len(old):
                raise ValueError(f"[transplant] mixes[{i}]: expected rows from 0 to {len(old) - 1}, got {j}.")
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"[transplant] mixes[{i}]: expected weights above 0, got {weight} for row {j}.")
        total = math.fsum(mix.values())
        rows += [i] * len(mix)
        columns += mix
        weights += [w / total for w in mix.values()]
    index = torch.tensor([rows, columns], dtype=torch.int64)
    new = torch.empty(len(mixes), old.shape[1], dtype=old.dtype)
    single = torch.bincount(index[0], minlength=len(mixes)) == 1
    alone = single[index[0]]
    new[index[0][alone]] = old[index[1][alone]]
    values, size = torch.tensor(weights, dtype=torch.float64), (len(mixes), len(old))
    matrix = torch.sparse_coo_tensor(index, values, size, check_invariants=True)
    for begin in range(0, old.shape[1], 256):  # float64 of a slice of columns, not of the whole matrix
        piece = slice(begin, begin + 256)
        average = torch.sparse.mm(matrix, old[:, piece].double())
        new[~single, piece] = average[~single].to(old.dtype)
    return new


def by_map(tree: Mapping[str, Mapping[str, float]], old, new) -> list[Mix]:
    """Mixes from {new token: {old token: weight}}. Raises ValueError for tokens that the tokenizers do not have."""
    old_ids, new_ids = old.get_vocab(), new.get_vocab()
    mixes: list[Mix] = [{} for _ in range(_rows(new))]
    for token, mix in tree.items():
        if token not in new_ids:
            raise ValueError(f"[transplant] map: the new tokenizer has no token {token!r}.")
        if unknown := [t for t in mix if t not in old_ids]:
            raise ValueError(f"[transplant] map: {token!r}: the old tokenizer has no token {unknown[0]!r}.")
        mixes[new_ids[token]] = {old_ids[t]: float(w) for t, w in mix.items()}
    return mixes


def by_text(old, new) -> list[Mix]:
    """Mixes from the tokens themselves: the same token, else the old tokens that spell its text, each occurrence with
    weight 1. Special tokens match by their role (bos, eos, unk, pad), then by name."""
    old_ids = old.get_vocab()
    roles = {
        getattr(new, f"{role}_token_id"): getattr(old, f"{role}_token_id") for role in ("pad", "unk", "eos", "bos")
    }
    roles = {n: o for n, o in roles.items() if n is not None and o is not None}
    special = {i for i, token in new.added_tokens_decoder.items() if token.special}
    mixes: list[Mix] = [{} for _ in range(_rows(new))]
    for token, i in new.get_vocab().items():
        if i in roles:
            mixes[i] = {roles[i]: 1.0}
        elif token in old_ids:
            mixes[i] = {old_ids[token]: 1.0}
        elif i not in special and (text := new.convert_tokens_to_string([token])) and "\ufffd" not in text:
            spelt = old(text, add_special_tokens=False)["input_ids"]
            mixes[i] = {j: float(spelt.count(j)) for j in spelt}
    return mixes


def transplant_folder(
    model: Path, tokenizer: Path, out: Path, tree: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """Write `model` with the vocabulary of folder `tokenizer` to `out`; returns a line on what was copied, averaged and
    filled. Every other weight and file is copied as it is. Raises ValueError when `out` is not empty."""
    source = folder.locate(model).base
    folder.expect_new(out)
    old, new = folder.load_tokenizer(model), folder.load_tokenizer(tokenizer)
    mixes = by_text(old, new) if tree is None else by_map(tree, old, new)
    unknown = next((t for t in (old.unk_token_id, old.bos_token_id, old.eos_token_id) if t is not None), 0)
    ends = _ends(source)
    with folder.written_aside(out) as aside:
        found, size = set(), 0
        for file in folder.weight_files(source):
            with safe_open(file, "pt") as stored:
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            for key in ends & tensors.keys():
                tensors[key] = transplant(tensors[key], mixes, unknown)
                found.add(key)
            size += sum(t.nbytes for t in tensors.values())
            save_file(tensors, aside / file.name, metadata={"format": "pt"})
        if not found:
            raise ValueError(f"[transplant] {source}: expected a tensor named {' or '.join(sorted(ends))}, found none.")
        for file in source.iterdir():
            if file.suffix == ".json" and file.name not in folder.TOKENIZER_FILES:
                _write_json(file, aside / file.name, new, len(mixes), size)
        folder.copy_tokenizer(folder.locate_tokenizer(tokenizer), aside)
    kinds = [len(m) for m in mixes]
    return (
        f"{len(old)} -> {len(mixes)} tokens: {kinds.count(1)} rows copied, {sum(k > 1 for k in kinds)} averaged, "
        f"{kinds.count(0)} without a counterpart take row {unknown}; tensors: {', '.join(sorted(found))}"
    )


def _rows(tokenizer) -> int:
    """Rows that an embedding needs: ids may have gaps, so it is not always the number of tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def _ends(source: Path) -> set[str]:
    """Names of the weights of the embedding and of the head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return {f"{name}.weight" for name, module in model.named_modules() if id(module) in ends}


def _write_json(file: Path, out: Path, tokenizer, rows: int, size: int) -> None:
    """Copy a JSON file of the model with the new size of the vocabulary and the new special tokens."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    if file.name.endswith(".index.json"):
        tree.setdefault("metadata", {})["total_size"] = size
    if file.name in ("config.json", "generation_config.json"):
        if "vocab_size" in tree:
            tree["vocab_size"] = rows
        for role in ("bos", "eos", "pad"):
            if f"{role}_token_id" in tree:
                tree[f"{role}_token_id"] = getattr(tokenizer, f"{role}_token_id")
    out.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastpost.hf.transplant", description="Write a model with the vocabulary of another tokenizer."
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER", help="folder with the new tokenizer")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument("--map", type=Path, metavar="JSON", help="{new token: {old token: weight}}; default: by text")
    args = parser.parse_args(argv)
    try:
        tree = json.loads(args.map.read_text(encoding="utf-8")) if args.map else None
        print(transplant_folder(args.model, args.tokenizer, args.out, tree))
    except (ValueError, OSError) as error:
        print(f"transplant: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
