"""A clock for promises of seconds, on machines whose host takes the cores away for minutes."""

from __future__ import annotations

import time

from trivium.bench.stolen import stolen_s


class Since:
    """The time since this was made."""

    def __init__(self) -> None:
        self._began_s, self._stolen_s = time.monotonic(), stolen_s()

    def wall_s(self) -> float:
        """On the monotonic clock: for "not before", and for what a timeout counts."""
        return time.monotonic() - self._began_s

    def seconds(self) -> float:
        """Seconds that this machine had, for "at the latest": less what its host gave to others.

        That is told of all cores together, and which of them was waited for is not: so all of it is forgiven, but never
        more than nine tenths, for on many cores it may be more than there was. Where nothing is stolen, or not told
        (off Linux), it is `wall_s`.
        """
        wall_s = self.wall_s()
        return max(wall_s - (stolen_s() - self._stolen_s), wall_s / 10)
