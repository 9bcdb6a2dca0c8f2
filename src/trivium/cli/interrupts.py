"""Signals at the wrong moment: those that must wait until a block has ended, those that are another process's.

Loading torch drops a Ctrl-C now and then, its store aborts by one, and one that comes while a process is being started
would leave that process behind.
"""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_WAIT_S = 0.5  # a handler runs this late at most when its signal comes just as a wait begins


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended; outside the main thread none can come."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def load_torch() -> None:
    """Import torch, so that what imports it later cannot lose an interrupt. Raises ImportError as the import does."""
    with interrupts_held():
        import torch  # noqa: F401


class HandedOn:
    """Signals that are passed to a process rather than heeded here; those that came before it was there, once it is."""

    def __init__(self) -> None:
        self.first = 0
        self._early: list[int] = []
        self._send: Callable[[int], None] | None = None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """A signal handler."""
        self.first = self.first or number
        if self._send is None:
            self._early.append(number)
        else:
            self._send(number)

    def to(self, send: Callable[[int], None]) -> None:
        """From now on ``send`` takes each signal's number, and at once those of the signals that came before."""
        self._send = send
        for number in self._early:
            send(number)


@contextmanager
def handed_on(*numbers: int) -> Iterator[HandedOn]:
    """Within the block signals of these numbers are handed on, but those that are ignored. In the main thread only."""
    hand = HandedOn()
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hand.receive) for number in heeded}
    try:
        yield hand
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ended(process: subprocess.Popen[Any]) -> tuple[Any, Any]:
    """Wait for ``process``; what it wrote to its pipes, as ``communicate`` gives it.

    In short waits: one without end would not be broken off by a signal that comes between the interpreter's last look
    for signals and the system's wait, and its handler would run only once the process had ended by itself.
    """
    while True:
        try:
            return process.communicate(timeout=_WAIT_S)
        except subprocess.TimeoutExpired:
            continue
