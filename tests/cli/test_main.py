"""Rows C9, C13 and C16 of the fault matrix for the frame of the command line; the verbs test their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import typer

from tests.worlds import ROOT, child_environment
from trivium import __version__
from trivium.base.errors import CapacityError, CheckpointError, ConfigError, DataError, SetupError
from trivium.cli import main as frame

WITH_SOURCE = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); from trivium.cli import main; "


def trivium(*arguments: str, flags: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", f"{WITH_SOURCE} main.main()", *arguments]
    extra = {"PYTHONWARNINGS": "", **environment}
    return subprocess.run(command, env=child_environment(extra), capture_output=True, text=True, timeout=240, cwd=ROOT)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch):
    """Put a function in the place of the verb ``probe``."""

    def put(function) -> None:
        module = ModuleType("trivium_probe")
        module.__spec__ = ModuleSpec("trivium_probe", None)
        module.register = lambda app: app.command("probe")(function)
        monkeypatch.setitem(sys.modules, "trivium_probe", module)
        monkeypatch.setattr(frame, "VERBS", (("probe", "trivium_probe", "A probe."), ("other", "json", "Another.")))

    return put


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("no text"), 1),
        (ConfigError("zero.stage = 4"), 2),
        (SetupError("port taken"), 3),
        (CapacityError("too big"), 4),
        (CheckpointError("altered"), 5),
    ],
)
def test_errors_become_exit_codes(verb, capsys: pytest.CaptureFixture[str], error: Exception, code: int) -> None:
    def probe() -> None:
        raise error

    verb(probe)
    assert frame.run(["probe"]) == code
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\n"
    assert captured.out == ""


def test_exit_interrupt_and_disk_errors(verb, capsys: pytest.CaptureFixture[str]) -> None:
    def probe(how: str) -> None:
        if how == "exit":
            raise typer.Exit(7)
        if how == "disk":
            Path("/no/such/folder/file").write_text("x")
        raise KeyboardInterrupt

    verb(probe)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert frame.run(["probe", "exit"]) == 7
        assert frame.run(["probe", "disk"]) == 1
        assert frame.run(["probe", "interrupt"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == "error: No such file or directory: /no/such/folder/file\n"


def test_a_missing_package_is_named(verb, capsys: pytest.CaptureFixture[str]) -> None:
    def probe(module: str) -> None:
        frame.importlib.import_module(module)

    verb(probe)
    assert frame.run(["probe", "surely_not_there.part"]) == 3
    assert "the package 'surely_not_there' is not installed; trivium doctor" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        frame.run(["probe", "trivium.not_a_room"])


def test_a_defect_keeps_its_traceback(verb) -> None:
    def probe() -> None:
        raise ZeroDivisionError

    verb(probe)
    with pytest.raises(ZeroDivisionError):
        frame.run(["probe"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prob"], "No such command 'prob'"),
        (["probe", "--cuont", "3"], "--cuont"),
        (["probe", "--count", "three"], "valid integer"),
        (["probe", "--count"], "requires an argument"),
        (["probe", "extra"], "extra"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(verb, capsys, arguments: list[str], words: str) -> None:
    def probe(count: int = 1) -> None:
        print(count)

    verb(probe)
    assert frame.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert "--help" in captured.err
    assert captured.err.count("\n") == 1


def test_help_lists_every_verb_that_is_there() -> None:
    shown = trivium("--help")
    assert shown.returncode == 0
    assert shown.stderr == ""
    for name, module, _ in frame.VERBS:
        there = (ROOT / "src" / Path(*module.split("."))).with_suffix(".py").exists()
        assert bool(re.search(rf"^\W*{name} ", shown.stdout, re.MULTILINE)) == there, name


def test_version_and_help_do_not_load_torch() -> None:
    program = f"{WITH_SOURCE} code = main.run(sys.argv[1:]); sys.exit(code + 50 * ('torch' in sys.modules))"
    for option in ("--version", "--help"):
        done = subprocess.run([sys.executable, "-c", program, option], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    assert trivium("--version").stdout == f"trivium {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "trivium", "--version"], env=child_environment(), capture_output=True)
    assert done.stdout.decode() == f"trivium {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"]])
def test_c9_width_40_and_no_colour(arguments: list[str]) -> None:
    shown = trivium(*arguments, COLUMNS="40", NO_COLOR="1", TERM="xterm-256color")
    assert shown.returncode == 0
    assert "\x1b" not in shown.stdout
    assert max(map(len, shown.stdout.split("\n"))) <= 40


def test_c9_letters_the_terminal_lacks(verb) -> None:
    program = f"{WITH_SOURCE} main._never_fail_on_a_letter(); print('2Ψ'); main._fail('3Ψ', 1)"
    environment = child_environment({"PYTHONIOENCODING": "ascii:strict"})
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2?\n", "error: 3?\n")


@pytest.mark.parametrize("arguments", [["doctor", "--json"], ["--help"]])
def test_c9_the_reader_goes_away(arguments: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", f"{WITH_SOURCE} main.main()", *arguments]
    try:
        done = subprocess.run(command, env=child_environment(), stdout=write_end, stderr=subprocess.PIPE, timeout=240)
    finally:
        os.close(write_end)
    assert done.stderr == b""
    assert done.returncode in (0, 141)


@pytest.mark.parametrize("delay_s", [0.1, 0.5, 1.2])
def test_c13_ctrl_c_leaves_no_trace(delay_s: float) -> None:
    again = "code = 0\nwhile code != 130: code = main.run(['doctor'])\nsys.exit(code)"
    program = f"{WITH_SOURCE} print('up', flush=True)\n{again}"
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay_s)
    deadline = time.monotonic() + 240
    try:
        while process.poll() is None and time.monotonic() < deadline:  # an import may swallow one
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        _, words = process.communicate(timeout=1)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, words.decode()
    assert b"Traceback" not in words


@pytest.mark.parametrize("flags", [("-O",), ("-W", "error"), ("-I",)])
def test_c16_python_flags_change_nothing(flags: tuple[str, ...]) -> None:
    done = trivium("doctor", "--json", flags=flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")
    assert done.stderr == ""
    assert trivium("nothing", flags=flags).returncode == 2


@pytest.mark.parametrize("arguments", [["doctor"], ["generate", "model", "--prompt", "x"], ["train", "../x.toml"], []])
def test_c14_a_deleted_folder_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert frame.run(arguments) == 3
    assert capsys.readouterr().err == "error: the working folder has been deleted: cd to one that exists\n"
    assert frame.run(["--version"]) == 0
