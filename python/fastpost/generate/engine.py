# SPDX-License-Identifier: Apache-2.0
"""The decode engine: many requests at once, continuously batched over a cache of shared pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from fastpost.generate.request import Completion, Request, Sampling


class Handle:
    """A sequence in the engine, running or finished: an answer of a request, or a fork of one."""

    id: str | int
    index: int
    prompt: list[int]
    token_ids: list[int]  # sampled so far
    finish_reason: str | None  # None: running

    @property
    def text(self) -> str:
        """Of what was sampled so far, without special tokens and stop string."""
        raise NotImplementedError


class Engine:
    """Generates with a transformers causal LM of full or sliding-window attention.

    with Engine(model, tokenizer) as engine:
        for completion in engine.run(Request(ids, Sampling(temperature=0.8)) for ids in prompts): ...

    Args:
        page: positions of a page.
        pages: pages of the cache; or memory: bytes for them. Neither: what max_batch sequences of 2048 tokens need, at
            most a quarter of what memory is free.
        max_batch: sequences that run at once.
        prefill_tokens: at most so many prompt tokens in a step, beside the running sequences' own.
        reuse_prefix: keep the pages of finished sequences for requests that begin alike, until they are needed.

    While it is open, the model is in eval mode and attends through the cache; close() puts back what it was.
    """

    def __init__(self, model, tokenizer=None, *, page: int = 16, pages: int | None = None, memory: int | None = None,
                 max_batch: int = 32, prefill_tokens: int = 512, reuse_prefix: bool = True):  # fmt: skip
        raise NotImplementedError

    def check(self, request: Request) -> None:
        """Raises ValueError when the request could never run: empty prompt, ids out of the vocabulary, too long for
        the model or for the cache."""
        raise NotImplementedError

    def submit(self, request: Request) -> list[Handle]:
        """Put a request in the queue -> its sampling.n handles. Raises ValueError as `check` does."""
        raise NotImplementedError

    def step(self) -> list[Completion]:
        """One forward of everything that is scheduled -> the answers that ended with it, cancelled ones included."""
        raise NotImplementedError

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield answers as they end. Requests are taken from the iterable when there is room, so it may be endless."""
        raise NotImplementedError

    def generate(self, requests: Iterable[Request]) -> list[list[Completion]]:
        """The sampling.n answers of each request, in order."""
        raise NotImplementedError

    def cancel(self, handle: Handle) -> Completion:
        """End a sequence now; its pages are free at once. Returns what it has. Cancelling a finished one changes
        nothing."""
        raise NotImplementedError

    def prune(self, handles: list[Handle], keep: list[Handle]) -> list[Completion]:
        """Cancel those of `handles` that are not in `keep`."""
        raise NotImplementedError

    def fork(self, handle: Handle, sampling: Sampling | None = None) -> Handle:
        """A new sequence that begins as `handle` is now, on the same pages (a page is copied when it is written). It
        has the same id and the next free index. `sampling`: how it goes on; None: like `handle`."""
        raise NotImplementedError

    def rollback(self, handle: Handle, n_tokens: int, sampling: Sampling | None = None) -> None:
        """Forget the last n_tokens sampled tokens of a running sequence. With the same sampling it would draw the same
        again: pass another seed, or `extend` it."""
        raise NotImplementedError

    def extend(self, handle: Handle, token_ids: list[int]) -> None:
        """Append tokens to the answer as though they had been sampled."""
        raise NotImplementedError

    def probe(self, handle: Handle, token_ids: list[int], choices: list[int] | None = None) -> torch.Tensor:
        """log softmax of the next token's logits after the sequence so far and token_ids, float32 [V], or of the
        `choices` alone. In a forward of its own on a fork that is dropped: the sequence goes on with the same bits. Of
        a finished sequence, too (it is computed anew where its pages are gone)."""
        raise NotImplementedError

    def stats(self) -> dict:
        """steps, prompt_tokens, reused_tokens (of prompts), new_tokens, finished, cancelled, preempted, running,
        waiting, pages, pages_used, pages_kept (for reuse), pages_peak, forward_seconds, seconds (in step)."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the cache and put the model back as it was."""
        raise NotImplementedError

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc) -> None:
        self.close()
