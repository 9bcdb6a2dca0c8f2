"""`init` takes the process group that is there: its own from before, or one that the program made."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch.distributed as dist

import trivium as tv
from tests.worlds import ROOT, Worlds, child_environment, free_port

PROGRAM = """
import sys, torch.distributed as dist
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + sys.argv[1], rank=0, world_size=1)
import trivium as tv
group = dist.group.WORLD
mesh = tv.init(device="cpu")
print(dist.group.WORLD is group, mesh.rank, mesh.size, mesh.data_size, mesh.comm("dp").all_reduce_ints([5]))
"""


def again(mesh: Any) -> tuple[bool, list[int], int, int]:
    group = dist.group.WORLD
    other = tv.init(device="cpu")
    return dist.group.WORLD is group, other.comm("dp").all_reduce_ints([mesh.rank + 1]), other.data_rank, mesh.rank


def test_a_second_init_joins_the_same_ranks(world: Worlds) -> None:
    for same, total, data_rank, rank in world(2).run(again):
        assert (same, total, data_rank) == (True, [3], rank)


def test_a_group_that_the_program_made_is_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(free_port())],
        cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.stdout == "True 0 1 1 [5]\n", done.stderr
