# SPDX-License-Identifier: Apache-2.0
"""Examples in, one packed Batch out. There is no padding anywhere: sequences lie end to end and `cu_seqlens` says
where."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, fields, replace

import torch

IGNORE = -100
"""Target of a position whose token is not scored; the ops' default ignore_index."""


@dataclass(frozen=True)
class Sequence:
    """One tokenised sequence. `trained[t]` says whether token t is to be predicted (the first one never is)."""

    ids: array  # typecode "i": 4 bytes a token where a list of ints takes 36
    trained: bytes  # 0 or 1 a token
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Example:
    """One row of the data: one sequence, or (chosen, rejected). The stored columns have one number per sequence, or are
    None."""

    row: int
    sequences: tuple[Sequence, ...]
    reference_logprob: tuple[float, ...] | None = None
    previous_logprob: tuple[float, ...] | None = None
    reward: tuple[float, ...] | None = None

    @property
    def tokens(self) -> int:
        return sum(len(s) for s in self.sequences)


@dataclass
class Batch:
    """One packed micro-batch of S sequences and T tokens. For pair objectives sequences 2i, 2i+1 are chosen, rejected
    of pair i."""

    input_ids: torch.Tensor  # int64 [1, T]
    position_ids: torch.Tensor  # int64 [1, T], from 0 in each sequence
    cu_seqlens: torch.Tensor  # int32 [S+1], cu_seqlens[0] = 0, cu_seqlens[S] = T
    target: torch.Tensor  # int64 [T], already shifted: target[t] is token t+1 of the same sequence, or -100
    reference_logprob: torch.Tensor | None  # float32 [S], sums over scored tokens
    previous_logprob: torch.Tensor | None  # float32 [S]
    reward: torch.Tensor | None  # float32 [S]
    rows: list[int]  # dataset row of each pair (or sequence)
    longest: int  # tokens in the longest sequence (on the host: varlen kernels ask for it at launch)

    @property
    def tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    @property
    def scored(self) -> int:
        """Number of positions with a target. Waits for the device, so count before moving."""
        return int((self.target != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in moved.items()}
        return replace(self, **moved)


def collate(examples: list[Example]) -> Batch:
    """Pack examples in the order given."""
    if not examples:
        raise ValueError("[collate] examples: expected at least one, got none.")
    sequences = [s for e in examples for s in e.sequences]
    ids, positions, target, ends = array("i"), [], [], [0]
    for s in sequences:
        ids.extend(s.ids)
        positions += range(len(s))
        # The one place where targets are shifted: position t is scored when token t+1 is trained.
        target += [i if on else IGNORE for i, on in zip(s.ids[1:], s.trained[1:], strict=True)] + [IGNORE]
        ends.append(len(ids))
    return Batch(
        input_ids=torch.tensor(ids, dtype=torch.int64)[None],
        position_ids=torch.tensor(positions, dtype=torch.int64)[None],
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        target=torch.tensor(target, dtype=torch.int64),
        reference_logprob=_column(examples, "reference_logprob"),
        previous_logprob=_column(examples, "previous_logprob"),
        reward=_column(examples, "reward"),
        rows=[e.row for e in examples],
        longest=max(len(s) for s in sequences),
    )


def _column(examples: list[Example], name: str) -> torch.Tensor | None:
    values = [getattr(e, name) for e in examples]
    if all(v is None for v in values):
        return None
    if any(v is None for v in values):
        missing = next(e.row for e in examples if getattr(e, name) is None)
        raise ValueError(
            f"data row {missing}: {name}: other rows have it, this one has not. Fill it or drop the column."
        )
    return torch.tensor([x for v in values for x in v], dtype=torch.float32)
