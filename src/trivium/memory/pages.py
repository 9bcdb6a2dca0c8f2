"""Host buffers that come and go while the same pages of memory serve them in turn.

ZeRO section 5.3: a gathered layer's memory is dropped after use, many times a step.

[Note: recycled pages]
Giving a large block back to the kernel and taking another costs a page fault per 4 KiB, about 2 µs each: more than
filling it.
Sharing one buffer among layers is not possible where a buffer must keep its address for life. So a region keeps its
address and lends its *pages*: what a released region holds is moved under the next one by ``mremap``, without a copy
or a fault. Together the regions hold at most what was in use at once at the peak. Linux on the CPU only; where the
kernel refuses a move, pages are given back and faulted in as usual.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

_MAYMOVE_FIXED_DONTUNMAP = 1 | 2 | 4
_FAILED = ctypes.c_void_p(-1).value


class Region:
    """``num_bytes`` of address space with one address for life; ``memory`` is a tensor [num_bytes] of uint8 on it.

    Between `Pages.park` and the next `Pages.fill` its contents are undefined.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = max(-(-num_bytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)[:num_bytes]
        self.address = self.memory.data_ptr() if num_bytes else 0
        self.parked: list[tuple[int, int]] = []

    def drop(self) -> None:
        """Give what pages are parked here back to the kernel."""
        for start, end in self.parked:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
        self.parked = []


class Pages:
    """Moves pages from regions that were parked to those that are filled next; see [Note: recycled pages]."""

    def __init__(self) -> None:
        self._parked: list[Region] = []
        self._move = ctypes.CDLL(None, use_errno=True).mremap
        self._move.restype = ctypes.c_void_p
        self._move.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]

    def region(self, num_bytes: int) -> Region:
        """A new region without any pages yet."""
        return Region(num_bytes)

    def fill(self, region: Region) -> None:
        """``region`` is about to be written: bring pages under it, as far as others are parked."""
        if region in self._parked:
            self._parked.remove(region)
        held, region.parked = region.parked, []
        position = 0
        for start, end in (*held, (region.num_bytes, region.num_bytes)):
            while position < start and self._parked:
                position += self._take(region, position, start - position)
            position = end

    def park(self, region: Region) -> None:
        """``region`` is not read any more: its pages may serve others."""
        region.parked = [(0, region.num_bytes)]
        self._parked.append(region)

    def _take(self, region: Region, position: int, wanted: int) -> int:
        """Move up to ``wanted`` bytes of the region parked last to ``position``; returns how many."""
        source = self._parked[-1]
        start, end = source.parked.pop()
        begin = max(start, end - wanted)
        length = end - begin
        moved = self._move(source.address + begin, length, length, _MAYMOVE_FIXED_DONTUNMAP, region.address + position)
        if moved is None or moved == _FAILED:
            source.parked.append((start, end))
            source.drop()
            self._parked.pop()
            return 0
        if start < begin:
            source.parked.append((start, begin))
        if not source.parked:
            self._parked.pop()
        return length


def recycled_pages(device: torch.device) -> Pages | None:
    """Pages for buffers on ``device``; None where pages cannot be moved (other than the CPU of a Linux machine)."""
    return Pages() if device.type == "cpu" and sys.platform == "linux" else None
