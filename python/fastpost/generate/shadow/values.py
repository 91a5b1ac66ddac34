# SPDX-License-Identifier: Apache-2.0
"""Values of a compressed prompt, chunk by chunk: in host memory (pinned where the model is on a GPU), in a
memory-mapped file, or in int8 with a scale for each token."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import weakref
from pathlib import Path

import torch

from fastpost.reference._int8_rows import quantize_rows, widen_rows

WHO = "ShadowCache"
PAGE = mmap.ALLOCATIONGRANULARITY


class ValueFile:
    """A file that tensors are mapped from. It is made new, belongs to one cache, and goes when that cache goes.

    Space is claimed with posix_fallocate before it is mapped: a full disk is an OSError here, not a SIGBUS later.
    """

    def __init__(self, path) -> None:
        self.path = Path(path)
        try:
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ValueError(
                f"[{WHO}] value_file: expected a path where nothing is yet, got {self.path}. It is written anew and "
                "removed with the cache; choose another name, or remove it."
            ) from None
        except OSError as error:
            raise OSError(error.errno, f"[{WHO}] value_file: cannot make {self.path}: {error.strerror}") from None
        self.size = 0
        self.spare: list[tuple[int, int]] = []  # (offset, bytes) that were given back
        self._close = weakref.finalize(self, _remove, self.handle, self.path)

    def __deepcopy__(self, memo):
        return self  # a copied cache has its copies in memory and grows in the same file

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A new tensor in the file; its space is used again once the tensor and all views of it are gone."""
        wanted = max(1, torch.Size(shape).numel()) * dtype.itemsize
        offset, length = self._claim(-(-wanted // PAGE) * PAGE)
        region = mmap.mmap(self.handle, length, offset=offset)
        weakref.finalize(region, self.spare.append, (offset, length))
        return torch.frombuffer(region, dtype=dtype, count=torch.Size(shape).numel()).view(shape)

    def _claim(self, length: int) -> tuple[int, int]:
        for i, (offset, there) in enumerate(self.spare):
            if there >= length:
                self.spare.pop(i)
                if there > length:
                    self.spare.append((offset + length, there - length))
                return offset, length
        try:
            os.posix_fallocate(self.handle, self.size, length)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            free = shutil.disk_usage(self.path.parent).free
            raise OSError(
                error.errno,
                f"[{WHO}] value_file: {self.path} needs {length} bytes more (it has {self.size}) and its disk has "
                f"{free} free: {os.strerror(error.errno)}. Free some space, choose another disk, or value_bits=8.",
            ) from None
        self.size += length
        return self.size - length, length


def _remove(handle: int, path: Path) -> None:
    os.close(handle)
    path.unlink(missing_ok=True)


class ValueStore:
    """[P, G, C, chunk, d] values of P prompts, int8 with scales [P, G, C, chunk] if bits is 8."""

    def __init__(self, prompts: int, heads: int, chunks: int, chunk: int, dim: int, like: torch.Tensor,
                 bits: int | None, file: ValueFile | None) -> None:  # fmt: skip
        self.shape, self.bits, self.file = (prompts, heads, chunks, chunk, dim), bits, file
        self.dtype, self.device = like.dtype, like.device
        self.values = self._new(self.shape, torch.int8 if bits == 8 else self.dtype)
        self.scale = self._new(self.shape[:-1], torch.float32) if bits == 8 else None

    @property
    def direct(self) -> bool:
        """Whether attention may read the values where they lie: no copy, no scale."""
        return self.bits is None and self.device.type == "cpu"

    def _new(self, shape, dtype: torch.dtype) -> torch.Tensor:
        if self.file is not None:
            return self.file.tensor(shape, dtype)
        return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=self.device.type == "cuda")

    def write(self, prompt: int, first: int, values: torch.Tensor) -> None:
        """values [G, n, chunk, d] become chunks first to first + n of a prompt."""
        where = slice(first, first + values.shape[1])
        if self.bits == 8:
            quantized, scale = quantize_rows(values)
            self.scale[prompt, :, where] = scale.to(self.scale.device)
            values = quantized
        self.values[prompt, :, where] = values.to(self.values.device)

    def read(self, prompt: int, first: int, last: int) -> torch.Tensor:
        """[G, last - first, chunk, d] on the device and in the dtype of the model."""
        scale = None if self.scale is None else self.scale[prompt, :, first:last].to(self.device)
        return widen_rows(self.values[prompt, :, first:last].to(self.device), scale, self.dtype)

    def arranged(self, prompts: list[int], chunks: int) -> ValueStore:
        """A copy with these prompts and room for so many chunks."""
        other = ValueStore(len(prompts), self.shape[1], chunks, *self.shape[3:],
                           torch.empty(0, dtype=self.dtype, device=self.device), self.bits, self.file)  # fmt: skip
        kept = min(chunks, self.shape[2])
        for old, new in ((self.values, other.values), (self.scale, other.scale)):
            if old is not None:
                for i, prompt in enumerate(prompts):
                    new[i, :, :kept] = old[prompt, :, :kept]
        return other

    def bytes(self) -> int:
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)
