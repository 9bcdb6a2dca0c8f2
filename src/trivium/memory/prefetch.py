"""Walk an ordered list with a few items in flight ahead: the one prefetcher of the house.

ZeRO section 7.2.2 (pipelined all-gather); what "fetch" means is given by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Prefetcher(Generic[Item]):
    """Starts fetches in list order, never out of it, at most ``depth`` beyond the item in use.

    ``fetch(item)`` starts one fetch and returns at once; ``room()`` says whether another may be held. The owner waits
    for
    and releases items itself. An item may occur more than once.
    """

    def __init__(self, fetch: Callable[[Item], None], room: Callable[[], bool], depth: int = 1) -> None:
        self._fetch = fetch
        self._room = room
        self._depth = depth
        self._order: tuple[Item, ...] = ()
        self._used = 0
        self._started = 0

    def walk(self, order: Sequence[Item]) -> None:
        """Begin anew along ``order``; nothing is fetched yet."""
        self._order = tuple(order)
        self._used = self._started = 0

    def reach(self, item: Item) -> tuple[Item, ...] | None:
        """``item`` is needed now: start everything up to it. Returns the items passed over, or None if it is not
        ahead."""
        try:
            position = self._order.index(item, self._used)
        except ValueError:
            return None
        passed = self._order[self._used : position]
        self._start_until(position + 1)
        self._used = position + 1
        return passed

    def top_up(self) -> None:
        """Start what may be in flight ahead of the item in use, as far as there is room."""
        end = min(self._used + self._depth, len(self._order))
        while self._started < end and self._room():
            self._start_until(self._started + 1)

    def finish(self) -> tuple[Item, ...]:
        """Start all that is left of the list; returns the items nobody reached."""
        rest = self._order[self._used :]
        self._start_until(len(self._order))
        self._used = len(self._order)
        return rest

    def _start_until(self, end: int) -> None:
        while self._started < end:
            item = self._order[self._started]
            self._started += 1
            self._fetch(item)
