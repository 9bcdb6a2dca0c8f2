from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from trivium.base import fault
from trivium.base.errors import ConfigError


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch):
    def set_to(text: str) -> None:
        monkeypatch.setenv(fault.VARIABLE, text)
        fault.faults.cache_clear()

    yield set_to
    monkeypatch.undo()
    fault.faults.cache_clear()


def test_nothing_happens_unset(arm) -> None:
    arm("")
    assert fault.reach("checkpoint.shard", rank=0, step=3) is None


def test_only_the_named_point_rank_and_step(arm) -> None:
    arm("checkpoint.shard:1:3:exc,other:*:*:flip")
    assert fault.reach("checkpoint.shard", rank=0, step=3) is None
    assert fault.reach("checkpoint.shard", rank=1, step=4) is None
    assert fault.reach("checkpoint.manifest", rank=1, step=3) is None
    assert fault.reach("other", rank=7) == "flip"
    with pytest.raises(RuntimeError, match=r"checkpoint\.shard, rank 1, step 3"):
        fault.reach("checkpoint.shard", rank=1, step=3)


@pytest.mark.parametrize(("action", "code"), [("eio", errno.EIO), ("enospc", errno.ENOSPC)])
def test_disk_errors(arm, action: str, code: int) -> None:
    arm(f"disk:*:*:{action}")
    with pytest.raises(OSError, match="injected") as caught:
        fault.reach("disk")
    assert caught.value.errno == code


def test_delay(arm) -> None:
    arm("comm:*:*:delay=30")
    begin = time.perf_counter()
    assert fault.reach("comm") is None
    assert time.perf_counter() - begin >= 0.03


def test_the_environment_is_read_once(arm, monkeypatch: pytest.MonkeyPatch) -> None:
    arm("a:*:*:short")
    assert fault.reach("a") == "short"
    monkeypatch.setenv(fault.VARIABLE, "")
    assert fault.reach("a") == "short"


def test_kill9_kills() -> None:
    program = "from trivium.base import fault; fault.reach('x', rank=0, step=1); print('alive')"
    environment = {**os.environ, fault.VARIABLE: "x:0:1:kill9"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x", "expected point:rank:step:action"),
        ("x:0:1:explode", "unknown action 'explode'"),
        ("x:0:1:delay", "milliseconds"),
        ("x:0:1:exc=5", "milliseconds"),
        ("x:zero:1:exc", "neither a number"),
    ],
)
def test_a_bad_variable_is_named(arm, text: str, reason: str) -> None:
    arm(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        fault.reach("x")
    assert "TRIVIUM_FAULT" in str(caught.value)
