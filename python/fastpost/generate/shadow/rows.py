# SPDX-License-Identifier: Apache-2.0
"""What all layers of a ShadowCache share: how many tokens each row has, how many of them are compressed, and the tables
of RoPE. One forward of the model is planned once, by the first layer that comes, and done by all."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch

from fastpost.generate.shadow.rope import Rope

WHO = "ShadowCache"
FOLD = 8  # chunks that are folded at a time: the ops cost the same for one


@dataclass(eq=False)
class Step:
    """One forward: T new columns for B rows, of which row b has new[b] real tokens."""

    tokens: int
    new: list[int]
    first: bool  # the cache was empty
    real: torch.Tensor | None  # [B, T] bool, None: all
    index: torch.Tensor | None  # of the real ones among B · T, None: all
    cu_seqlens: torch.Tensor | None  # [B + 1] int32, None: one token each
    before: list[tuple[int, int]]  # (row, chunks) to compress before attending
    after: list[tuple[int, int, int]]  # (row, chunks it has, chunks it shall have) once attended
    unshare: list[int] | None  # the prompt of each row, where rows get a prompt of their own first
    counts: list[int]  # compressed chunks of each row while attending
    count: torch.Tensor  # the same, [B] int32
    source: torch.Tensor  # [B] int32: which prompt each row reads
    length: torch.Tensor  # [B] int32: of the dense tail, new tokens included
    longest: int


class Rows:
    def __init__(self, chunk: int, local: int, dense_below: int, fold: bool, rope: Rope) -> None:
        self.chunk, self.local, self.dense_below, self.fold, self.rope = chunk, local, dense_below, fold, rope
        self.layers: list = []  # those that attend by themselves
        self.reset()

    def reset(self) -> None:
        self.columns = 0
        self.started = False  # one token at a time has begun
        self.told = False
        self.length: list[int] = []  # real tokens of each row
        self.prompt: list[int] = []  # the leading ones that came several at a time
        self.counts: list[int] = []
        self.source: list[int] = []
        self.prompts = 0  # P of the stores
        self.history: list[tuple[int, torch.Tensor | None]] = []  # columns of each forward, and which were real
        self.step: Step | None = None
        self.line: tuple[torch.Tensor, torch.Tensor] | None = None  # tables of positions 0, 1, … [1, S, w]
        self.own: tuple[torch.Tensor, torch.Tensor] | None = None  # or of each row's tokens [B, S, w]
        self._by_prompt: tuple | None = None

    # ---- a forward ----

    def begin(self, layer, batch: int, tokens: int, padding, position_ids, like: torch.Tensor) -> Step:
        """The plan of the forward that `layer` is in."""
        if layer.columns == self.columns:
            behind = [other.index for other in self.layers if other.columns != self.columns]
            if behind:
                raise ValueError(
                    f"[{WHO}] layers {behind} were left out of the last forward: it was interrupted, or came from a "
                    "model with fewer layers. Call reset(), and use one cache for one model."
                )
            self.step = self._plan(batch, tokens, padding, position_ids, like)
            self.columns += tokens
        elif self.step in (None, layer.entered) or (layer.columns + tokens, tokens) != (self.columns, self.step.tokens):
            raise ValueError(
                f"[{WHO}] layer {layer.index} has {layer.columns} tokens and got {tokens} more where the others have "
                f"{self.columns}: a forward was interrupted. Call reset()."
            )
        layer.entered = self.step
        return self.step

    def _plan(self, batch: int, tokens: int, padding, position_ids, like: torch.Tensor) -> Step:
        first = self.columns == 0
        if first:
            self.length, self.prompt, self.counts = [0] * batch, [0] * batch, [0] * batch
            self.source, self.prompts = list(range(batch)), batch
        if batch != len(self.length):
            raise ValueError(
                f"[{WHO}] batch: expected {len(self.length)} rows, which the cache holds, got {batch}. Call reset(), "
                "or batch_repeat_interleave, batch_select_indices or fork for other rows."
            )
        real = self._real(tokens, padding, like)
        new = [tokens] * batch if real is None else real.sum(1).tolist()
        before = self._to_compress(self.length) if tokens == 1 else []
        if tokens == 1 and not first:
            self._say_what_stays_dense()
        self._note_positions(position_ids, tokens, real, new, like)
        if self.history and self.history[-1][1] is None and real is None:
            self.history[-1] = (self.history[-1][0] + tokens, None)
        else:
            self.history.append((tokens, real))
        self.length = [n + more for n, more in zip(self.length, new)]
        self.started |= tokens == 1
        if not self.started:
            self.prompt = list(self.length)
        for row, count in before:
            self.counts[row] = count
        counts = list(self.counts)
        after = []
        if first and tokens > 1:
            self._find_equal(like, real)
            after = [(row, 0, count) for row, count in self._to_compress(self.length)]
        elif self.fold:
            spare = [(n - c * self.chunk) // self.chunk - self.local for n, c in zip(self.length, counts)]
            after = [(row, counts[row], counts[row] + m)
                     for row, m in enumerate(spare) if counts[row] and m >= FOLD]  # fmt: skip
        unshare = None
        if not first and (before or after) and (self.source != list(range(batch)) or self.prompts != batch):
            unshare, self.source, self.prompts = self.source, list(range(batch)), batch
        for row, _, count in after:
            self.counts[row] = count
        return self._step(tokens, new, first, real, before, after, unshare, counts, like.device)

    def _step(self, tokens, new, first, real, before, after, unshare, counts, device) -> Step:
        old, chunk = self.step, self.chunk
        tails = [n - c * chunk for n, c in zip(self.length, counts)]
        usual = old is not None and tokens == old.tokens == 1 and real is None and old.real is None
        if usual and not (before or unshare or old.after):
            old.length.add_(1)  # no new tensors, and nothing to copy to the device, in the usual step
            return Step(1, new, False, None, None, None, before, after, unshare, counts, old.count, old.source,
                        old.length, max(tails))  # fmt: skip

        def on_device(numbers):
            return torch.tensor(numbers, dtype=torch.int32).to(device)

        cu_seqlens = index = None
        if tokens > 1 or real is not None:
            cu_seqlens = on_device([0, *torch.tensor(new).cumsum(0).tolist()])
        if real is not None:
            index = real.flatten().nonzero().flatten()
        return Step(tokens, new, first, real, index, cu_seqlens, before, after, unshare, counts, on_device(counts),
                    on_device(self.source), on_device(tails), max(tails))  # fmt: skip

    def _real(self, tokens: int, padding: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        if padding is None:
            return None
        if padding.shape[1] != self.columns + tokens:
            raise ValueError(
                f"[{WHO}] attention_mask: expected {self.columns + tokens} columns ({self.columns} in the cache and "
                f"{tokens} new), got {padding.shape[1]}. Pass the mask of the whole input."
            )
        if tokens == 1 and self.started and like.is_cuda:
            return None  # looking would wait for the GPU; a token that is generated is real
        real = padding[:, -tokens:].bool()
        return None if bool(real.all()) else real

    def _find_equal(self, keys: torch.Tensor, real: torch.Tensor | None) -> None:
        """Rows that follow a row with the same tokens (beams, several samples) read its prompt. The first layer's keys
        tell: they are the same for no other tokens at these positions."""
        self.source = [0]
        for b in range(1, len(keys)):
            equal = torch.equal(keys[b], keys[b - 1]) and (real is None or torch.equal(real[b], real[b - 1]))
            self.source.append(self.source[-1] + (not equal))
        self.prompts = self.source[-1] + 1

    def _to_compress(self, length: list[int]) -> list[tuple[int, int]]:
        """Rows that are dense and long enough, with how many chunks of them to compress."""
        eligible = length if self.fold or not self.started else self.prompt
        return [(row, max(n // self.chunk - self.local, 0)) for row, n in enumerate(eligible)
                if not self.counts[row] and n >= self.dense_below and n // self.chunk > self.local]  # fmt: skip

    def _say_what_stays_dense(self) -> None:
        short = [n for n, c in zip(self.length, self.counts) if not c and n < self.dense_below]
        if short and not (self.told or self.started):
            self.told = True
            warnings.warn(
                f"[{WHO}] {len(short)} of {len(self.length)} prompts have {min(short)} to {max(short)} tokens, fewer "
                f"than the {self.dense_below} of budget, outliers and local window: they are kept dense.",
                stacklevel=2,
            )

    # ---- tables of RoPE ----

    def _note_positions(self, position_ids, tokens: int, real, new: list[int], like: torch.Tensor) -> None:
        """One table serves all rows as long as token i of a row is at position i; else every row has its own."""
        batch, device = len(self.length), like.device
        if position_ids is not None and position_ids.dim() == 3:
            position_ids = position_ids[0]  # several kinds of position, the same in text
        if self.own is None and not self.rope.changing:
            if position_ids is None or (tokens == 1 and self.started):
                return
            expected = [torch.arange(n, n + more, device=device) for n, more in zip(self.length, new)]
            rows = position_ids.expand(batch, -1)
            if all(torch.equal(row if real is None else row[real[b]], expected[b]) for b, row in enumerate(rows)):
                return
        if position_ids is None:
            position_ids = torch.tensor(self.length, device=device)[:, None] + torch.arange(tokens, device=device)
        longest = max(n + more for n, more in zip(self.length, new))
        if self.own is None:
            line = self._line(max(self.length), like) if max(self.length) else None
            self._grow_own(batch, longest, like)
            if line is not None:
                for own, table in zip(self.own, line):
                    own[:, : max(self.length)] = table[:, : max(self.length)]
        self._grow_own(batch, longest, like)
        for own, table in zip(self.own, self.rope.tables(position_ids, like.dtype)):
            for b, n in enumerate(self.length):
                row = table[b if len(table) > 1 else 0]
                own[b, n : n + new[b]] = row if real is None else row[real[b]]
        self._by_prompt = None

    def _grow_own(self, batch: int, tokens: int, like: torch.Tensor) -> None:
        there = 0 if self.own is None else self.own[0].shape[1]
        if there >= tokens:
            return
        kind = torch.float32 if like.dtype == torch.float16 else like.dtype
        made = [torch.zeros(batch, max(tokens, there * 3 // 2), self.rope.width, dtype=kind, device=like.device)
                for _ in range(2)]  # fmt: skip
        if self.own is not None:
            for new, old in zip(made, self.own):
                new[:, :there] = old
        self.own, self._by_prompt = tuple(made), None

    def _line(self, tokens: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.line is None or self.line[0].shape[1] < tokens:
            self.line = self.rope.tables(torch.arange(tokens, device=like.device)[None], like.dtype)
        return self.line

    def row_tables(self, row: int, first: int, last: int, like: torch.Tensor):
        """cos, sin [last - first, w] of a row's tokens."""
        if self.own is not None:
            return tuple(t[row, first:last] for t in self.own)
        return tuple(t[0, first:last] for t in self._line(last, like))

    def prompt_tables(self, tokens: int, like: torch.Tensor):
        """cos, sin [1 or P, S, w] with S at least `tokens`, for kv_reconstruct."""
        if self.own is None:
            return self._line(tokens, like)
        self._grow_own(len(self.length), tokens, like)
        if self._by_prompt is None:
            reader = [self.source.index(p) if p in self.source else 0 for p in range(self.prompts)]
            same = reader == list(range(len(self.length)))
            self._by_prompt = self.own if same else tuple(t[reader] for t in self.own)
        return self._by_prompt

    # ---- other rows, fewer tokens ----

    def select(self, rows: list[int]) -> None:
        for name in ("length", "prompt", "counts", "source"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        self.history = [(n, None if real is None else real[rows]) for n, real in self.history]
        if self.own is not None:
            self.own = tuple(t[rows] for t in self.own)
        self._by_prompt = self.step = None

    def drop_unread(self) -> list[int] | None:
        """The prompts to keep, where some are read by no row any more; None: all."""
        used = sorted(set(self.source))
        if len(used) == self.prompts:
            return None
        self.source, self.prompts = [used.index(p) for p in self.source], len(used)
        self._by_prompt = None
        return used

    def crop(self, columns: int) -> list[tuple[int, int]]:
        """Take off so many columns. Returns (compressed chunks, length of the tail) of each row."""
        left = columns = min(columns, self.columns)
        while left:
            there, real = self.history.pop()
            n = min(there, left)
            gone = [n] * len(self.length) if real is None else real[:, there - n :].sum(1).tolist()
            self.length = [old - g for old, g in zip(self.length, gone)]
            if there > n:
                self.history.append((there - n, None if real is None else real[:, : there - n]))
            left -= n
        self.columns -= columns
        self.prompt = [min(p, n) for p, n in zip(self.prompt, self.length)]
        self.counts = [min(c, n // self.chunk) for c, n in zip(self.counts, self.length)]
        self.step = None
        if not self.columns:
            self.reset()
        return [(c, n - c * self.chunk) for c, n in zip(self.counts, self.length)]

    def forked(self) -> Rows:
        other = copy.copy(self)
        other.layers = []
        for name in ("length", "prompt", "counts", "source", "history"):
            setattr(other, name, list(getattr(self, name)))
        if self.own is not None:
            other.own = tuple(t.clone() for t in self.own)
        other.step = other._by_prompt = None
        return other
