"""The most bytes that torch's CPU allocator had given out at once, told by torch's profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass
class Allocated:
    """``peak_bytes`` above what was there before; known once the block has ended."""

    peak_bytes: int = 0


@contextlib.contextmanager
def allocated() -> Iterator[Allocated]:
    """Watch what the block allocates."""
    found = Allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield found
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events):
        live += change
        found.peak_bytes = max(found.peak_bytes, live)
