"""Ctrl-C waits for the block, whoever would have swallowed it, and is not forgotten."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import trivium
from trivium.cli.interrupts import ended, handed_on, interrupts_held


def test_an_interrupt_waits_and_then_comes_though_the_block_swallows_what_it_can() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held(), contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGINT)
        done.append("went on")
    assert done == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_outweighs_what_the_block_raises() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        signal.raise_signal(signal.SIGINT)
        raise ValueError


def test_without_an_interrupt_nothing_changes() -> None:
    with pytest.raises(ValueError, match="mine"), interrupts_held():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_who_ignores_interrupts_or_handles_them_is_asked_nothing_else(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with interrupts_held(), interrupts_held():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_within_another_waits_for_the_outer() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
        done.append("went on")
    assert done == ["went on"]


PROBE = """
import os, signal, sys
class Probe:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            held = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            os._exit(100 + held)
sys.meta_path.insert(0, Probe())
from trivium.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "x.toml"], ["distill", "x.toml"], ["demo"], ["doctor"], ["plan", "--preset", "7.5b"],
        ["plan", "--serve", "."], ["generate", ".", "--prompt", "x"], ["chat", "."], ["serve", "."],
        ["convert", ".", "out"], ["bench", "zero"], ["bench", "moe"], ["bench", "inference"], ["bench", "serve", "."],
        ["bench", "quality"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_verb_loads_torch_with_interrupts_held(tmp_path: Path, arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(trivium.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], cwd=tmp_path, env=environment, capture_output=True, timeout=240
    )
    assert done.returncode == 101, done.stderr.decode()


def test_on_another_thread_the_block_just_runs() -> None:
    ran: list[bool] = []

    def work() -> None:
        with interrupts_held():
            ran.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [True]


@pytest.mark.parametrize("pipe", [subprocess.PIPE, None], ids=["read", "shown"])
def test_a_signal_that_does_not_break_the_wait_off_is_handed_on_all_the_same(pipe: int | None) -> None:
    """Taken by another thread it leaves the main thread's wait alone, as one does that comes just before the wait."""
    heeded: list[int] = []
    with handed_on(signal.SIGINT) as hand:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=pipe, text=True)

        def send(number: int) -> None:
            heeded.append(number)
            process.kill()

        def take() -> None:
            time.sleep(0.3)  # the main thread waits by now
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)

        thread = threading.Thread(target=take)
        try:
            hand.to(send)
            thread.start()
            assert ended(process) == ("" if pipe else None, None)
        finally:
            process.kill()
            process.communicate()
            thread.join()
    assert heeded == [signal.SIGINT] and process.returncode == -signal.SIGKILL
