# SPDX-License-Identifier: Apache-2.0
"""Where to compute."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "[train] train.device: expected a CUDA GPU, torch finds none. Use cpu or auto; `fastpost env` says more."
        )
    return torch.device(name)
