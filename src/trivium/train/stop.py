"""SIGTERM and Ctrl-C: the first asks for a clean stop after the step, a second one stops at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SAME_S = 0.5


class Stop:
    """Which signal this process was sent, 0 for none; an agreed maximum decides for all ranks."""

    def __init__(self) -> None:
        self.wish = 0
        self._first_at_s = 0.0

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """A signal handler. A launcher's copy of the same signal, within half a second, is not a second one."""
        now = time.monotonic()
        if self.wish == 0:
            self.wish, self._first_at_s = number, now
            return
        if now - self._first_at_s < _SAME_S:
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        os._exit(128 + number)


@contextmanager
def signals(*, deaf_after_error: bool = False) -> Iterator[Stop]:
    """Handle SIGTERM and SIGINT inside the block; outside the main thread nothing is handled.

    With ``deaf_after_error`` SIGTERM is ignored once an error has left the block, for a process that then only says so.
    """
    stop = Stop()
    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, stop.receive)
    except ValueError:  # not the main thread
        before = {}
    try:
        yield stop
    except BaseException:
        if deaf_after_error and before:
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
