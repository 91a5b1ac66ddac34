# SPDX-License-Identifier: Apache-2.0
"""Examples in, one packed Batch out. There is no padding anywhere: sequences lie end to end and `cu_seqlens` says
where. The prompt that the replies of an example share is there once: it stands before the first of them, and the
others see it through `cu_seqlens_k`."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise

import torch

IGNORE = -100
"""Target of a position whose token is not scored; the ops' default ignore_index."""


@dataclass(frozen=True)
class Sequence:
    """One tokenised sequence. `trained[t]` says whether token t is to be predicted (the first one never is)."""

    ids: array  # typecode "i": 4 bytes a token where a list of ints takes 36
    trained: bytes  # 0 or 1 a token
    truncated: bool = False
    split: int | None = None  # the reply has two parts, and the second begins at this token

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def first_scored(self) -> int:
        """The first position at which the next token is scored (the last position, when none is)."""
        at = self.trained.find(1, 1)
        return len(self.ids) - 1 if at < 0 else at - 1


@dataclass(frozen=True)
class Example:
    """One row of the data: one sequence, or (chosen, rejected). The stored columns have one number per sequence, or are
    None."""

    row: int
    sequences: tuple[Sequence, ...]
    reference_logprob: tuple[float, ...] | None = None
    previous_logprob: tuple[float, ...] | None = None
    reward: tuple[float, ...] | None = None
    packed: bool = False  # the sequences are documents of one block, not the replies of one row

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(s) for s in self.sequences)

    @cached_property
    def shared(self) -> int:
        """Tokens that all sequences begin with and at none of which a token is scored, so one copy serves all: the
        prompt but for its last token, at which the first token of each reply is scored."""
        first, *others = self.sequences
        if not others:
            return 0
        n = min(s.first_scored for s in self.sequences)
        for s in others:
            n = next((t for t in range(n) if s.ids[t] != first.ids[t]), n)
        return n

    @property
    def computed(self) -> int:
        """Tokens that a batch computes: all, less the copies of what is shared."""
        return self.tokens - (len(self.sequences) - 1) * self.shared


@dataclass
class Batch:
    """One packed micro-batch of S sequences and T tokens. For pair objectives sequences 2i, 2i+1 are chosen, rejected
    of pair i.

    A sequence with more keys than tokens of its own begins with a shared prompt: its first keys are the first tokens of
    the nearest sequence before it that has them itself. Scores are never shared, so to the loss it is a sequence like
    any other."""

    input_ids: torch.Tensor  # int64 [1, T]
    position_ids: torch.Tensor  # int64 [1, T], counted from 0 in each sequence, shared tokens included
    cu_seqlens: torch.Tensor  # int32 [S+1], cu_seqlens[0] = 0, cu_seqlens[S] = T
    cu_seqlens_k: torch.Tensor | None  # int32 [S+1], the same with the shared tokens counted; None = nothing is shared
    key_rows: torch.Tensor | None  # int64 [cu_seqlens_k[S]], where in T each key stands; None = nothing is shared
    target: torch.Tensor  # int64 [T], already shifted: target[t] is token t+1 of the same sequence, or -100
    reference_logprob: torch.Tensor | None  # float32 [S], sums over scored tokens
    previous_logprob: torch.Tensor | None  # float32 [S]
    reward: torch.Tensor | None  # float32 [S]
    rows: list[int]  # dataset row of each pair (or sequence)
    longest: int  # tokens in the longest sequence, shared ones included (varlen kernels ask for it at launch)
    kl: torch.Tensor | None = None  # float32 [1], KTO's estimate for the whole step, the same in all its micro-batches
    cu_parts: torch.Tensor | None = None  # int32 [2S+1], where the two parts of each sequence are scored; None = whole

    @property
    def cu_scored(self) -> torch.Tensor:
        """Bounds of what is summed into one log-prob: sequences, or the two parts of each."""
        return self.cu_seqlens if self.cu_parts is None else self.cu_parts

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


def collate(examples: list[Example], share_prompt: bool = True) -> Batch:
    """Pack examples in the order given; with share_prompt what the sequences of an example share is there once."""
    if not examples:
        raise ValueError("[collate] examples: expected at least one, got none.")
    ids, positions, target, key_rows, ends, ends_k, parts = array("i"), [], [], [], [0], [0], [0]
    for example in examples:
        begin = len(ids)
        for i, s in enumerate(example.sequences):
            past = example.shared if share_prompt and i else 0
            key_rows += range(begin, begin + past)
            key_rows += range(len(ids), len(ids) + len(s) - past)
            ids.extend(s.ids[past:])
            positions += range(past, len(s))
            # The one place where targets are shifted: position t is scored when token t+1 is trained.
            scored = zip(s.ids[past + 1 :], s.trained[past + 1 :], strict=True)
            target += [token if on else IGNORE for token, on in scored] + [IGNORE]
            # Where token `split` is predicted the second part begins to be scored.
            parts += [] if s.split is None else [len(ids) - len(s) + s.split - 1, len(ids)]
            ends.append(len(ids))
            ends_k.append(len(key_rows))
    sharing = len(key_rows) > len(ids)
    if len(parts) not in (1, 2 * len(ends) - 1):
        raise ValueError("[collate] examples: some sequences have two parts and some have not. Do not mix them.")
    return Batch(
        input_ids=torch.tensor(ids, dtype=torch.int64)[None],
        position_ids=torch.tensor(positions, dtype=torch.int64)[None],
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(ends_k, dtype=torch.int32) if sharing else None,
        key_rows=torch.tensor(key_rows, dtype=torch.int64) if sharing else None,
        target=torch.tensor(target, dtype=torch.int64),
        reference_logprob=_column(examples, "reference_logprob"),
        previous_logprob=_column(examples, "previous_logprob"),
        reward=_column(examples, "reward"),
        rows=[e.row for e in examples for _ in (e.sequences if e.packed else (0,))],
        longest=max(b - a for a, b in pairwise(ends_k)),
        cu_parts=torch.tensor(parts, dtype=torch.int32) if len(parts) > 1 else None,
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
