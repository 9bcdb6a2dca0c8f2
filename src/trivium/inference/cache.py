"""The paged cache's tensors: how many bytes a block takes in each layer, how many blocks fit, and copies among them.

DeepSpeed Inference section 3.1. A block spans all layers; S block size in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from trivium.base.errors import CapacityError, ConfigError
from trivium.base.units import format_bytes
from trivium.inference.blocks import most_held
from trivium.kernels.program import Cache, CacheSpec
from trivium.memory.meter import Meter

CacheDtype = Literal["float32", "bfloat16", "int8"]
CacheKind = Literal["paged", "windowed", "latent"]
CACHE_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_ALIGNMENT = 64


def kind_of(spec: CacheSpec) -> CacheKind:
    """What a layer declares by its spec: latent has no values of its own, windowed reads no further back."""
    if spec.value_dim == 0:
        return "latent"
    return "paged" if spec.window is None else "windowed"


def window_of(specs: Sequence[CacheSpec]) -> int | None:
    """How far back any layer reads, where all have a window: a block spans all layers and goes when none needs it."""
    windows = [spec.window for spec in specs if spec.window is not None]
    return max(windows) if windows and len(windows) == len(specs) else None


def longest_held(positions: int, *, num_blocks: int, block_size: int, window: int | None, step_tokens: int) -> int:
    """Tokens of the longest sequence that ``num_blocks`` hold, ``positions`` at most."""
    if most_held(positions, block_size=block_size, window=window, step_tokens=step_tokens) <= num_blocks:
        return positions
    return min(positions, num_blocks * block_size)


def check_dtype(dtype: str) -> CacheDtype:
    """Raises ConfigError for a dtype that cache entries cannot have."""
    for known in ("float32", "bfloat16", "int8"):
        if dtype == known:
            return known
    raise ConfigError(f"cache_dtype={dtype!r}: expected float32, bfloat16 or int8")


def layer_bytes_per_token(spec: CacheSpec, dtype: CacheDtype) -> int:
    """Bytes one token takes in one layer; int8 has one fp32 scale per head for keys and one for values."""
    entries = spec.kv_heads * (spec.head_dim + spec.value_dim)
    scales = 4 * spec.kv_heads * (1 if spec.value_dim == 0 else 2) if dtype == "int8" else 0
    return entries * CACHE_DTYPES[dtype].itemsize + scales


def block_bytes(specs: Sequence[CacheSpec], dtype: CacheDtype, block_size: int) -> int:
    """Bytes one block takes in all layers together."""
    return block_size * sum(layer_bytes_per_token(spec, dtype) for spec in specs)


def blocks_within(
    specs: Sequence[CacheSpec], dtype: CacheDtype, block_size: int, *, memory_bytes: int, most_tokens: int
) -> int:
    """How many blocks ``memory_bytes`` hold, and no more than ``most_tokens`` need.

    Raises:
        CapacityError: not even one.
    """
    each = block_bytes(specs, dtype, block_size)
    most = -(-most_tokens // block_size)
    count = min(most, memory_bytes // each) if each else most
    if count < 1:
        raise CapacityError(
            f"{format_bytes(max(0, memory_bytes))} are left for the cache, one block of {block_size} tokens takes "
            f"{format_bytes(each)}; give more memory, or cache_dtype='int8'"
        )
    return count


class PagedCache:
    """One `kernels.program.Cache` per layer, with the same block numbers in all of them.

    On the CPU the memory is taken from the system as blocks are first written.
    """

    def __init__(
        self,
        specs: Sequence[CacheSpec],
        *,
        num_blocks: int,
        block_size: int,
        dtype: CacheDtype,
        device: str = "cpu",
        meter: Meter | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.num_bytes = num_blocks * block_bytes(specs, dtype, block_size)
        self.window = window_of(specs)
        self.kinds = tuple(kind_of(spec) for spec in specs)
        self.caches = tuple(self._allocate(spec, device) for spec in specs)
        if meter is not None:
            meter.add("cache", self.num_bytes, "host" if device == "cpu" else "device")

    def longest(self, positions: int, step_tokens: int) -> int:
        """Tokens of the longest sequence that fits, ``positions`` at most."""
        return longest_held(
            positions,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            window=self.window,
            step_tokens=step_tokens,
        )

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (from, to); all are read before any is written."""
        if not pairs:
            return
        sources, targets = (torch.tensor(blocks) for blocks in zip(*pairs, strict=True))
        for tensor in self._tensors():
            tensor[targets.to(tensor.device)] = tensor[sources.to(tensor.device)]

    def clear(self, blocks: Sequence[int]) -> None:
        """Set blocks to zero: what a failed request left there must not reach anyone."""
        if blocks:
            for tensor in self._tensors():
                tensor[torch.tensor(list(blocks), device=tensor.device)] = 0

    def _tensors(self) -> list[torch.Tensor]:
        return [
            tensor
            for cache in self.caches
            for tensor in (cache.keys, cache.values, cache.key_scales, cache.value_scales)
            if tensor is not None
        ]

    def _allocate(self, spec: CacheSpec, device: str) -> Cache:
        place = (self.num_blocks, spec.kv_heads, self.block_size)
        dtype = CACHE_DTYPES[self.dtype]
        scaled = self.dtype == "int8"
        latent = spec.value_dim == 0
        return Cache(
            keys=_zeros((*place, spec.head_dim), dtype, device),
            values=None if latent else _zeros((*place, spec.value_dim), dtype, device),
            key_scales=_zeros(place, torch.float32, device) if scaled else None,
            value_scales=_zeros(place, torch.float32, device) if scaled and not latent else None,
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros; on the CPU aligned for the kernels, and untouched: numpy's come from calloc, torch's are written."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(num_bytes + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[start : start + num_bytes]).view(dtype).view(shape)
