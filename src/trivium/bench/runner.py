"""The side-by-side runner: contestants take turns, round after round, and are compared within each round only.

A shared machine drifts by tens of percent over minutes; a ratio of two times from one round does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trivium.base.errors import ConfigError

Step = Callable[[int], None]
Times = dict[str, list[list[float]]]


def take_turns(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    per_round: int,
    meet: Callable[[], None],
    first_step: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Seconds of every step on this rank: name → round → step. Collective where the steps are.

    In each round every contestant does ``per_round`` steps on the same batches; who begins moves on by one per round.
    ``meet`` returns when all ranks have come, so that no one pays for another's lateness. ``clock`` may be
    `time.process_time`, which other processes do not slow, for steps that neither wait nor run in several threads.
    """
    names = list(steps)
    times: Times = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            meet()
            taken = []
            for inner in range(per_round):
                started = clock()
                steps[name](first_step + number * per_round + inner)
                taken.append(clock() - started)
            times[name].append(taken)
    return times


def slowest(by_rank: Sequence[Times]) -> Times:
    """A step lasts until its last rank is done: the element-wise maximum over ranks."""
    return {
        name: [
            [max(step) for step in zip(*same_round, strict=True)]
            for same_round in zip(*(times[name] for times in by_rank), strict=True)
        ]
        for name in by_rank[0]
    }


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The middle of a few numbers, and how far they lie apart."""

    least: float
    median: float
    greatest: float

    def to_dict(self) -> dict[str, float]:
        """For a report."""
        return {key: round(value, 6) for key, value in asdict(self).items()}


def spread(values: Sequence[float]) -> Spread:
    """The spread of one or more numbers."""
    if not values:
        raise ConfigError("no values to summarise: run at least one round")
    return Spread(least=min(values), median=statistics.median(values), greatest=max(values))


def ratios(times: Times, base: str) -> dict[str, Spread]:
    """Per contestant the spread over rounds of (its round's median step) / (the base's in the same round)."""
    if base not in times:
        raise ConfigError(f"base={base!r} took no part; contestants were {', '.join(times)}")
    middles = {name: [statistics.median(taken) for taken in rounds] for name, rounds in times.items()}
    return {
        name: spread([mine / theirs for mine, theirs in zip(middle, middles[base], strict=True)])
        for name, middle in middles.items()
    }


def summary(times: Times) -> dict[str, Any]:
    """Step times per contestant, over all rounds."""
    return {name: spread([step for taken in rounds for step in taken]).to_dict() for name, rounds in times.items()}
