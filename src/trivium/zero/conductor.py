"""When to gather what, and how ranks that differ stay together.

ZeRO section 7.2.2: gathering the next layer overlaps computing this one; at any number of ranks nobody waits for a
peer that
never comes.

[Note: fast and careful]
A pass (forward or backward) whose gathers were recorded before is walked *fast*: every rank issues the recorded
gathers, in order,
ahead of need, and performs all of them even if it uses fewer. Before a pass the ranks compare the numbers of their
records.
Where these differ, or a rank needs what is not on the list, it goes on *carefully*: each gather is announced, and
whoever is waiting
at any meeting takes part in what others announce. So ranks may use different units, another order, or run fewer
micro-batches.
Meetings, gathers and reductions travel in channels of their own, so their relative order is free.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from enum import IntEnum

from trivium.base.errors import MismatchError
from trivium.dist.comm import Comm
from trivium.memory.prefetch import Prefetcher
from trivium.zero.unit import Unit


class Meeting(IntEnum):
    """What a rank has come to do; all ranks must come for the same."""

    GATHER = 1
    FORWARD = 2
    BACKWARD = 3
    REDUCE = 4
    STEP = 5
    CLIP = 6
    VISIT = 7


_PASSES = (Meeting.FORWARD, Meeting.BACKWARD)
Rows = list[list[int]]


class Conductor:
    """Walks the units of one model, at most ``room`` of them gathered at once beside those that stay.

    ``progress`` says how many flats this rank has launched, ``drive`` completes so many; ``join`` takes part in a
    reduction that other ranks came for and this one did not.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        control: Comm,
        num_words: int,
        depth: int,
        room: int,
        *,
        progress: Callable[[], int],
        drive: Callable[[int], None],
        join: Callable[[Rows], None],
    ) -> None:
        self._units = tuple(units)
        self._control = control
        self._what = f"{type(units[0].module).__name__} (sharded model {control.link.next_model()})"
        self._num_words = num_words
        self._room = room
        self._progress, self._drive, self._join = progress, drive, join
        self._sharded = any(unit.sharded for unit in units)
        self._prefetcher: Prefetcher[Unit] = Prefetcher(self._fetch, self._has_room, depth)
        self._plans: dict[str, tuple[Unit, ...]] = {}
        self._profiles: dict[str, int] = {}
        self._walked = 0
        self._profile = 0
        self._record: list[Unit] = []
        self._plan_name = ""
        self._phase = "visit"
        self._fast = False
        self.num_detours = 0

    def begin(self, meeting: Meeting, plan_name: str, profile: int = 0) -> bool:
        """A pass begins: compare records with the other ranks, walk fast if all agree.

        ``profile`` stands for what the pass will use. Returns whether every rank will do the same in this pass.
        """
        self.end()
        if not self._sharded:
            return meeting is Meeting.BACKWARD and _all_equal(self._meet(meeting, [0, profile]), 2)
        profile ^= self._walked if meeting is Meeting.BACKWARD else 0
        self._plan_name, self._phase, self._profile = plan_name, meeting.name.lower(), profile
        plan = self._plans.get(plan_name, ())
        number = _number_of(plan)
        rows = self._meet(meeting, [number, profile])
        self._fast = number != 0 and _all_equal(rows, 1)
        self._record = []
        if self._fast:
            self._prefetcher.walk(plan)
            self._prefetcher.top_up()
        return self._fast and _all_equal(rows, 2) and self._profiles.get(plan_name) == profile

    def need(self, unit: Unit) -> None:
        """Return when ``unit`` can be read."""
        if unit.whole or not unit.sharded:
            return
        if self._fast:
            passed = self._prefetcher.reach(unit)
            if passed is not None:
                for other in passed:
                    self._detour(other)
                unit.finish_gather()
                self._record.append(unit)
                self._prefetcher.top_up()
                return
            self._leave_fast()
            if unit.held:
                return
        self._record.append(unit)
        self._meet(Meeting.GATHER, [self._progress(), unit.number])

    def top_up(self) -> None:
        """Memory came free: gather ahead again."""
        if self._fast:
            self._prefetcher.top_up()

    def end(self) -> None:
        """The pass is over: take part in what is left of the list, remember what was used."""
        if self._plan_name:
            if self._fast:
                for unit in self._prefetcher.finish():
                    unit.finish_gather()
                    unit.release()
            self._plans[self._plan_name] = tuple(self._record)
            self._profiles[self._plan_name] = self._profile
            self._walked = _number_of(self._record)
        self._plan_name, self._fast, self._phase = "", False, "visit"

    def meet(self, meeting: Meeting, words: Sequence[int] = ()) -> Rows:
        """Wait until every rank has come for ``meeting``; everyone's words, by rank.

        Raises MismatchError on every rank when they came for things that cannot wait for each other.
        """
        self.end()
        rows = self._meet(meeting, words)
        if rows is None:
            raise MismatchError(f"{meeting.name.lower()} cannot wait for a pass")
        return rows

    def _meet(self, meeting: Meeting, words: Sequence[int]) -> Rows | None:
        numbers = [int(meeting), *words]
        numbers += [0] * (self._num_words + 1 - len(numbers))
        while True:
            rows = self._control.agree(numbers, self._what, f"{meeting.name.lower()} of {self._what}")
            wanted = sorted({row[2] for row in rows if row[0] == Meeting.GATHER})
            if wanted:
                self._drive(min(row[1] if row[0] in (Meeting.GATHER, Meeting.REDUCE) else 0 for row in rows))
                self._serve([self._units[number] for number in wanted], words[1] if meeting is Meeting.GATHER else -1)
                if meeting is Meeting.GATHER:
                    return rows
                continue
            came = {Meeting(row[0]) for row in rows}
            if len(came) == 1:
                return rows
            if came & set(_PASSES):
                if meeting in _PASSES:
                    return None
                continue
            if Meeting.REDUCE in came and came <= {Meeting.REDUCE, Meeting.STEP, Meeting.CLIP}:
                if meeting is Meeting.REDUCE:
                    return rows
                self._join(rows)
                continue
            raise MismatchError(
                f"ranks are in different phases of {self._what}: "
                + ", ".join(
                    f"rank {self._control.ranks[rank]} in {Meeting(row[0]).name.lower()}"
                    for rank, row in enumerate(rows)
                )
            )

    def _serve(self, units: Sequence[Unit], mine: int) -> None:
        for unit in units:
            was_held = unit.held
            unit.start_gather(self._phase)
            unit.finish_gather()
            if unit.number != mine and not was_held:
                unit.release()

    def _fetch(self, unit: Unit) -> None:
        unit.start_gather(self._phase)

    def _has_room(self) -> bool:
        return sum(unit.held and not unit.keep for unit in self._units) < self._room

    def _detour(self, unit: Unit) -> None:
        unit.finish_gather()
        self.num_detours += 1

    def _leave_fast(self) -> None:
        for unit in self._prefetcher.finish():
            self._detour(unit)
        self._fast = False
        self.num_detours += 1


def _number_of(plan: Sequence[Unit]) -> int:
    """A number that stands for ``plan``; 0 for an empty one."""
    return zlib.crc32(repr([unit.number for unit in plan]).encode()) if plan else 0


def _all_equal(rows: Rows | None, word: int) -> bool:
    return rows is not None and all(row[word] == rows[0][word] for row in rows)
