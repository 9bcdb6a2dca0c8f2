"""Cases for tests/test_worlds.py."""

from __future__ import annotations

import os
import sys
import time
import warnings
from typing import Any

import pytest
import torch


def who(mesh: Any) -> tuple[int, int, int, int]:
    return mesh.rank, mesh.size, torch.get_num_threads(), os.getpid()


def total(mesh: Any, number: int, *, scale: int = 1) -> list[int]:
    return mesh.comm("dp").all_reduce_ints([number * scale * (mesh.rank + 1)])


def draw(mesh: Any) -> torch.Tensor:
    return torch.rand(3)


def fail_on(mesh: Any, rank: int) -> None:
    print(f"words before the fault of rank {mesh.rank}", file=sys.stderr)
    if mesh.rank == rank:
        raise KeyError(f"deliberate on {rank}")
    mesh.comm("dp").barrier()


def die_on(mesh: Any, rank: int) -> None:
    if mesh.rank == rank:
        os._exit(7)
    mesh.comm("dp").barrier()


def sleep_on(mesh: Any, rank: int) -> None:
    if mesh.rank == rank:
        time.sleep(3600)


def warn(mesh: Any) -> None:
    warnings.warn("a warning", stacklevel=1)


def skip(mesh: Any) -> None:
    pytest.skip("not on this machine")
