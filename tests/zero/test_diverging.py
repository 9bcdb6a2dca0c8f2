"""Ranks that do different things: correct without a hang, or told at once; and ranks that die."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.clock import Since
from tests.worlds import ROOT, Worlds, child_environment, free_port
from tests.zero.diverging_cases import ROUTES

CASES = "tests.zero.diverging_cases"


@pytest.mark.parametrize(
    ("size", "counts"), [(2, [1, 1]), (2, [2, 1]), (4, [1, 2, 0, 2])], ids=["units", "fewer", "none"]
)
def test_other_units_other_order_fewer_micro_batches(world: Worlds, size: int, counts: list[int]) -> None:
    assert world(size).run(CASES, "routed", counts, ROUTES) == [[]] * size


def test_three_ranks_with_a_division_that_rounds(world: Worlds) -> None:
    assert world(3).run(CASES, "routed", [1, 1, 1], ROUTES[::-1], 1 << 20) == [[]] * 3


@pytest.mark.parametrize("what", ["step or read", "clip or step", "other modules"])
def test_phases_that_differ_are_told_on_every_rank(world: Worlds, what: str) -> None:
    for said, seconds in world(3).run(CASES, "phases_that_differ", what, discard=True):
        assert said.startswith("MismatchError")
        assert seconds < 5
        if what != "other modules":
            assert all(word in said for word in ("rank 0 in", "rank 2 in", "step"))


def test_gradients_that_were_never_reduced_are_refused(world: Worlds) -> None:
    for said in world(2).run(CASES, "left_over"):
        assert [message.startswith("ConfigError: rank 0 has gradients") for message in said] == [True, False] * 2
        assert said[1] == said[3] == "no error"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_on_one_rank_skips_the_step_on_all(world: Worlds, value: float) -> None:
    """T33."""
    for results in world(3).run(CASES, "poisoned", value):
        assert results == [(True, True, False, True, 1, True)] * 4


def test_detours_are_counted(world: Worlds) -> None:
    for before, after in world(2).run(CASES, "detours"):
        assert before == 0
        assert after > 0


def test_a_backward_that_broke_off_leaves_nothing(world: Worlds) -> None:
    assert world(2).run(CASES, "broken_backward") == [[], []]


@pytest.mark.parametrize("size", [1, 2])
def test_a_backward_that_broke_off_with_reductions_on_their_way_leaves_nothing(world: Worlds, size: int) -> None:
    assert world(size).run(CASES, "broken_after_a_step") == [[[]] * 4] * size


@pytest.mark.parametrize("stage", [1, 3])
def test_a_killed_rank_is_named_by_the_others(tmp_path: Path, stage: int) -> None:
    """T27: in the middle of gathers (stage 3) and of the exchange of gradients. No launcher ends the survivor here."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    out, err = tmp_path / "out", tmp_path / "err"
    command = [sys.executable, "-m", "tests.zero.endless", str(stage)]
    ranks: list[subprocess.Popen[bytes]] = []
    with out.open("wb") as told, err.open("wb") as said:
        try:
            for rank in ("0", "1"):
                place = child_environment({**world, "RANK": rank, "LOCAL_RANK": rank})
                streams = {"stdout": told, "stderr": said} if rank == "0" else {"stdout": subprocess.DEVNULL}
                ranks.append(subprocess.Popen(command, cwd=ROOT, env=place, **streams))
            deadline = time.monotonic() + 240
            while b"step 3" not in out.read_bytes():
                assert time.monotonic() < deadline and ranks[0].poll() is None, err.read_text()
                time.sleep(0.05)
            ranks[1].kill()
            since = Since()
            assert ranks[0].wait(timeout=240) != 0
            assert since.seconds() < 10
        finally:
            for one in ranks:
                one.kill()
                one.wait()
    last = [line for line in err.read_text().splitlines() if "RankError" in line]
    assert last and "rank 1" in last[-1], err.read_text()
