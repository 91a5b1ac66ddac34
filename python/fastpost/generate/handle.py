# SPDX-License-Identifier: Apache-2.0
"""One sequence in the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from fastpost.generate.pages import ROOT
from fastpost.generate.request import Completion, FinishReason, Piece, Sampling
from fastpost.generate.sampling import stream
from fastpost.generate.text import Text, decode


class Handle:
    """An answer of a request, or a fork of one; running, waiting or finished. Only the engine changes it.

    Attributes:
        id, index: of its request, and which of its answers.
        prompt, token_ids: what was given, what was sampled so far.
        finish_reason: None while it goes on.
    """

    def __init__(self, tokenizer, id: str | int, index: int, prompt: list[int], sampling: Sampling, order: tuple,
                 listener: Callable[[Piece], None] | None):  # fmt: skip
        self.id, self.index, self.prompt = id, index, prompt
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop: str | None = None
        self.order = order  # of arrival: who came first runs first
        self.listener = listener
        self.siblings: list[Handle] = []  # answers that begin when this one's prompt is computed; it is their leader
        self.leader: Handle | None = None
        self.free_indices: Iterator[int] | None = None  # of the request, for forks; all its answers have the same
        self.logprobs: list[float | None] = []
        self.top_logprobs: list[list[tuple[int, float]] | None] = []
        # Pages hold the first `cached` tokens of prompt and answer; `nodes`: of those that are recorded (pages.py).
        self.cached = 0
        self.pages: list[int] = []
        self.nodes: list[int] = []
        self.table = np.zeros(8, dtype=np.int32)  # self.pages once more, ready to be copied
        self._tokenizer = tokenizer
        self._heard = 0  # tokens that the listener was told, and one more when it was told the end
        self.set_sampling(sampling)

    def __repr__(self) -> str:
        state = self.finish_reason or f"{self.cached} of {len(self)} tokens computed"
        return f"Handle({self.id!r}, {self.index}: {len(self.prompt)} + {len(self.token_ids)} tokens, {state})"

    def __len__(self) -> int:
        return len(self.prompt) + len(self.token_ids)

    @property
    def text(self) -> str:
        """Of what was sampled so far, without special tokens and stop string; broken bytes at the end as U+FFFD."""
        if self._text is None:
            return "" if self._tokenizer is None else decode(self._tokenizer, self.token_ids)
        whole = self._rewritten()
        whole.push([], last=True)
        return whole.text

    @property
    def position(self) -> int:
        return len(self.token_ids)

    @property
    def last_node(self) -> int:
        return self.nodes[-1] if self.nodes else ROOT

    def so_far(self) -> list[int]:
        return self.prompt + self.token_ids

    def seen(self) -> list[int]:
        if self._seen is None:
            self._seen = dict.fromkeys(self.so_far())
        return list(self._seen)

    def token(self, i: int) -> int:
        n = len(self.prompt)
        return self.token_ids[i - n] if i >= n else self.prompt[i]

    def tokens(self, start: int, stop: int) -> list[int]:
        """Of prompt and answer together."""
        n = len(self.prompt)
        if start >= n:
            return self.token_ids[start - n : stop - n]
        return self.prompt[start:stop] + self.token_ids[: max(0, stop - n)]

    def begin_as(self, other: Handle) -> None:
        """The same answer so far, without pages."""
        for mine, theirs in ((self.token_ids, other.token_ids), (self.logprobs, other.logprobs),
                             (self.top_logprobs, other.top_logprobs)):  # fmt: skip
            mine[:] = theirs
        self.free_indices, self._heard = other.free_indices, len(self.token_ids)
        self.set_sampling(self.sampling)

    def set_sampling(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.key = stream(sampling.seed, self.id, self.index)
        self._seen: dict[int, None] | None = None
        needed = self._tokenizer is not None and (sampling.stop or self.listener)
        self._text = Text(self._tokenizer, sampling.stop) if needed else None
        if self._text and self.token_ids:
            self._text = self._rewritten()
            self._text.fresh()

    def append(self, token: int) -> str | None:
        """Take in a token -> the stop string that it completes."""
        self.token_ids.append(token)
        if self._seen is not None:
            self._seen[token] = None
        if self._text is not None and self._text.push([token]):
            return self._text.stopped
        return None

    def forget(self, n: int) -> None:
        """Drop the last n sampled tokens; the pages are the engine's to cut."""
        keep = len(self.token_ids) - n
        for kept in (self.token_ids, self.logprobs, self.top_logprobs):
            del kept[keep:]
        self._seen, self._heard = None, min(self._heard, keep)
        if self._text is not None:
            self._text = self._rewritten()
            self._text.fresh()

    def set_pages(self, pages: list[int], nodes: list[int], cached: int) -> None:
        self.pages, self.nodes, self.cached = list(pages), list(nodes), cached
        self._grow(len(pages))
        self.table[: len(pages)] = pages

    def add_page(self, page: int) -> None:
        self._grow(len(self.pages) + 1)
        self.table[len(self.pages)] = page
        self.pages.append(page)

    def replace_page(self, i: int, page: int) -> None:
        self.pages[i] = self.table[i] = page

    def piece(self) -> None:
        """Tell the listener, if there is one, what it has not heard."""
        heard, self._heard = self._heard, len(self.token_ids) + (self.finish_reason is not None)
        if self.listener is None or heard == self._heard:
            return
        text = self._text.fresh(last=self.finish_reason is not None) if self._text is not None else ""
        self.listener(Piece(self.id, self.index, tuple(self.token_ids[heard:]), text, self.finish_reason))

    def finish(self, reason: FinishReason, stop: str | None = None) -> None:
        self.finish_reason, self.stop = reason, stop
        if self._text is not None:
            self._text.push([], last=True)

    def completion(self) -> Completion:
        wanted = self.sampling.logprobs
        text = self._text.text if self._text is not None else self.text
        return Completion(
            self.id, self.index, len(self.prompt), list(self.token_ids), text, self.finish_reason, self.stop,
            None if wanted is None else list(self.logprobs), list(self.top_logprobs) if wanted else None,
        )  # fmt: skip

    def _grow(self, pages: int) -> None:
        if pages > len(self.table):
            grown = np.zeros(2 * pages, dtype=np.int32)
            grown[: len(self.pages)] = self.pages
            self.table = grown

    def _rewritten(self) -> Text:
        text = Text(self._tokenizer, self._text.stop)
        text.push(self.token_ids)
        return text
