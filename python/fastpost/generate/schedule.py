# SPDX-License-Identifier: Apache-2.0
"""Which sequences compute which tokens in the next step, and with whose pages.

Who came first runs first. When pages run out, the youngest gives its own up and computes them again later; the oldest
alone always fits (Engine.check), so that something always moves on.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

from fastpost.generate.handle import Handle
from fastpost.generate.pages import Pages


def _order(handle: Handle) -> tuple:
    return handle.order


class Part(NamedTuple):
    """`count` tokens of a sequence, after those that its pages hold."""

    handle: Handle
    count: int


class Scheduler:
    def __init__(self, pages: Pages, max_batch: int, prefill_tokens: int):
        self.pages, self.max_batch, self.prefill_tokens = pages, max_batch, prefill_tokens
        self.running: list[Handle] = []  # both in order of arrival
        self.waiting: list[Handle] = []  # forks among them may hold pages
        self.preempted = self.reused_tokens = 0

    def __bool__(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, handle: Handle) -> None:
        insort(self.waiting, handle, key=_order)

    def remove(self, handle: Handle) -> None:
        """Take a sequence out and free its pages."""
        for queue in (self.running, self.waiting):
            i = bisect_left(queue, handle.order, key=_order)
            if i < len(queue) and queue[i] is handle:
                del queue[i]
        self.release(handle)

    def release(self, handle: Handle) -> None:
        self.pages.drop(handle.pages)
        handle.set_pages([], [], 0)

    def cut(self, handle: Handle, cached: int) -> None:
        """Let the pages hold no more than the first `cached` tokens."""
        size = self.pages.size
        keep = -(-cached // size)
        self.pages.drop(handle.pages[keep:])
        handle.set_pages(handle.pages[:keep], handle.nodes[: cached // size], min(cached, handle.cached))

    def share(self, source: Handle, target: Handle) -> None:
        """Give `target` the pages of `source`; the tokens in them must be the same."""
        self.pages.share(source.pages)
        target.set_pages(source.pages, source.nodes, source.cached)

    def find(self, handle: Handle) -> None:
        """Give a sequence without pages those that are recorded for its beginning."""
        pages, nodes = self.pages.find(handle.so_far())
        self.pages.share(pages)
        handle.set_pages(pages, nodes, len(pages) * self.pages.size)

    def record(self, handle: Handle) -> None:
        """Make full pages known to others."""
        size = self.pages.size
        if self.pages.keep:
            while (len(handle.nodes) + 1) * size <= handle.cached:
                i = len(handle.nodes)
                tokens = tuple(handle.tokens(i * size, (i + 1) * size))
                handle.nodes.append(self.pages.record(handle.pages[i], handle.last_node, tokens))

    def reserve(self, handle: Handle, count: int, copies: list[tuple[int, int]]) -> bool:
        """Pages for the next `count` tokens, the one to be written into among them not shared (`copies` gets
        (from, to)). False: there are not enough; nothing has changed then."""
        size, cached = self.pages.size, handle.cached
        shared = cached % size and not self.pages.writable(handle.pages[cached // size])
        more = -(-(cached + count) // size) - len(handle.pages)
        if more <= 0 and not shared:
            return True
        if max(0, more) + bool(shared) > self.pages.available:
            return False
        if shared:
            i = cached // size
            page = self.pages.take()
            copies.append((handle.pages[i], page))
            # The old page cannot be given away in this step: its other holders hold it. But one of them may be
            # preempted in this step and another sequence write into it, so copies are made before anything is.
            self.pages.drop([handle.pages[i]])
            handle.replace_page(i, page)
        for _ in range(more):
            handle.add_page(self.pages.take())
        return True

    def plan(self) -> tuple[list[Part], list[tuple[int, int]]]:
        """(parts of the next forward, pages to copy before it)."""
        parts: list[Part] = []
        copies: list[tuple[int, int]] = []
        budget, full = self.prefill_tokens, False
        i = 0
        while i < len(self.running):
            handle = self.running[i]
            todo = len(handle) - handle.cached
            count = todo if todo == 1 else min(todo, budget)
            if count and self._make_room(handle, count, copies):
                parts.append(Part(handle, count))
                budget -= count if count > 1 else 0
            elif count:  # it has made room itself
                full = True
                continue
            i += 1
        while self.waiting and len(self.running) < self.max_batch and budget > 0 and not (full and self.running):
            handle = self.waiting[0]
            if not handle.pages:
                self.find(handle)
                found = handle.cached
            else:
                found = 0
            todo = len(handle) - handle.cached
            count = min(todo, budget)
            if self.running and self._missing(handle) > self.pages.available:
                if found:
                    self.release(handle)
                break
            del self.waiting[0]
            insort(self.running, handle, key=_order)
            if not self._make_room(handle, count, copies):
                break
            self.reused_tokens += found
            parts.append(Part(handle, count))
            budget -= count if count > 1 else 0
        return parts, copies

    def _missing(self, handle: Handle) -> int:
        """Pages it still needs for all its tokens and one more."""
        size = self.pages.size
        shared = handle.cached % size and self.pages.references[handle.pages[handle.cached // size]] > 1
        return -(-(len(handle) + 1) // size) - len(handle.pages) + bool(shared)

    def _make_room(self, handle: Handle, count: int, copies: list) -> bool:
        """Reserve, at the cost of those who came later; False: only `handle` itself was left to give way."""
        while not self.reserve(handle, count, copies):
            later = [queue[-1] for queue in (self.running, [h for h in self.waiting if h.pages])
                     if queue and queue[-1].order > handle.order]  # fmt: skip
            victim = max(later, key=_order, default=handle)
            self.preempted += 1
            i = bisect_left(self.running, victim.order, key=_order)
            if i < len(self.running) and self.running[i] is victim:
                del self.running[i]
                self.add(victim)
            self.release(victim)
            if victim is handle:
                return False
        return True
