"""A clock for promises of seconds, on machines whose host takes the cores away for minutes."""

from __future__ import annotations

import time

from trivium.bench.stolen import stolen_s


def machine_s() -> float:
    """Seconds that this machine had: the monotonic clock, less what its host gave to others, of all cores together.

    Only differences mean something. Where nothing is stolen, or not told (off Linux), they are the monotonic clock's.
    """
    return time.monotonic() - stolen_s()
