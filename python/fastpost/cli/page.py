# SPDX-License-Identifier: Apache-2.0
"""`fastpost data --html`: the account of the data and its first rows, token by token, as one page.

The page fetches nothing and runs nothing (a content policy says so to the browser, too): no script, style in the file,
charts as SVG. Whatever the rows hold is text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from importlib import resources

from fastpost.cli.account import Account, names

BARS = 40

LEGEND = (
    "<p class='legend'>Coloured tokens are trained, the others are only read. Point at a text to see where its tokens "
    "begin, and at a token for its id and place.</p>"
)

# Characters that a page would swallow, or that would turn the order of the text around: shown by number.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def page(recipe: str, settings: list[tuple[str, str]], parts: list[tuple[Account, list]], tokenizer) -> str:
    """The whole document. `parts`: each data set's account with the examples to show."""
    style = resources.files("fastpost.cli").joinpath("page.css").read_text(encoding="utf-8")
    spelling, body = Spelling(tokenizer), []
    for account, examples in parts:
        body += facts(account)
        body += [LEGEND] * bool(examples) + [row(e, account.kind, spelling) for e in examples]
    chips = "".join(f"<span><b>{escape(name)}</b> {escape(value)}</span>" for name, value in settings)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>fastpost data {escape(recipe)}</title><style>{style}</style></head><body>"
        f"<header><h1>What the model will see</h1><p class='settings'><span><b>recipe</b> {escape(recipe)}</span>"
        f"{chips}</p></header><main>{''.join(body)}</main></body></html>\n"
    )


def facts(a: Account) -> Iterator[str]:
    """The account: figures, warnings, dropped rows, lengths."""
    share = a.kept / a.rows if a.rows else 0
    end = f"{a.ends_trained} of {a.sequences}" if a.end else "none"
    tiles = [
        ("rows kept", f"{a.kept:,} of {a.rows:,}", f"{share:.1%}", ""),
        ("dropped", f"{a.rows - a.kept:,}", "never trained", "bad" if a.kept < a.rows else ""),
        ("cut to length", f"{a.truncated:,}", "rows", "bad" if a.truncated else ""),
        ("trained tokens", f"{a.trained:,}", f"{a.trained / a.tokens:.1%} of {a.tokens:,}", ""),
        ("BOS", str(a.bos), "at the start of each sequence", ""),
        ("end of turn trained", end, a.end or "no special token", "" if a.ends_trained == a.sequences else "bad"),
    ]
    tiles += [("empty replies", f"{a.empty:,}", "only the end is trained", "bad")] * bool(a.empty)
    tiles += [("identical pairs", f"{a.identical:,}", "no preference in them", "bad")] * bool(a.identical)
    yield f"<section><h2>{escape(a.path)} <small>{escape(a.kind)}, {escape(a.template)}</small></h2>"
    yield "".join(f"<p class='warning'><b>warning</b> {escape(text)}</p>" for text in a.warnings)
    yield "".join(f"<p class='note'><b>note</b> {escape(text)}</p>" for text in a.notes)
    yield "<div class='tiles'>"
    for name, figure, more, kind in tiles:
        yield f"<div class='tile {kind}'><b>{escape(figure)}</b><span>{name}</span><small>{escape(more)}</small></div>"
    yield "</div>"
    if a.dropped:
        yield "<table class='dropped'><tr><th>dropped because</th><th>rows</th><th>the first of them</th></tr>"
        for reason, n, where in a.dropped:
            listed = ", ".join(w.removeprefix(a.path).strip().replace(":", "line ") for w in where)
            listed += ", …" if n > len(where) else ""
            yield f"<tr><td>{escape(reason)}</td><td class='n'>{n:,}</td><td>{escape(listed)}</td></tr>"
        yield "</table>"
    yield "<div class='lengths'>" + histogram(a) + quantiles(a) + "</div></section>"


def quantiles(a: Account) -> str:
    columns = list(a.quantiles("sequence"))
    head = "".join(f"<th class='n'>{c}</th>" for c in columns)
    lines = [f"<table><tr><th>tokens</th>{head}</tr>"]
    for name in a.lengths:
        cells = "".join(f"<td class='n'>{v:,}</td>" for v in a.quantiles(name).values())
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return "".join(lines) + "</table>"


