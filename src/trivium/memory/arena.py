"""Tensors that stay for long, carved from a few large blocks: what comes and goes beside them leaves no holes.

No paper. [Note: holes] Weights that are packed one after another through temporaries as large as themselves end up
spread over the allocator's heap, between temporaries that are free but cannot be given back: 416 MiB were held for
74 MiB of weights (10 layers of width 768, int8). From blocks of their own it is 115 MiB at the peak.
"""

from __future__ import annotations

import mmap

import torch

_ALIGNMENT = 64
_BLOCK_BYTES = 64 << 20


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
            size = max(_BLOCK_BYTES, -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
            self._block = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
            start = 0
        self._used = start + tensor.nbytes
        kept = self._block[start : self._used].view(tensor.dtype).view(tensor.shape)
        return kept.copy_(tensor)
