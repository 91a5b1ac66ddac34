# SPDX-License-Identifier: Apache-2.0
"""Text of an answer while it grows: whole characters only, ended by stop strings wherever the tokens' bounds lie."""

from __future__ import annotations

BROKEN = "\N{REPLACEMENT CHARACTER}"
PATIENCE = 16
"""Tokens after which bytes that are still no character are taken for good."""


def decode(tokenizer, ids: list[int]) -> str:
    """Without special tokens, and without the tidying of spaces that would make a text depend on what follows."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        return fast.decode(ids, skip_special_tokens=True)
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _special(tokenizer, text: str) -> int | None:
    """The id of a token that is written so and that no text shows."""
    found = tokenizer.convert_tokens_to_ids(text)
    if isinstance(found, int) and found != tokenizer.unk_token_id and not decode(tokenizer, [found]):
        return found
    return None


class Text:
    """`push` tokens; `text` is what they say, cut before the first stop string, `stopped` that string."""

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.text, self.stopped = "", None
        self._sent = 0
        self._ids: list[int] = []
        # Tokens [begin, read) are said already; they are decoded again with the new ones because a token's text can
        # depend on the one before it (spaces).
        self._begin = self._read = 0
        self._longest = max(map(len, stop), default=0)
        self._special = {i: s for s in stop if (i := _special(tokenizer, s)) is not None}

    def push(self, ids: list[int], *, last: bool = False) -> bool:
        """Take in tokens -> whether a stop string has come. `last`: none follow, so incomplete bytes are said too."""
        for token in ids:
            if self.stopped is not None:
                break
            if token in self._special:
                self._say(last=True)
                self.stopped = self.stopped or self._special[token]
                break
            self._ids.append(token)
            self._say(last=False)
        if last and self.stopped is None:
            self._say(last=True)
        return self.stopped is not None

    def fresh(self, *, last: bool = False) -> str:
        """What was not returned yet and cannot become part of a stop string any more; with `last` all of it."""
        end = len(self.text)
        if not last and self.stopped is None:
            end -= self._held()
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _say(self, *, last: bool) -> None:
        if self._read == len(self._ids):
            return
        said = decode(self.tokenizer, self._ids[self._begin : self._read])
        now = decode(self.tokenizer, self._ids[self._begin :])
        if now.endswith(BROKEN) and not last and len(self._ids) - self._read < PATIENCE:
            return
        self._begin, self._read = self._read, len(self._ids)
        if len(now) <= len(said):
            return
        before = len(self.text)
        self.text += now[len(said) :]
        if self.stop:
            start = max(0, before - self._longest + 1)
            found = [(at, -len(s), s) for s in self.stop if (at := self.text.find(s, start)) >= 0]
            if found:
                at, _, self.stopped = min(found)
                self.text = self.text[:at]

    def _held(self) -> int:
        """Characters at the end that begin a stop string."""
        for n in range(min(self._longest - 1, len(self.text)), 0, -1):
            tail = self.text[-n:]
            if any(len(s) > n and s.startswith(tail) for s in self.stop):
                return n
        return 0
