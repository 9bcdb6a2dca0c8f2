"""The memory a process really holds: its proportional set size, now and at its peak.

ZeRO section 3 (where did all the memory go) is measured from outside here, whatever a library says of itself.

Proportional set size counts a page shared by n processes as 1/n of a page, so ranks on one host add up. It moves a
little when unrelated processes that share libraries come and go; ``anonymous`` does not, and is reported beside it.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from trivium.base.errors import SetupError

_ROLLUP = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True, kw_only=True)
class Resident:
    """Bytes held by this process: all of its proportional set size, and the anonymous part of it."""

    total_bytes: int
    anonymous_bytes: int


def resident() -> Resident:
    """What this process holds now. Raises SetupError where the kernel does not tell (other than Linux)."""
    try:
        text = _ROLLUP.read_text()
    except OSError as error:
        raise SetupError(f"{_ROLLUP} cannot be read ({error.strerror}): memory is measured on Linux only") from None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines()[1:] if line.endswith("kB")}
    return Resident(total_bytes=sizes["Pss"], anonymous_bytes=sizes["Pss_Anon"])


def trim() -> None:
    """Give freed memory back to the kernel, so that what building a model left behind is not counted as used."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class Peak:
    """Samples in a thread of its own, and whenever ``look`` is called, while the ``with`` block runs."""

    def __init__(self, interval_s: float = 0.01) -> None:
        self.highest = Resident(total_bytes=0, anonymous_bytes=0)
        self.num_samples = 0
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="resident-peak", daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._done.set()
        self._thread.join()

    def look(self) -> None:
        """Take one sample now."""
        with self._lock:
            now = resident()
            self.num_samples += 1
            self.highest = Resident(
                total_bytes=max(self.highest.total_bytes, now.total_bytes),
                anonymous_bytes=max(self.highest.anonymous_bytes, now.anonymous_bytes),
            )

    def _sample(self) -> None:
        while not self._done.wait(self._interval_s):
            self.look()
