"""Time that the host of a virtual machine gives to others, and measuring again where it took much.

The kernel counts it (``steal`` in ``/proc/stat``); no clock of a process knows of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

_STAT = Path("/proc/stat")
_TICKS_PER_S = 100  # USER_HZ, in which Linux tells all programs

LITTLE = 0.02
"""The share of the cores that may be gone from a figure that is not taken again."""

T = TypeVar("T")
Agree = Callable[[float, bool], tuple[float, bool]]
"""Makes one answer of those of several ranks: the share that was stolen, and whether it is too late to repeat."""


def stolen_s() -> float:
    """Seconds since start-up in which a core had work and the host did not run it, of all cores together; 0 where
    nobody tells (off Linux, or no virtual machine)."""
    if not _STAT.exists():
        return 0.0
    columns = _STAT.read_text().partition("\n")[0].split()
    return int(columns[8]) / _TICKS_PER_S if len(columns) > 8 else 0.0


class Watched:
    """The share of this machine's cores that was gone between two moments."""

    def __init__(self) -> None:
        self._began_s, self._stolen_s = time.monotonic(), stolen_s()

    def share(self) -> float:
        """Since the beginning: 0 none of the cores, 1 all of them.

        One tick less than the kernel counted: it may have begun before, and of a short turn it is much.
        """
        taken_s = time.monotonic() - self._began_s
        gone_s = stolen_s() - self._stolen_s - 1 / _TICKS_PER_S
        cores = psutil.cpu_count(logical=True) or 1
        return min(max(gone_s / (taken_s * cores), 0.0), 1.0) if taken_s else 0.0


def least_stolen(
    measure: Callable[[], T],
    tries: int,
    agree: Agree = lambda share, late: (share, late),
    until_s: float | None = None,
) -> tuple[T, float]:
    """What ``measure`` gave when least was stolen, and the share: called until it is `LITTLE`, ``tries`` times or less.

    Nothing is repeated that would begin after ``until_s``, on the monotonic clock. ``agree`` makes one answer of those
    of several ranks, so that they go on or stop together.
    """

    def once() -> tuple[T, float, bool]:
        watched = Watched()
        found = measure()
        return found, *agree(watched.share(), until_s is not None and time.monotonic() >= until_s)

    best, least, late = once()
    for _ in range(tries - 1):
        if least <= LITTLE or late:
            break
        found, share, late = once()
        if share < least:
            best, least = found, share
    return best, least
