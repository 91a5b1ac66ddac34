# SPDX-License-Identifier: Apache-2.0
"""The user's cache: tokenised files, log-probs of frozen models and what is built in. Safe to delete at any time."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/fastpost, by default ~/.cache/fastpost."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "fastpost"


def location(setting: str | None) -> Path | None:
    """The folder that data.cache means; None = no cache."""
    if setting is None:
        return None
    return cache_dir() if setting == "auto" else Path(setting).expanduser()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, about a second for each GB."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
