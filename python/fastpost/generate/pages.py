# SPDX-License-Identifier: Apache-2.0
"""Which page of a cache belongs to whom: counted references, and an index of full pages by the tokens that led there.

Numbers only; the tensors are paged_cache's. A page is in use (someone holds it), kept (nobody does, but a request that
begins with the same tokens may take it up again; the longest unused is given away first), or free.
"""

from __future__ import annotations

from collections import OrderedDict

ROOT = 0
"""The node before the first page."""


class Pages:
    """`count` pages of `size` positions. `keep`: full pages outlive their sequences while nobody needs the room."""

    def __init__(self, count: int, size: int, *, keep: bool = True):
        self.count, self.size, self.keep = count, size, keep
        self.references = [0] * count
        self.peak = 0
        self._free = list(range(count - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        # A node is a full page with all the tokens before it. Keys hold the tokens themselves, so that nothing rests on
        # a hash.
        self._node: dict[tuple[int, tuple[int, ...]], int] = {}  # (node before, tokens) -> node
        self._page: dict[int, int] = {}  # node -> page
        self._key: dict[int, tuple[int, tuple[int, ...]]] = {}  # page -> its key in _node
        self._nodes = ROOT

    @property
    def available(self) -> int:
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        return self.count - self.available

    @property
    def kept(self) -> int:
        return len(self._kept)

    def take(self) -> int:
        """A page of one's own; the caller has seen that one is available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
        self.references[page] = 1
        self.peak = max(self.peak, self.used)
        return page

    def share(self, pages: list[int]) -> None:
        """One more holder of each."""
        for page in pages:
            if not self.references[page]:
                del self._kept[page]
            self.references[page] += 1
        self.peak = max(self.peak, self.used)

    def drop(self, pages: list[int]) -> None:
        """One holder less of each. The last pages are given away first, so that no kept page outlives its prefix."""
        for page in reversed(pages):
            self.references[page] -= 1
            if self.references[page]:
                continue
            if page in self._key:
                self._kept[page] = None
            else:
                self._free.append(page)

    def writable(self, page: int) -> bool:
        """Whether its only holder may write into it. A full page that is rolled back and written again leaves the
        index."""
        if self.references[page] > 1:
            return False
        self._forget(page)
        return True

    def record(self, page: int, before: int, tokens: tuple[int, ...]) -> int:
        """`page` now holds `tokens` after node `before`: its node, or that of another page that holds the same."""
        if not self.keep:
            return ROOT
        key = before, tokens
        node = self._node.get(key)
        if node is None:
            self._nodes += 1
            node = self._node[key] = self._nodes
            self._page[node], self._key[page] = page, key
        return node

    def find(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """(pages, nodes) of the longest recorded beginning that leaves at least one token to compute. Takes nothing."""
        pages, nodes, node, size = [], [], ROOT, self.size
        if self._node:
            for end in range(size, len(tokens), size):
                node = self._node.get((node, tuple(tokens[end - size : end])))
                if node is None:
                    break
                nodes.append(node)
                pages.append(self._page[node])
        return pages, nodes

    def _forget(self, page: int) -> None:
        key = self._key.pop(page, None)
        if key is not None:
            del self._page[self._node.pop(key)]
