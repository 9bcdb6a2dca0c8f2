"""Tensors that stay for long, carved from a few large blocks: what comes and goes beside them leaves no holes.

DeepSpeed Inference section 3.1: generation is bound by reading weights.

[Note: holes] Weights that are packed one after another through temporaries as large as themselves end up
spread over the allocator's heap, between temporaries that are free but cannot be given back: 416 MiB were held for
74 MiB of weights (10 layers of width 768, int8). From blocks of their own it is 115 MiB at the peak.

[Note: huge pages] Blocks are huge pages where the kernel has them (2 MiB on Linux): a processor that reads weights one
after another stops at every page's end to ask where the next one lies, and below a hypervisor that takes two walks.
"""

from __future__ import annotations

import contextlib
import mmap
import sys

import torch

_ALIGNMENT = 64
_BLOCK_BYTES = 64 << 20
_HUGE = 2 << 20


class Arena:
    """Copies host tensors into blocks that it maps; a block is given back when the last tensor on it is gone."""

    def __init__(self) -> None:
        self._block: torch.Tensor | None = None
        self._used = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``tensor`` in the arena, aligned to 64 bytes; an empty one or one elsewhere as it is."""
        if tensor.device.type != "cpu" or not tensor.nbytes:
            return tensor
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if self._block is None or start + tensor.nbytes > self._block.numel():
            self._block = _block(max(_BLOCK_BYTES, -(-tensor.nbytes // _HUGE) * _HUGE))
            start = 0
        self._used = start + tensor.nbytes
        kept = self._block[start : self._used].view(tensor.dtype).view(tensor.shape)
        return kept.copy_(tensor)


def _block(num_bytes: int) -> torch.Tensor:
    """Fresh memory, uint8 [num_bytes], of huge pages as far as there are any; pages come when they are written."""
    mapped = mmap.mmap(-1, num_bytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without them: small ones do
            mapped.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + num_bytes]
