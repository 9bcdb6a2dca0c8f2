"""Bytes and calls: the unit that a forecast of communication counts in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one rank sends, and collectives it issues."""

    sent_bytes: int = 0
    calls: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(sent_bytes=self.sent_bytes + other.sent_bytes, calls=self.calls + other.calls)

    def times(self, count: int) -> Traffic:
        """This much ``count`` times."""
        return Traffic(sent_bytes=self.sent_bytes * count, calls=self.calls * count)
