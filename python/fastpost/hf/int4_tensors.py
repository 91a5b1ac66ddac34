# SPDX-License-Identifier: Apache-2.0
"""The tensors of a quantised folder, by name: safetensors only, every mistake with file, tensor and remedy."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fastpost.hf.folder import PICKLED, header

AGAIN = "Fetch the folder again."


class Tensors:
    """All tensors of the .safetensors files of a model folder. Only headers are read until one is asked for.

    Raises ValueError when there are no such files, one is cut short or none, an index names what is not there, or two
    files hold a tensor of the same name."""

    def __init__(self, path: Path):
        self.path = path
        self._entries: dict[str, dict] = {}
        self._files: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        index = sorted(path.glob("*.safetensors.index.json"))
        wanted = _index(index[0]) if index else {}
        files = sorted({path / name for name in wanted.values()}) or sorted(
            f for f in path.glob("*.safetensors") if not f.name.startswith("adapter_")
        )
        if not files:
            pickled = sorted(f.name for f in path.iterdir() if f.suffix in PICKLED)
            found = f"{pickled[0]}, a pickle: reading one can run any code" if pickled else "none"
            raise ValueError(f"{path}: expected .safetensors files, got {found}. Only safetensors is read.")
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file}: missing, but {index[0].name} names it. {AGAIN}")
            for key, entry in header(file).items():
                if key in self._files:
                    raise ValueError(f"{file}: tensor '{key}' is in {self._files[key].name}, too. Keep one of them.")
                self._entries[key], self._files[key] = entry, file
        lost = sorted(set(wanted) - set(self._entries))
        if lost:
            raise ValueError(f"{path / wanted[lost[0]]}: tensor '{lost[0]}': missing, but the index names it. {AGAIN}")

    def keys(self) -> Iterable[str]:
        return self._entries.keys()

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def where(self, key: str) -> str:
        """ "file: tensor 'key'", to begin a message with."""
        file = self._files.get(key)
        return f"{file or self.path}: tensor '{key}'"

    def shape(self, key: str) -> list[int]:
        return list(self._entries[key]["shape"])

    def get(self, key: str) -> torch.Tensor:
        """The tensor. ValueError where it is missing or cannot be read."""
        if key not in self._entries:
            raise ValueError(f"{self.where(key)}: missing. {AGAIN}")
        file = self._files[key]
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, "pt")
            return self._open[file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.where(key)}: cannot be read: {error}. {AGAIN}") from None


class Part:
    """The tensors of one quantised layer: what stands behind its name. `shape`: [N, K] of the model's layer."""

    def __init__(self, tensors: Tensors, name: str, shape: tuple[int, int]):
        self.tensors, self.name, self.shape = tensors, name, shape

    def has(self, suffix: str) -> bool:
        return self.name + suffix in self.tensors

    def where(self, suffix: str) -> str:
        return self.tensors.where(self.name + suffix)

    def get(
        self, suffix: str, dtypes: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int, ...] | None, why: str = ""
    ) -> torch.Tensor:
        """The tensor `name + suffix`; ValueError unless it has one of `dtypes` and `shape`. `why`: what may be so."""
        tensor = self.tensors.get(self.name + suffix)
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        if tensor.dtype not in dtypes or (shape is not None and tuple(tensor.shape) != shape):
            kinds = " or ".join(str(d)[6:] for d in dtypes)
            expected = kinds + ("" if shape is None else f" {list(shape)}")
            raise ValueError(
                f"{self.where(suffix)}: expected {expected}, got {str(tensor.dtype)[6:]} {list(tensor.shape)}. "
                f"{why or 'It does not fit this model or this format.'}"
            )
        return tensor

    def group_order(
        self, suffix: str, columns: int, group_size: int, fits: str, unset: int | None = None
    ) -> torch.Tensor | None:
        """[K] int64 that sorts columns into their groups, from the group of each in `name + suffix`. None where there
        is no such tensor, the groups are neighbours already, or all say `unset`.

        Raises ValueError where a group has not `group_size` columns (the last: what is left); `fits`: what else says
        how large groups are."""
        if not self.has(suffix):
            return None
        index = self.get(suffix, (torch.int32, torch.int64), (columns,)).long()
        neighbours = torch.arange(columns) // group_size
        if torch.equal(index, neighbours) or (unset is not None and bool((index == unset).all())):
            return None
        order = index.argsort(stable=True)
        if not torch.equal(index[order], neighbours):
            raise ValueError(
                f"{self.where(suffix)}: expected each group {group_size} times, got something else. It does not fit "
                f"{fits}, or the file is damaged."
            )
        return order


def _index(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected JSON with a weight_map, got something else ({error}). {AGAIN}") from None
    return found


# ---- nibbles of 32-bit words -----------------------------------------------------------------------------------------


def nibbles(words: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 [R, C] -> uint8 [R, 8 C]: value order[i] of each word's eight is its nibble i, counted from the lowest
    bits."""
    bytes_ = words.contiguous().view(torch.uint8)  # little-endian, as safetensors is
    flat = torch.stack([bytes_ & 15, bytes_ >> 4], -1).view(*words.shape, 8)
    inverse = [order.index(i) for i in range(8)]
    return flat[..., inverse].reshape(words.shape[0], -1)


def words(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """The inverse of `nibbles`; uint8 [R, 8 C] -> int32 [R, C]."""
    eights = values.view(values.shape[0], -1, 8)[..., list(order)]
    bytes_ = eights[..., 0::2] | eights[..., 1::2] << 4
    return bytes_.contiguous().view(torch.int32).view(values.shape[0], -1)
