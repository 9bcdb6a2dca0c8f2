"""Collectives give what they promise, and the ledger counts what a ring-optimal algorithm sends."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.worlds import ROOT, Worlds, child_environment, free_port
from trivium.dist.watch import Seat, Watch, own_seat


@pytest.mark.parametrize("size", [1, 2, 4])
def test_values_and_bytes(world: Worlds, size: int) -> None:
    for rank, found in enumerate(world(size).run("tests.dist.cases", "moves")):
        assert found["gathered"] == [float(r) for r in range(size) for _ in range(4)]
        assert found["received"] == [[100 * r + 3.0 * rank + i for i in range(3)] for r in range(size)]
        assert found["text"] == [size - 1.0] * 2
        assert found["parts"] == ([[float(r)] * r for r in range(size)] if rank == 0 else None)
        assert found["total"] == [sum(range(size)), size * 2**60 + sum(range(size))] if size < 8 else True
        assert found["most"] == [0]
        assert found["json"] == [{"rank": r, "text": "é" * r} for r in range(size)]
        assert found["told"] == [size - 1]
        if size == 1:
            assert (found["bytes"], found["calls"]) == ({}, 0)
            continue
        assert found["bytes"]["forward"] == (size - 1) * 4 * 4
        assert found["bytes"]["backward"] == (size - 1) * 3 * 4
        assert found["bytes"]["broadcast"] == (8 if rank == size - 1 else 0)
        assert found["inner"] == {"agree": (size - 1) * 8 * 3}
        assert found["payload"] == found["all"] - found["bytes"]["agree"]
        assert found["after"] == 2


def test_a_shard_may_lie_in_its_output(world: Worlds) -> None:
    assert world(3).run("tests.dist.cases", "shard_in_place") == [[1.0, 1.0, 2.0, 2.0, 3.0, 3.0]] * 3


def test_what_differs_is_named(world: Worlds) -> None:
    said = world(3).run("tests.dist.cases", "differ")
    assert said == ["the letter differs across ranks: rank 0 has 'b', rank 1 has 'a'"] * 3


@pytest.mark.parametrize("how", ["agree", "all_gather", "exchange"])
def test_a_killed_rank_is_named_at_once(how: str) -> None:
    """T27 in one collective at a time; no launcher, so that the survivors have time to speak."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.dist.killed", how],
            cwd=ROOT,
            env=child_environment(
                {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        said = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [1, 1, -9]
    told = "\n".join(said[:2])
    assert re.search(rf"rank 2 \(process {ranks[2].pid} on .*\) ended, which is the cause", told)
    for line in said[:2]:
        assert "a peer was lost during" in line
        assert float(re.findall(r"told after ([0-9.]+)", line)[0]) < 10


def test_watch_sees_only_processes_of_this_host_that_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    mine, elsewhere = own_seat(), Seat("another host", 2**22 - 1)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    watch = Watch([mine, elsewhere, Seat(mine.host, child.pid)])
    assert watch.gone() == (2,)  # a zombie
    child.wait()
    assert watch.gone() == (2,)
    assert f"rank 2 (process {child.pid} on {mine.host}) ended" in watch.culprits()
    assert Watch([mine, elsewhere]).gone(patience_s=0) == ()