def histogram(a: Account) -> str:
    """Lengths of the sequences, in bars of equal width."""
    values = a.lengths["sequence"]
    low, high = values[0], values[-1]
    width = max(1, -(-(high - low + 1) // BARS))
    counts = [0] * ((high - low) // width + 1)
    for v in values:
        counts[(v - low) // width] += 1
    most, step = max(counts), min(24.0, 600 / len(counts))
    bars = []
    for i, n in enumerate(counts):
        if n:
            tall = max(1.0, 110 * n / most)
            begin = low + i * width
            span = f"{begin}" if width == 1 else f"{begin} to {begin + width - 1}"
            bars.append(
                f"<rect x='{i * step:.2f}' y='{130 - tall:.2f}' width='{max(1.0, step - 1):.2f}' height='{tall:.2f}'>"
                f"<title>{span} tokens: {n:,} sequences</title></rect>"
            )
    right = step * len(counts)
    axis = f"<text x='0' y='146'>{low:,}</text><text x='{right:.0f}' y='146' text-anchor='end'>{high:,} tokens</text>"
    if right < 200:  # too narrow for two labels
        axis = f"<text x='0' y='146'>{low:,} to {high:,} tokens</text>"
    return (
        f"<svg viewBox='0 0 600 150' role='img' aria-label='lengths of the sequences, {low} to {high} tokens'>"
        f"{''.join(bars)}<line x1='0' y1='130' x2='600' y2='130'/>{axis}"
        f"<text x='600' y='10' text-anchor='end'>most in a bar: {most:,}</text></svg>"
    )


def row(example, kind: str, spelling: Spelling) -> str:
    """A row: its sequences side by side."""
    cells = []
    for name, s in zip(names(example, kind), example.sequences):
        cut = "" if s.split is None else f", {s.trained[s.split :].count(1)} of them the answer (blue)"
        cut += ", cut to length" if s.truncated else ""
        label = f"<b>{name}</b> " if name else ""
        ends = (
            f"<p class='ids'>ids {escape(' '.join(map(str, s.ids[:8])))} … {escape(' '.join(map(str, s.ids[-8:])))}</p>"
        )
        cells.append(
            f"<div class='{name or 'only'}'><h4>{label}{len(s):,} tokens, {s.trained.count(1):,} trained{cut}</h4>"
            f"<pre class='seq' tabindex='0'>{''.join(tokens(s, spelling))}</pre>{ends}</div>"
        )
    numbers = [
        f"{name} {', '.join(f'{v:g}' for v in values)}"
        for name in ("reward", "reference_logprob", "previous_logprob")
        if (values := getattr(example, name)) is not None
    ]
    more = f" <small>{escape('   '.join(numbers))}</small>" if numbers else ""
    return f"<section class='row'><h3>row {example.row}{more}</h3><div class='pair'>{''.join(cells)}</div></section>"


def tokens(sequence, spelling: Spelling) -> Iterator[str]:
    """One element a token; hovering shows its border and number. Bytes of one character stay together."""
    for begin, end, text in spelling.spell(sequence):
        ids = list(sequence.ids[begin:end])
        part = 0 if not sequence.trained[begin] else 2 if sequence.split is not None and begin >= sequence.split else 1
        classes = "t" + (" on" if part else "") + (" two" if part == 2 else "")
        classes += " sp" if ids[0] in spelling.special else ""
        place = f"{begin}" if end == begin + 1 else f"{begin}-{end - 1}"
        hint = f"id {' '.join(map(str, ids))}  at {place}  {'trained' if part else 'not trained'}"
        yield f"<span class='{classes}' data-i='{hint}'>{visible(text)}</span>"


def visible(text: str) -> str:
    """Escaped, with line ends marked and characters that cannot be seen by their number."""
    text = HIDDEN.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", text)
    return escape(text).replace("\n", "<i>↵</i>\n")


class Spelling:
    """Token ids to text, a few at a time: tokens that hold pieces of one character are spelt together."""

    def __init__(self, tokenizer):
        self.tokenizer, self._known = tokenizer, {}
        self.special = set(tokenizer.all_special_ids)
        self.special |= {i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
        # Some tokenizers drop the space before the first token of what they decode, so something stands before it.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._skip = len(self._decode(self._before))

    def spell(self, sequence) -> Iterator[tuple[int, int, str]]:
        """(begin, end, text) of each group of tokens."""
        begin, ids, on = 0, sequence.ids, sequence.trained
        while begin < len(ids):
            end = begin + 1
            text = self._text(tuple(ids[begin:end]))
            while "\ufffd" in text and end < min(len(ids), begin + 8) and on[end] == on[begin]:
                end += 1
                text = self._text(tuple(ids[begin:end]))
            if "\ufffd" in text:  # not one character in pieces: broken bytes, or the replacement character itself
                end, text = begin + 1, self._text((ids[begin],))
            yield begin, end, text
            begin = end

    def _text(self, ids: tuple[int, ...]) -> str:
        if ids not in self._known:
            self._known[ids] = self._decode([*self._before, *ids])[self._skip :]
        return self._known[ids]

    def _decode(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
