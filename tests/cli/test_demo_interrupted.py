"""Row C13 for the demo: Ctrl-C lets the run under way stop in its own way, and ends all that would follow."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.worlds import ROOT, child_environment
from trivium.cli import demo, demo_runs, demo_same, launching
from trivium.cli.main import run

CHILD = """
import signal, sys, time
def stop(number, frame):
    time.sleep(1)  # a step's end and a save; longer than subprocess.run waits before it kills
    open(sys.argv[1], "w").write("saved")
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print("ready", file=sys.stderr, flush=True)
open(sys.argv[1] + ".ready", "w").close()
while True:  # short sleeps: one that begins just as the signal comes is not broken off by it
    time.sleep(0.1)
"""
PARENT = """
import os, signal, subprocess, sys, time
from trivium.cli import demo, main
pipe = subprocess.PIPE if sys.argv[3] == "read" else None
if sys.argv[3] == "starting":
    class Popen(subprocess.Popen):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            while not os.path.exists(sys.argv[2] + ".ready"):
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
    subprocess.Popen = Popen
main._invoke = lambda arguments: demo._call([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=pipe).returncode
main.main()
"""


@pytest.mark.parametrize("how", ["read", "shown", "starting"])
def test_the_run_under_way_is_not_killed_but_waited_for(tmp_path: Path, how: str) -> None:
    """The signal reaches the demo alone, as from ``kill``; a terminal would send it to both.

    ``starting``: it comes while the run is being started, before the demo can know the run's process.
    """
    saved = tmp_path / "saved"
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, str(saved), how],
        cwd=ROOT, env=child_environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None and process.stderr.readline() == "ready\n"
        if how != "starting":
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
        assert process.stderr.read() == "" and saved.read_text() == "saved"
    finally:
        process.kill()
        process.communicate()


def test_a_stage_that_was_stopped_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, begun = tmp_path / "same.json", []

    def train(*given: Any, **more: Any) -> Any:
        begun.append(given)
        return SimpleNamespace(signal=signal.SIGINT if len(begun) == 2 else 0, digest="x", rows=())

    config.write_text(json.dumps(dict(demo_runs.same(tmp_path))))
    monkeypatch.setattr(demo_same, "train", train)
    rows = tmp_path / "same.jsonl"
    assert demo_same.run(config, rows, SimpleNamespace(rank=0)) == signal.SIGINT  # type: ignore[arg-type]
    assert len(begun) == 2 and len(rows.read_text().splitlines()) == 1


@pytest.mark.parametrize("part", ["2", "4"])
def test_the_demo_ends_with_130(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the ranks of part 2 say so or a verb that it calls."""
    monkeypatch.setattr(launching, "launch", lambda *_: (130, None))
    monkeypatch.setattr(
        demo.subprocess,
        "Popen",
        lambda *_, **__: _Ended(),  # type: ignore[attr-defined]
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert run(["demo", "--part", part, "--folder", str(tmp_path / "demo")]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == ""


class _Ended:
    """A verb that was interrupted."""

    returncode = 130

    def __enter__(self) -> _Ended:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def communicate(self, timeout: float) -> tuple[str, str]:
        return "", ""

    def send_signal(self, number: int) -> None:
        raise AssertionError(f"signal {number}")
