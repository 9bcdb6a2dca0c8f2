"""Which ranks of this host are gone: names the culprit when a collective fails.

ZeRO assumes that every rank answers; the first one that does not is what a user has to look at.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Seat:
    """Where a rank runs: its host and its process there."""

    host: str
    pid: int


def own_seat() -> Seat:
    """This process's seat."""
    return Seat(socket.gethostname(), os.getpid())


class Watch:
    """Every rank's seat, by rank. Ranks of other hosts cannot be seen from here and are never called gone."""

    def __init__(self, seats: Sequence[Seat]) -> None:
        self._seats = tuple(seats)

    def gone(self, patience_s: float = 1.0) -> tuple[int, ...]:
        """Ranks of this host whose process has ended; looks again for ``patience_s``, since links break a moment
        before."""
        mine, until_s = own_seat(), time.monotonic() + patience_s
        while True:
            lost = tuple(
                rank for rank, seat in enumerate(self._seats) if seat.host == mine.host and not _alive(seat.pid)
            )
            if lost or time.monotonic() >= until_s:
                return lost
            time.sleep(0.02)

    def culprits(self) -> str:
        """A sentence that names who is gone, or that says what else may be the cause."""
        lost = [f"rank {rank} (process {self._seats[rank].pid} on {self._seats[rank].host})" for rank in self.gone()]
        if lost:
            return f"{' and '.join(lost)} ended, which is the cause; this error is its consequence."
        return "The first error on any other rank is the cause; this one is its consequence."


def _alive(pid: int) -> bool:
    """Whether a process of this host runs; one that ended and was not waited for yet does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        if status.parent.parent.joinpath("self").exists():
            return status.read_text(errors="replace").rpartition(")")[2].split()[0] not in ("Z", "X")
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
