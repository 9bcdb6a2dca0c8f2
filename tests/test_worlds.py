from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests import cases
from tests.worlds import ROOT, Launch, Nursery, World, WorldFailure, Worlds, child_environment


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_size_joins_and_stays(world: Worlds, size: int) -> None:
    first = world(size).run("tests.cases", "who")
    assert [(rank, count, threads) for rank, count, threads, _ in first] == [(rank, size, 1) for rank in range(size)]
    assert world(size).run(cases.who) == first
    assert world(size).run(cases.total, 3, scale=2) == [[6 * sum(range(1, size + 1))]] * size


def test_results_may_be_tensors_and_each_case_starts_at_seed_0(world: Worlds) -> None:
    drawn = [world(2).run(cases.draw) for _ in range(2)]
    assert all(torch.equal(tensor, drawn[0][0]) for results in drawn for tensor in results)


def test_the_culprit_comes_first_and_the_world_is_replaced(world: Worlds) -> None:
    before = world(2).pids
    with pytest.raises(WorldFailure) as caught:
        world(2).run(cases.fail_on, 1)
    text = str(caught.value)
    assert text.index("rank 1: first (raised)") < text.index("KeyError: 'deliberate on 1'")
    assert "words before the fault of rank 0" in text
    assert not any(map(psutil.pid_exists, before))
    assert [result[0] for result in world(2).run(cases.who)] == [0, 1]


def test_a_dead_rank_and_a_slow_rank_are_told(world: Worlds) -> None:
    with pytest.raises(WorldFailure, match="rank 0: first \\(died\\)\nthe process ended, exit code 7"):
        world(2).run(cases.die_on, 0)
    world(2).run(cases.who)
    with pytest.raises(WorldFailure, match=r"ranks 1: no answer within 10 s(.|\n)*in sleep_on"):
        world(2).run(cases.sleep_on, 1, timeout=10)


def test_an_interrupted_or_discarded_world_is_not_used_again(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    first = world(1).pids
    with monkeypatch.context() as patch:
        patch.setattr("tests.worlds.wait", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            world(1).run(cases.who)
    second = world(1).pids
    assert first != second
    assert world(1).run(cases.who, discard=True)[0][3] == second[0]
    assert world(1).pids != second


def test_warnings_are_errors_and_skips_are_skips(world: Worlds) -> None:
    with pytest.raises(pytest.skip.Exception, match="not on this machine"):
        world(1).run(cases.skip)
    with pytest.raises(WorldFailure, match="UserWarning: a warning"):
        world(1).run(cases.warn)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_no_orphans_when_the_test_process_is_killed(tmp_path: Path) -> None:
    program = "import time, tests.worlds; w = tests.worlds.Worlds(); print(*w(1).pids, flush=True); time.sleep(3600)"
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(60)


def test_launch_under_torchrun_and_kill_one(launch: Launch, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text("import time, os\nprint('rank', os.environ['RANK'], flush=True)\ntime.sleep(3600)\n")
    launched = launch([str(script)], ranks=2)
    pids = launched.rank_pids()
    assert len(set(pids)) == 2
    os.kill(pids[1], signal.SIGKILL)
    assert launched.wait() != 0
    assert "Signal 9" in launched.stderr or "SIGKILL" in launched.stderr
    assert not any(map(psutil.pid_exists, pids))


def test_ctrl_c_reaches_what_the_tests_start() -> None:
    """Also where the tests run behind a shell's ``&`` or nohup: tests/conftest.py."""
    program = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux only")
def test_ranks_of_a_nursery_that_died_cost_no_later_ones() -> None:
    nursery = Nursery()
    try:
        lost = World(1, nursery)
        assert nursery._process is not None
        nursery._process.kill()
        nursery._process.wait()
        later = World(1, nursery)
        assert not lost.alive
        assert len(later.run(cases.who)) == 1
        lost.close()
        later.close()
    finally:
        nursery.close()
