# SPDX-License-Identifier: Apache-2.0
"""Computed log-probs on disk, found again by a hash of everything that decides them.

Two hashes, because two questions are asked. `content`: are these the log-probs of this model for these tokens at this
temperature? A run that resumes asks that of its own table. `file_name`: would computing them again give the same bits?
That takes in how rows are packed, the precision, the device and the versions; another run asks it, so what lies in the
cache never changes its numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import fastpost
from fastpost.data.loader import Dataset
from fastpost.hf import adapter, folder, int4_lora
from fastpost.user_cache import file_hash, location

TENSOR = "logprob"


def cache_folder(setting: str | None) -> Path | None:
    """The folder for log-probs in the one that data.cache means; None = none."""
    place = location(setting)
    return place and place / "logprobs"


def model_digest(base: Path, put_on: Path | None) -> str:
    """Hash of the files that decide a model's numbers: config.json, weights, and those of its adapter."""
    # Folders in four bits name their files as they like.
    weights = sorted(base.glob("*.safetensors")) if folder.is_quantized(base) else folder.weight_files(base)
    files = [base / "config.json", *weights]
    files += [put_on / adapter.CONFIG, put_on / adapter.WEIGHTS] if put_on else []
    files += [put_on / int4_lora.FILE] if put_on and (put_on / int4_lora.FILE).is_file() else []
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        return _hash([f"{f.name} {digest}" for f, digest in zip(files, pool.map(file_hash, files), strict=True)])


def rows_digest(dataset: Dataset) -> str:
    """Hash of the tokens of all rows, and of which of them are scored, in order."""
    digest = hashlib.sha256()
    for example in dataset.examples:
        for s in example.sequences:
            digest.update(f"{len(s)} {len(example.sequences)};".encode())
            digest.update(s.ids)
            digest.update(s.trained)
    return digest.hexdigest()


def content(model: str, rows: str, temperature: float) -> str:
    """What was computed: of which model, for which rows, at what temperature."""
    return _hash(["1", model, rows, repr(temperature)])


def file_name(content: str, device: torch.device, *how) -> str:
    """The name in the cache: what was computed, and how, down to what changes the last bits. `how`: the settings that
    do (precision, attention, packing); the device and the versions are looked up here."""
    from fastpost import _core

    if device.type == "cuda":
        where = [torch.cuda.get_device_name(device), torch.version.cuda]
    else:
        isa = dict(_core.build_info())["cpu_isa"]
        where = [isa, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    versions = [fastpost.__version__, torch.__version__, os.environ.get("FASTPOST_REFERENCE", "")]
    return f"{_hash([content, where, versions, [str(x) for x in how]])[:32]}.safetensors"


def read(file: Path, rows: int) -> torch.Tensor | None:
    """The values, float32 [rows, sequences of each], or None when there are none or the file is damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            values = stored.get_tensor(TENSOR)
    except (OSError, SafetensorError):
        return None
    return values if len(values) == rows else None


def write(file: Path, values: torch.Tensor) -> bool:
    """Keep `values`; False when the folder cannot be written, which is no reason to stop a run."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=".unfinished-", dir=file.parent)  # several runs may begin at once
        os.close(handle)
        try:
            save_file({TENSOR: values}, draft)
            os.replace(draft, file)
        except BaseException:
            os.unlink(draft)
            raise
        return True
    except (OSError, SafetensorError):
        return False


def _hash(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
