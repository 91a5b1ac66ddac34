# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, and Ctrl-C once: finish the step, write a checkpoint, leave.

with Stop() as stop:
    for step in ...:
        if stop.signal: ...            # its number, 0 while nobody asked
"""

from __future__ import annotations

import os
import signal
import threading
import time

TWICE_S = 2.0
"""Ctrl-C reaches a process under torchrun twice, from the terminal and from torchrun; so soon it is one wish."""


class Stopped(SystemExit):
    """The run stopped because it was asked to, after a checkpoint. Exit status 128 + signal, as shells count."""


class Stop:
    """Context manager that turns the first SIGTERM or SIGINT into `signal`. A second Ctrl-C interrupts at once."""

    def __init__(self, *, speaks: bool = True):
        self.signal, self._speaks, self._first = 0, speaks, 0.0
        self._before = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {s: signal.signal(s, self._asked) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame) -> None:
        if self.signal:
            if number == signal.SIGINT and time.monotonic() - self._first > TWICE_S:
                raise KeyboardInterrupt
            return
        self.signal, self._first = number, time.monotonic()
        if self._speaks:
            again = " (Ctrl-C again: at once, without)" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            os.write(2, f"{name}: stopping after this step, with a checkpoint{again}\n".encode())
