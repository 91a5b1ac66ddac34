# SPDX-License-Identifier: Apache-2.0
"""The decode engine: many requests at once, continuously batched over a cache of shared pages.

A step is one forward of one packed row: the next token of each running sequence and pieces of new prompts, nothing
padded. Sequences share pages (answers of one prompt, forks, prompts that begin alike) until they write.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from fastpost.generate import paged_cache, probe, sampling
from fastpost.generate.handle import Handle
from fastpost.generate.limits import Limits
from fastpost.generate.pages import Pages
from fastpost.generate.request import Completion, Request, Sampling
from fastpost.generate.schedule import Part, Scheduler
from fastpost.generate.takeover import Takeover, end_tokens, longest, pages_for

LENGTH = 2048
"""Tokens of a sequence for which the cache has room when nobody says how large it should be."""


class Engine:
    """Generates with a transformers causal LM of full or sliding-window attention.

    with Engine(model, tokenizer) as engine:
        for completion in engine.run(Request(ids, Sampling(temperature=0.8)) for ids in prompts): ...

    Args:
        tokenizer: for text and stop strings; None: token ids only.
        page: positions of a page.
        pages: pages of the cache; or memory: bytes for them. Neither: what max_batch sequences of 2048 tokens need, at
            most a quarter of the free memory; or what the model's longest needs, at most three quarters.
        max_batch: sequences that run at once.
        prefill_tokens: at most so many prompt tokens in a step, beside the running sequences' own.
        reuse_prefix: keep the pages of finished sequences for requests that begin alike, until they are needed.

    While it is open, the model is in eval mode and attends through the cache; close() puts back what it was. Raises
    ValueError for a model that keeps something else than keys and values of full or windowed attention.
    """

    def __init__(self, model, tokenizer=None, *, page: int = 16, pages: int | None = None, memory: int | None = None,
                 max_batch: int = 32, prefill_tokens: int = 512, reuse_prefix: bool = True):  # fmt: skip
        for name, value in (("page", page), ("max_batch", max_batch), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise ValueError(f"[Engine] {name}: expected at least 1, got {value}. Give a larger one.")
        if pages is not None and memory is not None:
            raise ValueError("[Engine] pages, memory: expected one of the two, got both. Leave one out.")
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self.eos = end_tokens(model, tokenizer)
        self.max_length = longest(model)
        self._takeover = Takeover(model)
        try:
            self._takeover.apply()
            with torch.no_grad():
                shapes = paged_cache.layer_shapes(model)
            bytes_of_page = page * sum(shape.bytes for shape in shapes)
            if memory is not None:
                pages = memory // bytes_of_page
            elif pages is None:
                usual = min(LENGTH, self.max_length)
                pages = pages_for(self.device, bytes_of_page, page, max_batch, usual, self.max_length)
            if pages < 1:
                raise ValueError(
                    f"[Engine] {'pages' if memory is None else 'memory'}: expected room for a page of {bytes_of_page} "
                    f"bytes, got {pages if memory is None else memory}. Give more, or a smaller page."
                )
            self.cache = paged_cache.PagedCache(shapes, pages, page)
        except BaseException:
            self._takeover.undo()
            raise
        self.pages = Pages(pages, page, keep=reuse_prefix)
        self.limits = Limits(model.get_input_embeddings().weight.shape[0], self.max_length, pages, page)
        self._schedule = Scheduler(self.pages, max_batch, prefill_tokens)
        self.max_batch = max_batch
        self._arrivals = itertools.count()
        self._ended: list[Handle] = []
        self._closed = False
        self._counts = dict.fromkeys(("steps", "prompt_tokens", "new_tokens", "finished", "cancelled", "probes"), 0)
        self._seconds = self._forward_seconds = 0.0

    # ---- requests

    def check(self, request: Request) -> None:
        """Raises ValueError when the request could never run: empty prompt, ids out of the vocabulary, too long for
        the model or for the cache."""
        if not request.prompt:
            raise ValueError("[Engine] prompt: expected at least one token id, got none. Leave the request out.")
        self.limits.ids("prompt", request.prompt)
        if request.sampling.stop and self.tokenizer is None:
            raise ValueError("[Engine] stop: expected a tokenizer to find it with, got none. Give the engine one.")
        self.limits.prompt(len(request.prompt), request.sampling)

    def submit(self, request: Request) -> list[Handle]:
        """Put a request in the queue -> its sampling.n handles. Raises ValueError as `check` does."""
        self._expect_open()
        self.check(request)
        arrival = next(self._arrivals)
        s, name = request.sampling, arrival if request.id is None else request.id
        handles = [
            Handle(self.tokenizer, name, i, list(request.prompt), s, (arrival, i), request.stream) for i in range(s.n)
        ]
        free = itertools.count(s.n)
        for handle in handles:
            handle.free_indices = free
        self._lead(handles)
        return handles

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield answers as they end. Requests are taken from the iterable when there is room, so it may be endless."""
        requests = iter(requests)
        more = True
        while True:
            while more and self.waiting < max(2, self.max_batch // 2):
                request = next(requests, None)
                if request is None:
                    more = False
                else:
                    self.submit(request)
            if not (self._schedule or self._ended):
                return
            yield from self.step()

    def generate(self, requests: Iterable[Request]) -> list[list[Completion]]:
        """The sampling.n answers of each request, in order."""
        requests = list(requests)
        for request in requests:  # all or none is queued
            self.check(request)
        handles = [self.submit(request) for request in requests]
        mine = {id(h) for group in handles for h in group}
        while any(h.finish_reason is None for group in handles for h in group):
            self._step()
        self._ended = [h for h in self._ended if id(h) not in mine]  # for who submitted them
        return [[h.completion() for h in group] for group in handles]

    # ---- one step

    def step(self) -> list[Completion]:
        """One forward of everything that is scheduled -> the answers that ended with it, and those that were cancelled
        since the last."""
        self._expect_open()
        if self._schedule:
            self._step()
        ended, self._ended = self._ended, []
        return [handle.completion() for handle in ended]

    @torch.no_grad()
    def _step(self) -> None:
        began = time.perf_counter()
        parts, copies = self._schedule.plan()
        if not parts:
            raise RuntimeError(f"[Engine] step: nothing can run, which should not happen; {self.stats()}")
        if copies:
            self.cache.copy(copies)
        asked = [i for i, part in enumerate(parts) if part.handle.cached + part.count == len(part.handle)]
        logits = self._forward(parts, asked)
        self._counts["steps"] += 1
        for handle, count in parts:
            known = len(handle.prompt)
            self._counts["prompt_tokens"] += max(0, min(handle.cached + count, known) - handle.cached)
            handle.cached += count
            self._schedule.record(handle)
        owners, rows = [], []
        for row, i in enumerate(asked):
            handle = parts[i].handle
            group, handle.siblings = [handle, *handle.siblings], []
            for sibling in group[1:]:
                sibling.leader = None
                self._schedule.share(handle, sibling)
                self._schedule.add(sibling)
            owners += group
            rows += [row] * len(group)
        if owners:
            self._sample(logits if len(rows) == len(asked) else logits[rows], owners)
        self._seconds += time.perf_counter() - began

    def _forward(self, parts: list[Part], asked: list[int]) -> torch.Tensor:
        """The logits [len(asked), V] of the last token of these parts."""
        self._takeover.check()
        count = len(parts)
        ids: list[int] = []
        table = np.zeros((count, 1, max(len(part.handle.pages) for part in parts)), dtype=np.int32)
        length = np.empty(count, dtype=np.int32)
        bounds = np.zeros(count + 1, dtype=np.int32)
        positions: list[int] = []
        for i, (handle, n) in enumerate(parts):
            start, end = handle.cached, handle.cached + n
            if n == 1:
                ids.append(handle.token(start))
                positions.append(start)
            else:
                ids += handle.tokens(start, end)
                positions += range(start, end)
            table[i, 0, : len(handle.pages)] = handle.table[: len(handle.pages)]
            length[i], bounds[i + 1] = end, len(ids)
        to = self.device
        self.cache.step = paged_cache.Step(
            torch.from_numpy(table).to(to), torch.from_numpy(length).to(to),
            None if len(ids) == count else torch.from_numpy(bounds).to(to),
        )  # fmt: skip
        last = bounds[1:][asked or [0]] - 1
        keep = 0 if len(last) == len(ids) else torch.from_numpy(last.astype(np.int64)).to(to)
        began = time.perf_counter()
        out = self.model(
            input_ids=torch.tensor([ids], device=to), position_ids=torch.tensor([positions], device=to),
            past_key_values=self.cache, use_cache=True, logits_to_keep=keep,
        )  # fmt: skip
        self._forward_seconds += time.perf_counter() - began
        return out.logits[0]

    def _sample(self, logits: torch.Tensor, owners: list[Handle]) -> None:
        try:
            chosen = sampling.choose(logits, owners)
        except BaseException:  # of a callback: the sequences stay such that another step can follow
            for handle in owners:
                if handle.finish_reason is None:
                    self._schedule.cut(handle, len(handle) - 1)
            raise
        told = []
        for i, (handle, token) in enumerate(zip(owners, chosen.tokens, strict=True)):
            if handle.finish_reason is not None:  # cancelled by a callback
                continue
            handle.logprobs.append(chosen.logprobs[i] if chosen.logprobs else None)
            handle.top_logprobs.append(chosen.top[i] if chosen.top else None)
            self._counts["new_tokens"] += 1
            stop = handle.append(token)
            wishes = handle.sampling
            if stop is not None or (token in self.eos and not wishes.ignore_eos):
                self._end(handle, "stop", stop)
            elif len(handle.token_ids) >= wishes.max_new_tokens or len(handle) >= self.max_length:
                self._end(handle, "length")
            told.append(handle)
        self._tell(told)

    def _tell(self, told: list[Handle]) -> None:
        """Listeners come last: whatever they do or raise, the sequences have their tokens."""
        error = None
        for handle in told:
            try:
                handle.piece()
            except Exception as raised:
                error = error or raised
        if error is not None:
            raise error

    def _end(self, handle: Handle, reason: str, stop: str | None = None) -> None:
        self._schedule.remove(handle)
        handle.finish(reason, stop)
        self._counts["cancelled" if reason == "cancelled" else "finished"] += 1
        self._ended.append(handle)

    # ---- operations on one sequence

    def cancel(self, handle: Handle) -> Completion:
        """End a sequence now; its pages are free at once. Returns what it has, and so does the next step. Cancelling a
        finished one changes nothing."""
        if handle.finish_reason is None:
            if handle.leader is not None:
                handle.leader.siblings.remove(handle)
            elif handle.siblings:  # the next computes the prompt instead
                heirs, handle.siblings = handle.siblings, []
                self._schedule.share(handle, heirs[0])
                self._lead(heirs)
            self._end(handle, "cancelled")
            handle.piece()
        return handle.completion()

    def prune(self, handles: Iterable[Handle], keep: Iterable[Handle]) -> list[Completion]:
        """Cancel those of `handles` that are not in `keep`."""
        kept = {id(h) for h in keep}
        return [self.cancel(h) for h in handles if id(h) not in kept]

    def fork(self, handle: Handle, sampling: Sampling | None = None) -> Handle:
        """A new sequence that begins as `handle` is now, on the same pages (a page is copied when it is written). It
        has the same id and the next free index. `sampling`: how it goes on; None: like `handle`. Of a finished
        sequence, too (what its pages held is computed anew where they are gone)."""
        self._expect_open()
        s = sampling or handle.sampling
        self.limits.room(handle, s, 0)
        index = next(handle.free_indices)
        made = Handle(self.tokenizer, handle.id, index, handle.prompt, s, (handle.order[0], index), handle.listener)
        made.begin_as(handle)
        self._schedule.share(handle, made)
        self._schedule.cut(made, len(made) - 1)  # in a logits callback, pages hold the last token already
        self._schedule.add(made)
        return made

    def rollback(self, handle: Handle, n_tokens: int, sampling: Sampling | None = None) -> None:
        """Forget the last n_tokens sampled tokens of a running sequence. With the same sampling it would draw the same
        again: pass another seed, or `extend` it."""
        self._expect_running(handle, "rollback")
        if not 0 <= n_tokens <= len(handle.token_ids):
            raise ValueError(
                f"[Engine] rollback: expected 0 to {len(handle.token_ids)} tokens, got {n_tokens}. The prompt stays."
            )
        if sampling is not None:
            self.limits.room(handle, sampling, -n_tokens)
        handle.forget(n_tokens)
        if sampling is not None:
            handle.set_sampling(sampling)
        # The last token that is left is computed once more, for its logits.
        self._schedule.cut(handle, min(handle.cached, len(handle) - 1))

    def extend(self, handle: Handle, token_ids: list[int]) -> None:
        """Append tokens to the answer as though they had been sampled; they have no log-prob."""
        self._expect_running(handle, "extend")
        if handle.siblings or handle.leader is not None:
            raise ValueError("[Engine] extend: expected a prompt that is computed, got a waiting one. Step first.")
        self.limits.ids("extend", token_ids)
        self.limits.room(handle, handle.sampling, len(token_ids))
        for token in token_ids:
            handle.append(token)
            handle.logprobs.append(None)
            handle.top_logprobs.append(None)
        handle.piece()

    @torch.no_grad()
    def probe(self, handle: Handle | list[Handle], token_ids: list[int],
              choices: list[int] | None = None) -> torch.Tensor:  # fmt: skip
        """log softmax of the next token's logits after the sequence so far and token_ids, float32 [V], or of the
        `choices` alone. In a forward of its own on a fork that is dropped: the sequence goes on with the same bits. Of
        a finished sequence, too (what its pages held is computed anew where they are gone). Of a list of sequences:
        [n, V], in one forward where pages allow."""
        self._expect_open()
        handles = [handle] if isinstance(handle, Handle) else list(handle)
        self.limits.ids("probe", token_ids)
        logits = probe.logits(handles, list(token_ids), self.limits, self._schedule, self.cache, self._forward)
        self._counts["probes"] += len(handles)
        found = logits.float().log_softmax(-1)
        if choices is not None:
            found = found[:, list(choices)]
        return found[0] if isinstance(handle, Handle) else found

    # ---- state

    def _lead(self, handles: list[Handle]) -> None:
        """Queue the first; the others begin with its prompt's pages."""
        first, *others = handles
        first.leader, first.siblings = None, others
        for other in others:
            other.leader = first
        self._schedule.add(first)

    def _expect_open(self) -> None:
        if self._closed:
            raise ValueError("[Engine] this engine is closed, and the model is its owner's again. Make another.")

    def _expect_running(self, handle: Handle, what: str) -> None:
        self._expect_open()
        if handle.finish_reason is not None:
            raise ValueError(
                f"[Engine] {what}: expected a sequence that goes on, got one that ended ({handle.finish_reason}). "
                "Fork it to go on from there."
            )
        if handle.cached == len(handle):
            raise ValueError(
                f"[Engine] {what}: expected a sequence between two steps, got one whose next token is being chosen. Do "
                "it after the step, not in a logits callback."
            )

    def stats(self) -> dict:
        """steps, prompt_tokens (computed), reused_tokens (taken from kept pages instead), new_tokens, finished,
        cancelled, probes, preempted, running, waiting, pages, pages_used, pages_kept (for reuse), pages_peak,
        forward_seconds, seconds (in step, the forward included)."""
        schedule = self._schedule
        return self._counts | {
            "reused_tokens": schedule.reused_tokens, "preempted": schedule.preempted, "running": len(schedule.running),
            "waiting": len(schedule.waiting), "pages": self.pages.count, "pages_used": self.pages.used,
            "pages_kept": self.pages.kept, "pages_peak": self.pages.peak, "forward_seconds": self._forward_seconds,
            "seconds": self._seconds,
        }  # fmt: skip

    @property
    def waiting(self) -> int:
        """Sequences that have no place in the batch yet."""
        return len(self._schedule.waiting)

    def pause(self) -> None:
        """Put the model back as it was, with everything kept for resume(); call nothing else in between."""
        self._takeover.undo()

    def resume(self) -> None:
        self._expect_open()
        self._takeover.apply()

    def close(self) -> None:
        """Free the cache and put the model back as it was. What still runs is lost."""
        if not self._closed:
            self._closed = True
            self._takeover.undo()
            self.cache = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc) -> None:
        self.close()
