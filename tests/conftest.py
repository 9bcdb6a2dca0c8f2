"""What every test has: worlds of real ranks, and property tests without a clock."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.worlds import Launch, Worlds, launcher

settings.register_profile("trivium", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("trivium")


def pytest_configure() -> None:
    """Let Ctrl-C reach what the tests start, also where a shell's ``&`` or nohup made this process ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def world() -> Iterator[Worlds]:
    """``world(2).run("tests.room.cases", "function", argument)``: see tests/worlds.py."""
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """``launch(["-m", "trivium", "train", "x.toml"], ranks=2, env={...})``: fresh ranks under torchrun."""
    yield from launcher(tmp_path)
