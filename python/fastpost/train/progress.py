# SPDX-License-Identifier: Apache-2.0
"""One line that says how far a long piece of work is, and nothing at all for a short one.

    for batch in progress(batches, "evaluate", unit="batches"):
    with waiting("load model"):

It appears after two seconds. A terminal sees it redrawn in place, and gone when the work is done; a file or a pipe gets
a plain line every 30 seconds at most, ten in all. It goes to standard error, so `fastpost eval --json > file` stays
clean. No torch here, and nothing that could change a number.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

AFTER = 2.0
"""Seconds before anything is shown."""
REDRAW, PLAIN, LINES = 0.1, 30.0, 10
"""Seconds between two looks on a terminal and between two lines elsewhere; lines elsewhere at most."""


def progress(iterable: Iterable, what: str, total: int | None = None, unit: str = "") -> Iterator:
    """The items of `iterable`, with a line on how many of `total` (None: its len, where it has one) are done."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    line = Line(what, total, unit)
    try:
        for done, item in enumerate(iterable, 1):
            yield item
            line.update(done)  # the work on the item is done when the next one is asked for
    finally:
        line.close()


@contextmanager
def waiting(
    what: str,
    done: Callable[[], float] | None = None,
    total: float | None = None,
    unit: str = "",
    also: Callable[[float], str] | None = None,
):
    """The same for one call that does not come back for a while: a thread watches the clock, and `done()`, if given,
    which says how much of `total` there is already. also(seconds): more words for the line."""
    line, stop = Line(what, total, unit, also=also), threading.Event()

    def watch():
        while not stop.wait(REDRAW):
            line.update(done() if done else None)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        line.close()


class Line:
    """The state of one progress line. update(done) is cheap: it looks at the clock and, seldom, writes."""

    def __init__(
        self,
        what: str,
        total: float | None = None,
        unit: str = "",
        stream=None,
        clock=time.monotonic,
        also: Callable[[float], str] | None = None,
    ):
        self.what, self.total, self.unit, self.clock, self.also = what, total, unit, clock, also
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.begin = clock()
        self._next = self.begin + (AFTER if self.live else PLAIN)
        self._written = 0
        self._share = 0.1  # of the work, for the next plain line

    def update(self, done: float | None) -> None:
        now = self.clock()
        if now < self._next:
            return
        if self.live:
            self._next = now + REDRAW
            self.stream.write(f"\r\x1b[K{self.text(done, now)}")
        elif self._written >= LINES or (self._written and done and self.total and done / self.total < self._share):
            return
        else:
            # With a known end the lines lie a tenth of the work apart; else each wait is twice as long as the last.
            self._next = now + (PLAIN if done and self.total else PLAIN * 2**self._written)
            self._share = done / self.total + 0.1 if done and self.total else self._share
            self.stream.write(f"{self.text(done, now)}\n")
        self._written += 1
        self.stream.flush()

    def close(self) -> None:
        if self.live and self._written:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def text(self, done: float | None, now: float) -> str:
        """`tokenise  12000/50000 rows  24 %  8312 rows/s  eta 5s`, or what is known of it."""
        more = f"  {self.also(now - self.begin)}" if self.also else ""
        return self._text(done, now) + more

    def _text(self, done: float | None, now: float) -> str:
        seconds, unit = max(now - self.begin, 1e-9), f" {self.unit}" if self.unit else ""
        if done is None:
            return f"{self.what}  {duration(seconds)}"
        rate = done / seconds
        if not self.total:
            return f"{self.what}  {amount(done)}{unit}  {amount(rate)}{unit}/s  {duration(seconds)}"
        left = duration((self.total - done) / rate) if done and self.total >= done else "?"
        share = f"{100 * done / self.total:.0f} %"
        return f"{self.what}  {amount(done)}/{amount(self.total)}{unit}  {share}  {amount(rate)}{unit}/s  eta {left}"


def amount(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def duration(seconds: float) -> str:
    """4s, 3m05s, 2h07m."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"
