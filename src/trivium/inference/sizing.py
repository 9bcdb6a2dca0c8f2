"""How much memory the cache gets, from what the user gives or the machine has: the plan asks here too.

DeepSpeed Inference section 3.1. Weights first, then the cache, in whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import psutil
import torch

from trivium.base.errors import CapacityError
from trivium.base.units import format_bytes
from trivium.inference.blocks import most_held
from trivium.inference.cache import CacheDtype, block_bytes, blocks_within, window_of
from trivium.kernels.program import CacheSpec, Program

BLOCK_SIZE = 16
_SHARE_OF_FREE = {"cpu": 0.25, "cuda": 0.85}


def cache_blocks(
    specs: Sequence[CacheSpec],
    *,
    dtype: CacheDtype,
    weight_bytes: int,
    memory_bytes: int | None,
    max_sequences: int,
    max_positions: int,
    step_tokens: int,
    device: str = "cpu",
    block_size: int = BLOCK_SIZE,
) -> int:
    """Blocks of the cache: what ``memory_bytes`` leaves beside the weights, never more than all sequences could use.

    None: a quarter of the memory that is free (of a GPU's, after the weights, 85 %).

    Raises:
        CapacityError: the weights alone do not fit, or not one block beside them.
    """
    if memory_bytes is None:
        left = int(_SHARE_OF_FREE[device.partition(":")[0]] * free_bytes(device))
    else:
        left = memory_bytes - weight_bytes
        if left < block_bytes(specs, dtype, block_size):
            raise CapacityError(
                f"memory of {format_bytes(memory_bytes)}: the weights take {format_bytes(weight_bytes)} and one block "
                f"of the cache {format_bytes(block_bytes(specs, dtype, block_size))}; give more, or quantize"
            )
    return blocks_within(
        specs,
        dtype,
        block_size,
        memory_bytes=left,
        most_tokens=max_sequences
        * block_size
        * most_held(max_positions, block_size=block_size, window=window_of(specs), step_tokens=step_tokens),
    )


def program_bytes(program: Program) -> int:
    """Bytes of all tensors that a program holds, each counted once; of meta tensors too."""
    seen: dict[int, int] = {}
    _count(program.operations, seen)
    return sum(seen.values())


def _count(value: object, seen: dict[int, int]) -> None:
    if isinstance(value, torch.Tensor):
        seen[id(value)] = value.numel() * value.element_size()
    elif isinstance(value, tuple):
        for item in value:
            _count(item, seen)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            _count(getattr(value, field.name), seen)


def free_bytes(device: str = "cpu") -> int:
    """Memory that could be taken now."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free
    return max(0, min(free, int(limit) - int(used))) if limit.isdigit() and used.isdigit() else free
