"""The side-by-side runner: contestants take turns, round after round, and are compared within each round only.

A shared machine drifts by tens of percent over minutes; a ratio of two times from one round does not. A turn of which
the host took much away is repeated.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from trivium.base.errors import ConfigError
from trivium.bench.stolen import LITTLE, Agree, least_stolen
from trivium.dist.comm import Comm

Step = Callable[[int], None]
Times = dict[str, list[list[float]]]


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Seconds, name → round → step, and the share of the cores that was stolen from each turn, name → round."""

    times: Times
    stolen: dict[str, list[float]]


def take_turns(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    per_round: int,
    meet: Callable[[], None],
    first_step: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    tries: int = 1,
    agree: Agree = lambda share, late: (share, late),
    until_s: float | None = None,
) -> Turns:
    """Seconds of every step on this rank. Collective where the steps are.

    In each round every contestant does ``per_round`` steps on the same batches; who begins moves on by one per round.
    ``meet`` returns when all ranks have come, so that no one pays for another's lateness. ``clock`` may be
    `time.process_time`, which other processes do not slow, for steps that neither wait nor run in several threads.
    ``tries``, ``agree`` and ``until_s``: see `stolen.least_stolen`.
    """
    names = list(steps)
    turns = Turns(times={name: [] for name in names}, stolen={name: [] for name in names})

    def taken(name: str, first: int) -> list[float]:
        meet()
        times = []
        for number in range(first, first + per_round):
            started = clock()
            steps[name](number)
            times.append(clock() - started)
        return times

    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found, share = least_stolen(partial(taken, name, first_step + number * per_round), tries, agree, until_s)
            turns.times[name].append(found)
            turns.stolen[name].append(round(share, 4))
    return turns


def most_on(comm: Comm) -> Agree:
    """The greatest share that a rank of ``comm`` saw, and late if one is, on all. Collective where it is called."""

    def agree(share: float, late: bool) -> tuple[float, bool]:
        shares, lates = zip(*comm.swap([round(share * 1e6), int(late)], "turns"), strict=True)
        return max(shares) / 1e6, bool(max(lates))

    return agree


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


def counting(num_rounds: int, stolen: Mapping[str, Sequence[float]] | None, *names: str) -> Sequence[int]:
    """The rounds in which at most `stolen.LITTLE` was taken from each of these; all if none is like that."""
    every = range(num_rounds)
    return [n for n in every if stolen is None or max(stolen[name][n] for name in names) <= LITTLE] or every


def ratios(times: Times, base: str, stolen: Mapping[str, Sequence[float]] | None = None) -> dict[str, Spread]:
    """Per contestant the spread over rounds of (its round's median step) / (the base's in the same round).

    Rounds in which more than `stolen.LITTLE` was stolen from one of the two do not count, unless all are like that.
    """
    if base not in times:
        raise ConfigError(f"base={base!r} took no part; contestants were {', '.join(times)}")
    middles = {name: [statistics.median(taken) for taken in rounds] for name, rounds in times.items()}
    found = {}
    for name, middle in middles.items():
        calm = counting(len(middle), stolen, name, base)
        found[name] = spread([middle[n] / middles[base][n] for n in calm])
    return found


def summary(times: Times, stolen: Mapping[str, Sequence[float]] | None = None) -> dict[str, Any]:
    """Step times per contestant, over the rounds that `ratios` counts, each contestant's own."""
    found = {}
    for name, rounds in times.items():
        calm = counting(len(rounds), stolen, name)
        found[name] = spread([step for n in calm for step in rounds[n]]).to_dict()
    return found
