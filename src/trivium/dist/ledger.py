"""Calls, messages and bytes of every collective, by collective, axis and phase: what crossed the wire, as integers.

ZeRO section 7 (communication analysis) is asserted against these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Field = Literal["collective", "axis", "phase"]


@dataclass(frozen=True)
class Key:
    """What a tally counts: one collective on one axis in one phase."""

    collective: str
    axis: str
    phase: str


@dataclass
class Ledger:
    """A running account. Bytes are those this rank sends with a ring-optimal algorithm; calls are collectives
    issued; messages are the other ranks that this one sends something to, added up over calls."""

    sent_bytes: dict[Key, int] = field(default_factory=dict)
    num_calls: dict[Key, int] = field(default_factory=dict)
    num_messages: dict[Key, int] = field(default_factory=dict)

    def record(self, key: Key, num_bytes: int, num_messages: int = 0) -> None:
        """Add one call that sends ``num_bytes`` from this rank, in so many messages."""
        self.sent_bytes[key] = self.sent_bytes.get(key, 0) + num_bytes
        self.num_calls[key] = self.num_calls.get(key, 0) + 1
        self.num_messages[key] = self.num_messages.get(key, 0) + num_messages

    @property
    def bytes(self) -> int:
        """All bytes this rank sent while the ledger was open."""
        return sum(self.sent_bytes.values())

    @property
    def calls(self) -> int:
        """All collectives this rank issued while the ledger was open."""
        return sum(self.num_calls.values())

    @property
    def messages(self) -> int:
        """All messages this rank sent while the ledger was open."""
        return sum(self.num_messages.values())

    @property
    def payload_bytes(self) -> int:
        """Bytes of tensors alone, without what the ranks sent to agree on what comes next."""
        return sum(count for key, count in self.sent_bytes.items() if key.phase != "agree")

    def bytes_by(self, by: Field) -> dict[str, int]:
        """Bytes sent, summed by collective, axis or phase."""
        return _sum_by(self.sent_bytes, by)

    def calls_by(self, by: Field) -> dict[str, int]:
        """Calls issued, summed by collective, axis or phase."""
        return _sum_by(self.num_calls, by)

    def messages_by(self, by: Field) -> dict[str, int]:
        """Messages sent, summed by collective, axis or phase."""
        return _sum_by(self.num_messages, by)


def _sum_by(counts: dict[Key, int], by: Field) -> dict[str, int]:
    sums: dict[str, int] = {}
    for key, count in counts.items():
        name = key.collective if by == "collective" else key.axis if by == "axis" else key.phase
        sums[name] = sums.get(name, 0) + count
    return sums


class Books:
    """The ledgers that are open on one mesh; every collective is written into each of them."""

    def __init__(self) -> None:
        self._open: list[Ledger] = []

    def record(self, collective: str, axis: str, phase: str, num_bytes: int, num_messages: int = 0) -> None:
        """Write one call into every open ledger."""
        key = Key(collective, axis, phase)
        for ledger in self._open:
            ledger.record(key, num_bytes, num_messages)

    @contextmanager
    def open(self) -> Iterator[Ledger]:
        """Open a ledger for the length of the ``with`` block; ledgers nest."""
        ledger = Ledger()
        self._open.append(ledger)
        try:
            yield ledger
        finally:
            self._open = [other for other in self._open if other is not ledger]
