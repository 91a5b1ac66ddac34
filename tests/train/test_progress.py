# SPDX-License-Identifier: Apache-2.0
"""The progress line: silent for short work, in place on a terminal, seldom in a file, and gone at the end."""

import itertools
import time

import pytest

from fastpost.train import progress as module
from fastpost.train.progress import Line, duration, progress, waiting


class Stream(list):
    def __init__(self, tty):
        super().__init__()
        self.tty = tty

    def write(self, text):
        self.append(text)

    def flush(self):
        pass

    def isatty(self):
        return self.tty

    @property
    def text(self):
        return "".join(self)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def drive(tty, seconds, items, total="same"):
    """A line over `items` items that take `seconds` in all; returns what was written and at what times."""
    stream, clock = Stream(tty), Clock()
    line = Line("work", items if total == "same" else total, "rows", stream, clock)
    times = []
    for done in range(1, items + 1):
        clock.now = seconds * done / items
        before = len(stream)
        line.update(done)
        if len(stream) > before:
            times.append(clock.now)
    line.close()
    return stream.text, times


@pytest.mark.parametrize("tty", [True, False])
def test_short_work_is_silent(tty):
    assert drive(tty, 1.9, 1000) == ("", [])


def test_a_terminal_is_redrawn_and_left_clean():
    text, times = drive(True, 10, 1000)
    assert times[0] >= 2.0 and min(b - a for a, b in itertools.pairwise(times)) > 0.09
    assert "\n" not in text and text.endswith("\r\x1b[K")
    last = text.split("\r\x1b[K")[-2]
    assert last.startswith("work  9") and "/1000 rows  " in last and "100 rows/s  eta " in last


@pytest.mark.parametrize("seconds", [29, 40, 200, 3600, 100_000])
@pytest.mark.parametrize("total", ["same", None])
def test_a_file_gets_few_plain_lines(seconds, total):
    text, times = drive(False, seconds, 20_000, total)
    lines = text.splitlines()
    assert len(lines) == len(times) <= 10 and "\r" not in text and "\x1b" not in text
    assert (len(lines) > 0) == (seconds >= 30)
    assert all(b - a >= 30 for a, b in zip([0, *times], times, strict=False))
    if seconds == 100_000 and total:  # they tell of the whole of it, not only of its beginning
        assert len(lines) == 10 and times[-1] > 0.85 * seconds
    if lines and total:
        assert " %  " in lines[0] and "eta " in lines[0]


def test_items_and_errors_pass_through(monkeypatch, capsys):
    assert list(progress(range(5), "x")) == [0, 1, 2, 3, 4]
    assert list(progress(iter("ab"), "x", total=2)) == ["a", "b"]

    def broken():
        yield 1
        raise KeyError("boom")

    with pytest.raises(KeyError):
        list(progress(broken(), "x"))
    assert capsys.readouterr() == ("", "")


def test_waiting_watches_from_the_side(monkeypatch):
    stream = Stream(True)
    monkeypatch.setattr(module, "AFTER", 0.0)
    monkeypatch.setattr(module, "REDRAW", 0.01)
    monkeypatch.setattr("sys.stderr", stream)
    with waiting("save", lambda: 3.0, 4.0, "MB"):
        time.sleep(0.3)
    assert "save  3/4 MB  75 %  " in stream.text and stream.text.endswith("\r\x1b[K")
    written = len(stream)
    time.sleep(0.05)
    assert len(stream) == written  # the thread has gone
    with waiting("load"):
        time.sleep(0.2)
    assert "load  0s" in stream.text


def test_long_tokenising_shows_rows_and_rate(monkeypatch, tmp_path):
    """Where it is used: the loader, the reference pass, evaluation."""
    import tiny
    from fastpost.data import loader
    from fastpost.train.config import DataConfig

    stream = Stream(True)
    monkeypatch.setattr(module, "AFTER", 0.0)
    monkeypatch.setattr(module, "REDRAW", 0.0)
    monkeypatch.setattr("sys.stderr", stream)
    path = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.preference_rows(30))
    loader.load_dataset(DataConfig(train=str(path)), tiny.tokenizer())
    assert f"tokenise {path}  30/30 rows  100 %" in stream.text and stream.text.endswith("\r\x1b[K")


def test_durations():
    assert [duration(s) for s in (0.4, 59, 60, 3599, 3600, 90061)] == [
        "0s",
        "59s",
        "1m00s",
        "59m59s",
        "1h00m",
        "25h01m",
    ]


def test_more_words_on_a_line():
    clock, stream = Clock(), Stream(True)
    line = Line("generate", 10, "rows", stream, clock, also=lambda seconds: f"{300 / seconds:.0f} tokens/s")
    clock.now = 3.0
    line.update(5)
    assert stream.text.endswith("generate  5/10 rows  50 %  1.7 rows/s  eta 3s  100 tokens/s")
