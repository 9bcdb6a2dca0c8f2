"""What a run measures, one JSON object a line in metrics.jsonl: loss, speed, bytes on the wire, memory, skipped steps.

ZeRO sections 3 and 7: memory by category and bytes by phase are the paper's own quantities.
Rows: ``start``, ``step``, ``validation``, ``end``; every number finite or null.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from trivium.base.errors import DataError

FILE = "metrics.jsonl"


class Writer(Protocol):
    """Where rows go besides the file."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row."""

    def close(self) -> None:
        """No more rows come."""


class Recorder:
    """Writes rows into ``folder``/metrics.jsonl and to ``writers``, on rank 0; elsewhere pass ``folder`` None.

    Rows of steps after ``resumed`` are of a life that was lost, and are dropped when the file is opened. None stays in
    memory: `read` has them all.
    """

    def __init__(self, folder: Path | None, writers: tuple[Writer, ...] = (), *, resumed: int = 0) -> None:
        self._writers = writers
        self._file = None
        self._path = None if folder is None else folder / FILE
        if self._path is not None:
            fresh = self._path.with_name(f"{FILE}.tmp-{os.getpid()}")
            with fresh.open("w", encoding="utf-8") as kept:
                for row in _each(self._path) if resumed else ():
                    if row.get("step", 0) <= resumed:
                        kept.write(_line(row))
            fresh.replace(self._path)
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        """Add one row."""
        if self._file is None:
            return
        row = {"kind": kind, "time": round(time.time(), 3), **{key: _finite(value) for key, value in values.items()}}
        self._file.write(_line(row))
        self._file.flush()
        for writer in self._writers:
            writer.write(row)

    def read(self) -> list[dict[str, Any]]:
        """All rows until now; none on the other ranks."""
        return [] if self._path is None else read(self._path)

    def close(self) -> None:
        """Close the file and the writers."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for writer in self._writers:
            writer.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut off by a kill is left out. Raises DataError for others."""
    return list(_each(path))


def _each(path: Path) -> Iterator[dict[str, Any]]:
    """The rows one at a time."""
    if not path.exists():
        return
    broken: tuple[int, json.JSONDecodeError] | None = None
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if broken is not None:
                raise DataError(
                    f"{path}:{broken[0]}: not a row of metrics ({broken[1]}); move the file away to go on"
                ) from broken[1]
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                broken = (number, error)  # of the last line alone it is no fault
                continue
            if isinstance(row, dict):
                yield row


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def process_memory() -> dict[str, int | None]:
    """This process's bytes now (``rss``, and ``pss`` with shared pages divided, where Linux tells) and its peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rss_bytes": int(psutil.Process().memory_info().rss),
        "pss_bytes": _proportional(),
        "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
    }


def _proportional() -> int | None:
    try:
        text = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Native code's words on file descriptor 2 are dropped inside the block."""
    sys.stderr.flush()
    kept = os.dup(2)
    silent = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(silent, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silent)


class AllocatorPeak:
    """The most bytes that torch's allocator gave out inside the block, above what was out when it began: ``num_bytes``.

    On the CPU by the profiler, which slows the block a little.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_bytes = 0
        self._device = device
        self._before = 0
        self._profile: Any = None

    def __enter__(self) -> AllocatorPeak:
        """Begin to watch."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            with _quiet():
                self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Add up what was seen."""
        if self._profile is None:
            self.num_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        with _quiet():
            self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        live = 0
        for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
            live += change
            self.num_bytes = max(self.num_bytes, live)


def measured_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a plain matrix product on this rank, with the threads it has; the best of several short tries."""
    size = 4096 if device.type == "cuda" else 512
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - started))
    return best
