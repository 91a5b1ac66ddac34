# SPDX-License-Identifier: Apache-2.0
"""The compressed part of one layer: keys as factors, a landmark for each chunk, and the values."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from fastpost.generate.shadow.values import ValueFile, ValueStore
from fastpost.ops.kv_factorize import kv_factorize, kv_project
from fastpost.ops.kv_landmarks import kv_landmarks


@dataclass(frozen=True)
class Sizes:
    """What ShadowCache was told, for one layer."""

    heads: int  # key heads G
    dim: int  # d of a head
    rank: int
    budget: int  # chunks that are chosen for each key head
    chunk: int
    local: int  # chunks at the end that stay dense
    outliers: int  # chunks of a key head that stay exact
    bits: int | None
    value_bits: int | None
    fold: bool
    rotates: bool

    @property
    def kept(self) -> int:
        """Chunks that are there anyway: a prompt's outliers, and as many among the folded ones."""
        return self.outliers * (2 if self.fold else 1)


class Store:
    """Compressed prompts [P, ...] with room for `chunks` chunks each. Rows of a batch, forks and beams read it
    together; who writes must be its only owner (`owned`)."""

    def __init__(self, sizes: Sizes, prompts: int, chunks: int, like: torch.Tensor, file: ValueFile | None) -> None:
        self.sizes, self.prompts, self.chunks, self.like, self.file = sizes, prompts, chunks, like.new_empty(0), file
        self.owners: weakref.WeakSet = weakref.WeakSet()
        s, device = sizes, like.device
        kind = torch.int8 if s.bits == 8 else like.dtype
        # float16 has no range for singular values; bfloat16 models multiply in bfloat16.
        basis = torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float32

        def new(*shape, dtype):
            return torch.zeros(prompts, *shape, dtype=dtype, device=device)

        self.u = new(chunks * s.chunk, s.rank, dtype=kind)
        self.u_scale = new(chunks * s.chunk, dtype=torch.float32) if s.bits == 8 else None
        self.basis = new(s.heads, s.rank, s.dim, dtype=basis)
        self.directions = new(s.heads * s.dim, s.rank, dtype=torch.float32) if s.fold else None
        self.landmark = new(s.heads, chunks, s.dim, dtype=kind)
        self.landmark_scale = new(s.heads, chunks, dtype=torch.float32) if s.bits == 8 else None
        self.error = new(dtype=torch.float32)
        self.values = ValueStore(prompts, s.heads, chunks, s.chunk, s.dim, like, s.value_bits, file)

    def __deepcopy__(self, memo):
        copy = self.arranged(list(range(self.prompts)), self.chunks)
        memo[id(self)] = copy
        return copy

    def own(self, layer) -> None:
        self.owners.add(layer)

    def owned(self, layer) -> bool:
        return len(self.owners) == 1 and layer in self.owners

    def factorize(self, prompt: int, plain: torch.Tensor, rotated: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Compress a prompt: keys before and after their rotation and values, [G, c · chunk, d] each. Returns the
        chunks [G, c] in the order of how badly their landmarks stand for them."""
        s = self.sizes
        factors = kv_factorize(_joint(plain), s.rank, bits=s.bits)
        self.basis[prompt] = factors.basis[0].view(s.rank, s.heads, s.dim).transpose(0, 1)
        if self.directions is not None:
            self.directions[prompt] = factors.directions[0]
        self.error[prompt] = factors.error[0]
        self._put_factors(prompt, 0, factors.u, factors.scale)
        similarity = self._put_rest(prompt, 0, rotated, values)
        return torch.sort(similarity, dim=-1, stable=True).indices.int()

    def fold(self, prompt: int, first: int, plain, rotated, values) -> None:
        """Later chunks, from chunk `first` on, in the directions that the prompt has."""
        u, scale = kv_project(_joint(plain), self.directions[prompt : prompt + 1], bits=self.sizes.bits)
        self._put_factors(prompt, first, u, scale)
        self._put_rest(prompt, first, rotated, values)

    def _put_factors(self, prompt: int, first: int, u: torch.Tensor, scale: torch.Tensor | None) -> None:
        where = slice(first * self.sizes.chunk, first * self.sizes.chunk + u.shape[1])
        self.u[prompt, where] = u[0]
        if scale is not None:
            self.u_scale[prompt, where] = scale[0]

    def _put_rest(self, prompt: int, first: int, rotated, values) -> torch.Tensor:
        s = self.sizes
        found = kv_landmarks(rotated[None], chunk=s.chunk, bits=s.bits)
        where = slice(first, first + found.landmark.shape[2])
        self.landmark[prompt, :, where] = found.landmark[0]
        if found.scale is not None:
            self.landmark_scale[prompt, :, where] = found.scale[0]
        self.values.write(prompt, first, values.unflatten(1, (-1, s.chunk)))
        return found.similarity[0]

    def arranged(self, prompts: list[int], chunks: int) -> Store:
        """A copy with these prompts (one may come twice) and room for so many chunks."""
        other = Store.__new__(Store)
        other.__dict__.update(self.__dict__, prompts=len(prompts), chunks=chunks, owners=weakref.WeakSet())
        index = torch.tensor(prompts, device=self.u.device)
        for name, axis in (("u", 1), ("u_scale", 1), ("landmark", 2), ("landmark_scale", 2)):
            old = getattr(self, name)
            if old is not None:
                kept = min(self.chunks, chunks) * (self.sizes.chunk if axis == 1 else 1)
                room = chunks * (self.sizes.chunk if axis == 1 else 1)
                new = old.new_zeros(len(prompts), *old.shape[1:axis], room, *old.shape[axis + 1 :])
                new.narrow(axis, 0, kept).copy_(old.narrow(axis, 0, kept)[index])
                setattr(other, name, new)
        for name in ("basis", "directions", "error"):
            old = getattr(self, name)
            setattr(other, name, None if old is None else old[index])
        other.values = self.values.arranged(prompts, chunks)
        return other

    def growing_bytes(self) -> dict[str, int]:
        tensors = {"u": self.u, "u_scale": self.u_scale, "landmark": self.landmark,
                   "landmark_scale": self.landmark_scale}  # fmt: skip
        return {name: 0 if t is None else t.nbytes for name, t in tensors.items()}

    def constant_bytes(self) -> int:
        return self.basis.nbytes + (0 if self.directions is None else self.directions.nbytes)


def _joint(keys: torch.Tensor) -> torch.Tensor:
    """[G, n, d] -> [1, n, G · d]: all key heads of a token in one row."""
    return keys.transpose(0, 1).flatten(1)[None]
