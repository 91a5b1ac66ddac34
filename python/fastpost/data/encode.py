# SPDX-License-Identifier: Apache-2.0
"""Parts of text to token ids with an exact mask, and the cut to length.

Special tokens are never added to a rendered conversation: the template wrote them. Plain text gets what the tokenizer
itself would add in front (BOS) and one EOS at the end. The mask follows the parts, never a comparison with the pad
token."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from fastpost.data.chat import Chat, Part
from fastpost.data.collate import Sequence
from fastpost.data.columns import Row
from fastpost.train.config import DataConfig


@dataclass
class Encoded:
    """A tokenised sequence before the cut: reply[t] = 1 where token t is the model's to write, its end-of-turn token
    included."""

    ids: array
    reply: bytearray
    split: int | None = None  # where the second part of a reply in two parts begins

    @property
    def prompt(self) -> int:
        """Tokens before the first reply token (all, when there is none)."""
        at = self.reply.find(1)
        return len(self.ids) if at < 0 else at


class Encoder:
    """A tokenizer with what the mask needs to know about it: BOS, EOS and which tokens end a turn."""

    def __init__(self, tokenizer, plain: bool):
        self.tokenizer, self.plain = tokenizer, plain
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.special = set(tokenizer.all_special_ids)
        self.special |= {i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
        self.merged = 0
        """Sequences where prompt and reply would share a token if tokenised in one go; these are tokenised apart."""
        if plain and self.eos is None:
            raise ValueError("this tokenizer has no EOS token, so plain completions would never learn to end.")
        self.adds_bos = (
            plain and self.bos is not None and self._ids(["a"], add_special_tokens=True)[0][:1] == [self.bos]
        )
        # SentencePiece's kind puts a space before whatever it encodes, which would be one too many inside a row.
        self._prepends = str(tokenizer.convert_ids_to_tokens(self._ids(["a"])[0][0])).startswith("▁")
        # Some models open every turn with their BOS (SmolLM2: <|im_start|>) or end with it; then only the start can be
        # counted.
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
        markup = [] if plain or self.bos is None else self._ids([Chat(tokenizer).text(turns)])[0]
        self.bos_elsewhere = self.bos == self.eos or markup.count(self.bos) > 1

    def rows(self, rows: list[Row], parts: list[list[list[Part]]]) -> list[list[Encoded]]:
        """The sequences of each row from their parts, in one call of the tokenizer (a second where prompt and reply
        merge).

        Raises ValueError naming file and line for a row with a BOS too many, or with half of a surrogate pair.
        """
        for row, row_parts in zip(rows, parts):
            try:
                "".join(p.text for s in row_parts for p in s).encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):04x}"
                raise ValueError(
                    f"{row.where}: the text holds {half}, half of a surrogate pair and no character. Remove it."
                ) from None
        sequences = [sequence for row in parts for sequence in row]
        known = self._table({"".join(p.text for p in s[:i]) for s in sequences for i in range(1, len(s) + 1)})
        apart = [s for s in sequences if self._cuts(s, known) is None]
        first, rest = self._table({s[0].text for s in apart}), self._inside({p.text for s in apart for p in s[1:]})
        encoded = []
        for row, row_parts in zip(rows, parts):
            encoded.append([self._encode(s, known, first, rest, row.where) for s in row_parts])
            for one in encoded[-1]:
                self._check_bos(one.ids, row.where)
        return encoded

    def leading_bos(self, ids) -> int:
        """How many BOS tokens the sequence starts with."""
        return 0 if self.bos is None else next((i for i, token in enumerate(ids) if token != self.bos), len(ids))

    def _encode(self, parts: list[Part], known: dict, first: dict, rest: dict, where: str) -> Encoded:
        cuts = self._cuts(parts, known)
        if cuts is not None:
            whole = known["".join(p.text for p in parts)]
            tokens = [whole[a:b] for a, b in zip([0, *cuts], cuts)]
        else:
            self.merged += 1
            tokens = [first[parts[0].text], *(rest[p.text] for p in parts[1:])]
            if None in tokens:
                raise ValueError(f"{where}: prompt and reply share a token, and this tokenizer cannot take them apart.")
        out = Encoded(array("i"), bytearray())
        if self.adds_bos and self.leading_bos(tokens[0]) == 0:
            out.ids.append(self.bos)
            out.reply.append(0)
        for part, ids in zip(parts, tokens):
            out.ids.extend(ids)
            trained = self._trained(part, ids)
            out.split = len(out.ids) if part.open else out.split
            out.reply.extend(b"\1" * trained + b"\0" * (len(ids) - trained))
        if self.plain and not self._ends(tokens[-1]):
            out.ids.append(self.eos)
            out.reply.append(parts[-1].reply)
        return out

    def _trained(self, part: Part, ids) -> int:
        """How many tokens of a part are trained."""
        if not part.reply:
            return 0
        # No template has added anything to plain text: all of it counts, but for white space after an EOS of its own.
        return len(ids) if part.open or (self.plain and not self._ends(ids)) else self.turn(ids)

    def _ends(self, ids) -> bool:
        """Whether these tokens end with EOS, white space aside."""
        return self.eos in ids[self.turn(ids) - 1 :][:1]

    def turn(self, ids) -> int:
        """How many tokens of a reply count as its turn: up to its end-of-turn token, without the white space that a
        template adds."""
        last = next((i for i in reversed(range(len(ids))) if ids[i] in self.special), None)
        if last is None or self.tokenizer.decode(list(ids[last + 1 :])).strip():
            return len(ids)
        return last + 1

    def _check_bos(self, ids, where: str) -> None:
        leading = self.leading_bos(ids)
        if leading > 1 and self.bos != self.eos:
            raise ValueError(
                f"{where}: the row begins with {leading} BOS tokens ('{self.tokenizer.bos_token}'): the text "
                "already has one and the template writes another. Remove it from the data."
            )
        if not self.bos_elsewhere and self.bos is not None and ids.count(self.bos) > leading:
            raise ValueError(
                f"{where}: the BOS token '{self.tokenizer.bos_token}' stands in the middle of the row. It was in the "
                "text, so a template was applied before; give messages or bare text."
            )

    @staticmethod
    def _cuts(parts: list[Part], known: dict) -> list[int] | None:
        """Token positions where the parts end, or None when the tokens of a prefix are not a prefix of the tokens."""
        whole, text, cuts = known["".join(p.text for p in parts)], "", []
        for part in parts:
            text += part.text
            ids = known[text]
            if whole[: len(ids)] != ids:
                return None
            cuts.append(len(ids))
        return cuts

    def _inside(self, texts: set[str]) -> dict[str, list[int] | None]:
        """Tokens of texts that stand inside a row; None where they cannot be had without a space in front."""
        if not self._prepends:
            return self._table(texts)
        found: dict[str, list[int] | None] = dict.fromkeys(texts)
        for before in ("\n", "a", "."):  # encode behind something that does not merge with the text, and take that off
            (start,) = self._ids([before])
            for text, ids in self._table({before + t for t, got in found.items() if got is None}).items():
                found[text[1:]] = ids[len(start) :] if start and ids[: len(start)] == start else None
        return found

    def _table(self, texts: set[str]) -> dict[str, list[int]]:
        texts = sorted(texts)
        return dict(zip(texts, self._ids(texts))) if texts else {}

    def _ids(self, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def fit(rows: list[Encoded], cfg: DataConfig, keep: int) -> tuple[tuple[Sequence, ...], str]:
    """Cut a row's sequences to length. Returns (sequences, "") or ((), reason) when the row must be dropped.

    keep = tokens at the start (BOS) that survive when a prompt loses its beginning.
    """
    fitted = []
    for encoded in rows:
        ids, reply, split, cut = encoded.ids, encoded.reply, encoded.split, False
        if encoded.prompt == len(ids):
            return (), "nothing to train"
        if cfg.mask != "full":  # nothing trained can see what follows the last reply token
            end = reply.rfind(1) + 1
            ids, reply = ids[:end], reply[:end]
        if cfg.max_prompt_length is not None and encoded.prompt > cfg.max_prompt_length:
            if cfg.truncation == "drop":
                return (), "prompt exceeds max_prompt_length"
            keep = min(keep, cfg.max_prompt_length)
            start = encoded.prompt - cfg.max_prompt_length + keep
            ids, reply, cut = ids[:keep] + ids[start:], reply[:keep] + reply[start:], True
            split = None if split is None else split - (start - keep)
        if len(ids) > cfg.max_length:
            if cfg.truncation == "drop":
                return (), "exceeds max_length"
            ids, reply, cut = ids[: cfg.max_length], reply[: cfg.max_length], True
        trained = bytearray(b"\1" * len(ids)) if cfg.mask == "full" else reply
        trained[0] = 0  # nothing comes before it
        if not any(trained) or not any(reply):
            return (), "prompt fills max_length" if cut else "nothing to train"
        if split is not None and not (any(trained[:split]) and any(trained[split:])):
            return (), "one of the two parts does not fit"
        fitted.append(Sequence(ids, bytes(trained), cut, split))
    return tuple(fitted), ""
