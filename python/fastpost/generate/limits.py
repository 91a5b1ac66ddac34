# SPDX-License-Identifier: Apache-2.0
"""What a model and its cache can take: each check says what to change."""

from __future__ import annotations

from dataclasses import dataclass

from fastpost.generate.handle import Handle
from fastpost.generate.request import Sampling


@dataclass(frozen=True)
class Limits:
    vocab: int
    length: int  # positions of the model
    pages: int
    page: int

    def ids(self, name: str, ids: list[int]) -> None:
        if ids and (min(ids) < 0 or max(ids) >= self.vocab):
            wrong = next(t for t in ids if not 0 <= t < self.vocab)
            raise ValueError(
                f"[Engine] {name}: expected token ids in [0, {self.vocab}), got {wrong}. Use the model's own tokenizer."
            )

    def prompt(self, known: int, s: Sampling) -> None:
        """Whether `known` tokens can be gone on from, alone in the cache if need be."""
        if known >= self.length:
            raise ValueError(
                f"[Engine] prompt: expected fewer than the model's {self.length} positions, got {known} tokens. "
                "Shorten it."
            )
        # The last token that is sampled needs no place.
        most = min(known + s.max_new_tokens - 1, self.length)
        if -(-most // self.page) > self.pages:
            raise ValueError(
                f"[Engine] prompt, max_new_tokens: expected at most {self.pages * self.page} positions ({self.pages} "
                f"pages of {self.page}), got {most}. Give the engine more pages or memory, or ask for fewer tokens."
            )

    def room(self, handle: Handle, s: Sampling, more: int) -> None:
        """Whether an answer with `more` tokens may grow by another."""
        have = len(handle.token_ids) + more
        if have >= s.max_new_tokens or len(handle) + more >= self.length:
            limit = min(s.max_new_tokens, self.length - len(handle.prompt))
            raise ValueError(
                f"[Engine] max_new_tokens: expected more than the {have} tokens that the answer has, got {limit}. "
                "Raise it in the sampling."
            )
        self.prompt(len(handle.prompt), s)

    def probe(self, length: int) -> None:
        if length > self.length:
            raise ValueError(f"[Engine] probe: expected at most {self.length} tokens, got {length}. Probe with fewer.")
