"""Collectives give what they promise, and the ledger counts what a ring-optimal algorithm sends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

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
        assert found["inner"] == {"agree": (size - 1) * 8 * 16 * 2}
        assert found["payload"] == found["all"] - found["bytes"]["agree"]
        assert found["after"] == 2


def test_a_shard_may_lie_in_its_output(world: Worlds) -> None:
    assert world(3).run("tests.dist.cases", "shard_in_place") == [[1.0, 1.0, 2.0, 2.0, 3.0, 3.0]] * 3


def test_what_differs_is_named(world: Worlds) -> None:
    said = world(3).run("tests.dist.cases", "differ")
    assert said == ["the letter differs across ranks: rank 0 has 'b', rank 1 has 'a'"] * 3


def test_agreements_of_any_length_and_of_different_things(world: Worlds) -> None:
    """T31, below the models: other subjects and other lengths meet in one frame, and the world lives on."""
    for found, calls, said in world(3).run("tests.dist.cases", "agreements"):
        assert found == [
            [[rank - 2**62 + place for place in range(length)] for rank in range(3)] for length in (0, 14, 15, 40)
        ]
        assert calls == [1, 1, 2, 2]
        assert len(said) == 3
        for words, (mine, others) in zip(
            said, [("3 tea", "3 coffee"), ("40 cups", "3 cups"), ("15 cups", "14 cups")], strict=True
        ):
            assert f"rank 0 for {others}, ümläut and more" in words
            assert f"rank 1 for {others}, ümläut and more" in words
            assert f"rank 2 for {mine}, ümläut and more" in words
    assert world(3).run("tests.dist.cases", "shard_in_place")[0] == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


def test_other_collectives_that_meet_are_named(world: Worlds) -> None:
    """T31 for what is not asked by a model: which rank came for what, on every rank, and the world lives on."""
    met = [
        ("barrier of 0 numbers", "all_reduce_ints (sum) of 1 numbers"),
        ("all_reduce_ints (sum) of 1 numbers", "all_reduce_ints (max) of 1 numbers"),
        ("agreement of 2 numbers", "agreement of 1 numbers"),
        ("all_gather_json of 1 numbers", "gather_tensor of 1 numbers"),
    ]
    for said in world(3).run("tests.dist.cases", "come_for_different_things"):
        assert len(said) == len(met)
        for words, (others, last) in zip(said, met, strict=True):
            assert f"rank 0 for {others} on dp, rank 1 for {others} on dp, rank 2 for {last} on dp" in words
    assert world(3).run("tests.dist.cases", "shard_in_place")[0] == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


def killed(how: str, folder: Path) -> tuple[list[subprocess.Popen[str]], list[str]]:
    """Three ranks of tests/dist/killed.py and what the first two said; no launcher, so that they have time to speak."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.dist.killed", how, str(folder)],
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
        return ranks, [rank.communicate(timeout=240)[0] for rank in ranks[:2]]
    finally:
        for rank in ranks:
            if how == "stop" or rank is not ranks[2]:
                rank.kill()
            rank.communicate(timeout=240)


@pytest.mark.parametrize("how", ["agree", "all_gather", "exchange"])
def test_a_killed_rank_is_named_at_once(how: str, tmp_path: Path) -> None:
    """T27 in one collective at a time."""
    ranks, said = killed(how, tmp_path)
    assert [rank.returncode for rank in ranks] == [1, 1, -9]
    told = "\n".join(said)
    assert re.search(rf"rank 2 \(process {ranks[2].pid} on .*\) ended, which is the cause", told)
    for line in said:
        assert "a peer was lost during" in line
        assert float(re.findall(r"told after ([0-9.]+)", line)[0]) < 10


def test_a_stopped_rank_is_named_after_the_timeout(tmp_path: Path) -> None:
    """T28: SIGSTOP, on a channel of an axis, whose groups must have the timeout too (8 s here)."""
    ranks, said = killed("stop", tmp_path)
    told = "\n".join(said)
    assert re.search(rf"rank 2 \(process {ranks[2].pid} on .*\) has been stopped", told)
    after = re.findall(r"told after ([0-9.]+) s \(([0-9.]+) s on the wall\)", told)
    assert len(after) == 2
    assert min(float(wall_s) for _, wall_s in after) >= 7.5
    assert max(float(seconds) for seconds, _ in after) < 8 + 5


def test_watch_sees_only_processes_of_this_host_that_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    mine = own_seat()
    elsewhere = [Seat("another host", 2**22 - 1, "another boot"), Seat(mine.host, 2**22 - 1, f"{mine.space[:-2]}]")]
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    watch = Watch([mine, *elsewhere, Seat(mine.host, child.pid, mine.space)])
    assert watch.gone() == (3,)  # a zombie
    child.wait()
    assert watch.gone() == (3,)
    assert f"rank 3 (process {child.pid} on {mine.host}) ended" in watch.culprits()
    assert Watch([mine, *elsewhere]).gone(patience_s=0) == ()


def test_watch_sees_a_stopped_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        watch = Watch([own_seat(), Seat("here", child.pid, own_seat().space)])
        assert watch.stopped() == ()
        child.send_signal(signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        assert watch.stopped() == (1,)
        assert f"rank 1 (process {child.pid} on here) has been stopped" in watch.culprits()
    finally:
        child.kill()
        child.wait()
