"""Ranks of which the last dies while they connect to each other: ``python -m tests.dist.killed_meeting``."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import trivium as tv
from trivium.base.errors import RankError
from trivium.dist import meeting


def die(*given: Any) -> dict[int, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


if __name__ == "__main__":
    if os.environ["RANK"] == "2":
        meeting._connect = die
    try:
        tv.init(device="cpu")
    except RankError as error:
        sys.stdout.write(f"{error}\n")
        sys.stdout.flush()
        sys.exit(1)
