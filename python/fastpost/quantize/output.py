# SPDX-License-Identifier: Apache-2.0
"""The folder that comes out: shards one after another, the other files as they were, and a note on what was done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastpost.hf import folder, int4_awq, int4_gptq
from fastpost.hf.int4_quantizer import config_of, linears
from fastpost.int4 import Int4Weight
from fastpost.nn import Int4Linear

from .blocks import Blocks
from .layer_files import Layer

NOTE = "fastpost_quantization.json"
SHARD_BYTES = 2 << 30


def read_note(path: str | Path) -> dict | None:
    """What a folder says of how it was quantised, or None."""
    file = Path(path) / NOTE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def expect_plain(path: Path) -> None:
    """Raise ValueError when a model folder is quantised already."""
    note = read_note(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    found = config.get("quantization_config") or config.get("compression_config")
    if note or found:
        method = note["method"] if note else (found.get("quant_method") if isinstance(found, dict) else found)
        raise ValueError(
            f"{path}: expected a model in full precision, got one that is quantised already ({method}). Rounding twice "
            "only loses: quantise the model that it was made from."
        )


def plain_dtype(path: Path) -> torch.dtype:
    """In what dequantised weights are written: bfloat16, but float16 in a folder of float16."""
    return torch.float16 if folder.stored_dtype(path) == torch.float16 else torch.bfloat16


def write_folder(blocks: Blocks, layers: Callable[[], Iterator[Layer]], out: Path, form: str, note: dict) -> None:
    """Write the model with finished `layers()` into the empty folder `out`.

    form: bf16, where the keys are those of the source, or a four-bit format: fastpost, gptq or awq."""
    writer, pack = _Shards(out), _Packed(form, layers)
    for key in blocks.stored.entries:
        if not key.startswith(blocks.prefix):
            writer.add(key, blocks.stored.get(key))
    for i, layer in enumerate(layers()):
        for name, tensor in layer.tensors.items():
            writer.add(f"{blocks.prefix}{i}.{name}", tensor)
        if layer.int4:
            for key, tensor in pack.tensors({f"{blocks.prefix}{i}.{n}": w for n, w in layer.int4.items()}).items():
                writer.add(key, tensor)
    writer.close()
    for file in sorted(blocks.path.iterdir()):
        weights = file.suffix in (".safetensors", *folder.PICKLED) or file.name.endswith(".index.json")
        if file.is_file() and not file.name.startswith(".") and not weights:
            shutil.copyfile(file, out / file.name)
    if form != "bf16":
        file = out / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["quantization_config"] = pack.config([n for n in linears(blocks.model) if not pack.has(n)])
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / NOTE).write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in out.glob("*.safetensors"):  # written for the owner alone, unlike every other file
        file.chmod((out / "config.json").stat().st_mode & 0o777)


class _Packed:
    """Four-bit weights as a format stores them, a block at a time; what is said once of all is made up at the end."""

    def __init__(self, form: str, layers: Callable[[], Iterator[Layer]]):
        self.form, self._config = form, {}
        self._shapes: dict[str, Int4Weight] = {}
        # Version 1 of GPTQ's format has no place for a zero point of 0, and one folder is of one version.
        self._second = form == "gptq" and any(
            bool((w.zeros == 0).any()) for layer in layers() for w in layer.int4.values() if w.zeros is not None
        )

    def has(self, name: str) -> bool:
        return name in self._shapes

    def tensors(self, weights: dict[str, Int4Weight]) -> dict[str, torch.Tensor]:
        self._shapes |= {name: weight.to("meta") for name, weight in weights.items()}
        if self.form == "fastpost":
            return {
                k: t for n, w in weights.items() for k, t in Int4Linear.from_int4(w).state_dict(prefix=f"{n}.").items()
            }
        found, config = {"gptq": int4_gptq, "awq": int4_awq}[self.form].tensors(weights)
        if self._second and config["checkpoint_format"] != "gptq_v2":
            for key in (k for k in found if k.endswith(".qzeros")):
                found[key] = int4_gptq._whole(found[key].long() + int4_gptq.ONES)
            config["checkpoint_format"] = "gptq_v2"
        self._config = self._config or config
        return found

    def config(self, skip: list[str]) -> dict:
        """The quantization_config. skip: linear layers that stayed as they were."""
        if self.form == "fastpost":
            return config_of(self._shapes, skip).to_dict()
        return self._config | ({"modules_to_not_convert": skip} if self.form == "awq" else {})


class _Shards:
    """Tensors to files of at most SHARD_BYTES, with an index when it is more than one."""

    def __init__(self, out: Path):
        self.out, self.held, self.size, self.files, self.total = out, {}, 0, [], 0

    def add(self, key: str, tensor: torch.Tensor) -> None:
        if self.held and self.size + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self.held[key] = tensor.cpu().contiguous().clone()  # safetensors refuses shared memory
        self.size += tensor.nbytes

    def close(self) -> None:
        self._flush()
        if len(self.files) == 1:
            self.files[0][0].rename(self.out / "model.safetensors")
            return
        places = {}
        for i, (file, keys) in enumerate(self.files, 1):
            name = f"model-{i:05d}-of-{len(self.files):05d}.safetensors"
            file.rename(self.out / name)
            places |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
        (self.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        file = self.out / f"shard-{len(self.files)}.safetensors"
        save_file(self.held, file, metadata={"format": "pt"})
        self.files.append((file, list(self.held)))
        self.total += self.size
        self.held, self.size = {}, 0
