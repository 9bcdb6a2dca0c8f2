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


def stolen_s() -> float:
    """Seconds since start-up in which a core had work and the host did not run it, of all cores together; 0 where
    nobody tells (off Linux, or no virtual machine)."""
    if not _STAT.exists():
        return 0.0
    every, *_ = _STAT.read_text().partition("\n")
    return int(every.split()[8]) / _TICKS_PER_S


class Watched:
    """The share of this machine's cores that was gone between two moments."""

    def __init__(self) -> None:
        self._began_s, self._stolen_s = time.monotonic(), stolen_s()

    def share(self) -> float:
        """Since the beginning: 0 none of the cores, 1 all of them."""
        taken_s = time.monotonic() - self._began_s
        cores = psutil.cpu_count(logical=True) or 1
        return (stolen_s() - self._stolen_s) / (taken_s * cores) if taken_s else 0.0


def least_stolen(
    measure: Callable[[], T], tries: int, agree: Callable[[float], float] = lambda share: share
) -> tuple[T, float]:
    """What ``measure`` gave when least was stolen, and the share: called until it is `LITTLE`, ``tries`` times or less.

    ``agree`` makes one share of those that several ranks saw, so that they go on or stop together.
    """

    def once() -> tuple[T, float]:
        watched = Watched()
        return measure(), agree(watched.share())

    best, least = once()
    for _ in range(tries - 1):
        if least <= LITTLE:
            break
        found, share = once()
        if share < least:
            best, least = found, share
    return best, least
