"""Named points at which a test can make a process fail, armed by ``TRIVIUM_FAULT`` and a no-op without it.

``TRIVIUM_FAULT="point:rank:step:action"``, several parted by commas; ``*`` for any rank or step. Actions: ``exc``
raises, ``kill9`` and ``stop`` signal the process, ``delay=ms`` sleeps, ``eio`` and ``enospc`` raise that OSError,
``short`` and ``flip`` are returned for the caller to write less or one wrong bit.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import time
from dataclasses import dataclass

from trivium.base.errors import ConfigError

VARIABLE = "TRIVIUM_FAULT"
ACTIONS = ("exc", "kill9", "stop", "delay", "eio", "enospc", "short", "flip")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One armed point; ``rank`` or ``step`` None means any."""

    point: str
    rank: int | None
    step: int | None
    action: str
    delay_s: float = 0.0


@functools.cache
def faults() -> tuple[Fault, ...]:
    """What this process has armed: the environment as it was at the first call, unchanged from then on.

    Raises:
        ConfigError: the variable is set and cannot be read.
    """
    return parse(os.environ.get(VARIABLE, ""))


def parse(text: str) -> tuple[Fault, ...]:
    """The faults that ``text``, in the form of the variable, arms.

    Raises:
        ConfigError: a part that is not ``point:rank:step:action``.
    """
    return tuple(_parse_one(part.strip()) for part in text.split(",") if part.strip())


def reach(point: str, *, rank: int = 0, step: int | None = None) -> str | None:
    """Say that ``point`` is reached; what is armed for it happens here.

    Returns:
        ``"short"`` or ``"flip"`` where the caller is to spoil what it writes, else None.

    Raises:
        RuntimeError: for ``exc``.
        OSError: for ``eio`` and ``enospc``.
    """
    for fault in faults():
        if fault.point == point and fault.rank in (None, rank) and fault.step in (None, step):
            return _happen(fault, f"{point}, rank {rank}, step {step}")
    return None


def _happen(fault: Fault, place: str) -> str | None:
    match fault.action:
        case "exc":
            raise RuntimeError(f"injected fault at {place}")
        case "kill9":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "delay":
            time.sleep(fault.delay_s)
        case "eio":
            raise OSError(errno.EIO, f"injected fault at {place}: {os.strerror(errno.EIO)}")
        case "enospc":
            raise OSError(errno.ENOSPC, f"injected fault at {place}: {os.strerror(errno.ENOSPC)}")
        case action:
            return action
    return None


def _parse_one(text: str) -> Fault:
    parts = text.split(":")
    if len(parts) != 4 or not parts[0]:
        raise ConfigError(
            f"{VARIABLE}={text!r}: expected point:rank:step:action, for example checkpoint.shard:0:3:kill9"
        )
    point, rank, step, action = parts
    name, _, argument = action.partition("=")
    if name not in ACTIONS:
        raise ConfigError(f"{VARIABLE}={text!r}: unknown action {name!r}; allowed: {', '.join(ACTIONS)} (delay=ms)")
    if (name == "delay") != argument.isdigit() or (argument and name != "delay"):
        raise ConfigError(f"{VARIABLE}={text!r}: delay takes milliseconds, for example delay=50; the others nothing")
    delay_s = int(argument) / 1000 if argument else 0.0
    return Fault(point=point, rank=_number(rank, text), step=_number(step, text), action=name, delay_s=delay_s)


def _number(text: str, whole: str) -> int | None:
    if text == "*":
        return None
    if not text.isdigit():
        raise ConfigError(f"{VARIABLE}={whole!r}: {text!r} is neither a number nor * (any)")
    return int(text)
