"""Which ranks of this host are gone or held: names the culprit when a collective fails.

ZeRO assumes that every rank answers; the first one that does not is what a user has to look at.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_ENDED, _STOPPED = "X", ("T", "t")


@dataclass(frozen=True)
class Seat:
    """Where a rank runs: its host, its process there, and the kernel and numbering that the process belongs to.

    Containers may share a host name, each with a process 7 of its own; ``space`` tells them apart.
    """

    host: str
    pid: int
    space: str


def own_seat() -> Seat:
    """This process's seat."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        space = ""
    return Seat(socket.gethostname(), os.getpid(), space)


class Watch:
    """Every rank's seat, by rank. Ranks that cannot be seen from here, on other hosts or in other containers, are never
    called gone."""

    def __init__(self, seats: Sequence[Seat]) -> None:
        self._seats = tuple(seats)

    def gone(self, patience_s: float = 1.0) -> tuple[int, ...]:
        """Ranks seen from here whose process has ended; looks again for ``patience_s``, since links break a moment
        before."""
        until_s = time.monotonic() + patience_s
        while True:
            lost = tuple(rank for rank, state in self._states() if state == _ENDED)
            if lost or time.monotonic() >= until_s:
                return lost
            time.sleep(0.02)

    def stopped(self) -> tuple[int, ...]:
        """Ranks seen from here whose process is held, by SIGSTOP or a debugger."""
        return tuple(rank for rank, state in self._states() if state in _STOPPED)

    def culprits(self) -> str:
        """A sentence that names who is gone or held, or that says what else may be the cause."""
        lost = self.gone()
        if lost:
            return f"{self._names(lost)} ended, which is the cause; this error is its consequence."
        held = self.stopped()
        if held:
            return (
                f"{self._names(held)} has been stopped (SIGSTOP or a debugger), which is the cause; resume or end it."
            )
        return "The first error on any other rank is the cause; this one is its consequence."

    def _names(self, ranks: Sequence[int]) -> str:
        seats = self._seats
        return " and ".join(f"rank {rank} (process {seats[rank].pid} on {seats[rank].host})" for rank in ranks)

    def _states(self) -> Iterator[tuple[int, str]]:
        mine = own_seat()
        for rank, seat in enumerate(self._seats):
            if seat.space == mine.space and (seat.space or seat.host == mine.host):
                yield rank, _state(seat.pid)


def _state(pid: int) -> str:
    """The kernel's letter for a process that is seen from here; ``X`` for one that ended, waited for or not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        if status.parent.parent.joinpath("self").exists():
            letter = status.read_text(errors="replace").rpartition(")")[2].split()[0]
            return _ENDED if letter == "Z" else letter
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return _ENDED
    except PermissionError:
        return "S"
    return "S"
