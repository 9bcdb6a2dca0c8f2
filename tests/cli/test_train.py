"""The verb ``train`` as a person types it: ranks started here, failures with their cause, signals, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.train.cases import words
from tests.worlds import ROOT, Launch, child_environment, free_port
from trivium.cli.launching import Note, as_rank, read_notes
from trivium.cli.main import run
from trivium.cli.train import _tell

CONFIG = """
run = "{folder}/run"
[model]
dim = 32
layers = 2
heads = 2
ffn_dim = 48
[data]
paths = ["{folder}/text"]
vocabulary = 300
sequence = 32
validation = 0.2
[schedule]
warmup_steps = 2
[train]
steps = 6
micro_batch = 2
batch = 4
validate_every = 3
validation_batches = 2
log_every = 1
[checkpoint]
every = 4
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train with space")
    words(folder)
    path = folder / "run.toml"
    path.write_text(CONFIG.format(folder=folder))
    return path


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the verb; nothing of it outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, fault: str = "", flags: Sequence[str] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *flags, "-m", "trivium", "train", *arguments],
            cwd=ROOT,
            env=child_environment({"TRIVIUM_FAULT": fault}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; the limit is for what hangs: a collective itself waits for train.timeout_s."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def steps_of(folder: Path) -> list[int]:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [row["step"] for row in map(json.loads, lines) if row["kind"] == "step"]
    except (OSError, ValueError):
        return []


def until(come: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not come():
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.05)


def signalled(number: int, process: subprocess.Popen[str]) -> None:
    """Signal ``process`` while the rank that ``stop`` was armed for stands still, and let it go on to the end."""
    found: list[psutil.Process] = []

    def stands_still() -> bool:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        with contextlib.suppress(psutil.NoSuchProcess):
            found[:] = [one for one in family if one.status() == psutil.STATUS_STOPPED]
        return bool(found)

    def waits_for_it() -> bool:
        status = Path(f"/proc/{found[0].pid}/status")
        if not status.exists():  # not Linux
            time.sleep(2)
            return True
        (mask,) = re.findall(r"ShdPnd:\s*(\w+)", status.read_text())
        return bool(int(mask, 16) >> (number - 1) & 1)

    until(stands_still, process)
    process.send_signal(number)
    until(waits_for_it, process)
    while process.poll() is None:  # it stands still once for each micro-batch of the step
        with contextlib.suppress(psutil.NoSuchProcess):
            if found[0].status() == psutil.STATUS_STOPPED:
                found[0].resume()
        time.sleep(0.05)


def test_two_ranks_then_one_go_on_to_the_same_weights(config: Path, start: Start, tmp_path: Path) -> None:
    alone = start(str(config), "--run", str(tmp_path / "alone"), "--json", flags=["-O"])
    code, out, err = finish(alone)
    assert code == 0, err
    expected = json.loads(out)

    together = str(tmp_path / "together")
    process = start(str(config), "--run", together, "--ranks", "2", fault="train.data:0:3:stop")
    signalled(signal.SIGTERM, process)
    code, out, err = finish(process)
    assert (code, out) == (143, ""), err
    assert "stopped after step 4" in err and "Traceback" not in err and "torch/distributed" not in err

    code, out, err = finish(start(str(config), "--run", together, "--resume", "must", "--ranks", "2", "--json"))
    assert code == 0, err
    found = json.loads(out)
    assert found["sha256"] == expected["sha256"] is not None
    assert (found["validation"], found["steps"]) == (expected["validation"], 6)
    for name in ("parameters", "gradients", "optimizer", "buffers", "sent"):
        assert expected["planned"][name]["planned"] == expected["planned"][name]["measured"], name
    for name, row in (*expected["planned"].items(), *found["planned"].items()):
        assert row["agrees"], (name, row)
    whole = expected["planned"]["total"]
    assert whole["measured"] == pytest.approx(whole["planned"], rel=0.10)
    assert "Gloo" not in err and "OMP_NUM_THREADS" not in err and "USDT" not in err
    page = (Path(together) / "report.html").read_text()
    assert "http" not in page.replace("https://", "http") and "plan" in page
    assert steps_of(Path(together)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("point", ["train.forward:0", "train.backward:1", "train.optimizer:0", "train.data:1"])
def test_the_rank_that_raised_is_named_first(config: Path, start: Start, tmp_path: Path, point: str) -> None:
    """T26."""
    culprit = int(point.split(":")[1])
    code, out, err = finish(start(str(config), "--run", str(tmp_path / "run"), "--ranks", "2", fault=f"{point}:1:exc"))
    assert (code, out) == (1, "")
    raised = err.index(f"[rank {culprit}] error: RuntimeError: injected fault")
    consequence = err.index(f"[rank {1 - culprit}] a consequence")
    assert raised < err.index("Traceback") < consequence < err.index(f"the cause was rank {culprit}: RuntimeError")
    assert err.count("Traceback") == 1 and "ChildFailedError" not in err


def test_nothing_to_go_on_from_and_a_folder_that_is_none(config: Path, start: Start, tmp_path: Path) -> None:
    """T22 and T16 as one types them: before the first step, with their exit codes."""
    empty = tmp_path / "empty"
    code, out, err = finish(start(str(config), "--run", str(empty), "--ranks", "2", "--resume", "must"))
    assert (code, out) == (5, "") and "resume=must, but there is no complete checkpoint in" in err
    assert "Traceback" not in err and steps_of(empty) == []
    (tmp_path / "file").write_text("mine")
    code, out, err = finish(start(str(config), "--run", str(tmp_path / "file")))
    assert (code, out) == (2, "") and "is not a folder" in err and "Traceback" not in err
    assert (tmp_path / "file").read_text() == "mine"


def test_torchrun_and_slurm_start_the_same_run(config: Path, launch: Launch, tmp_path: Path) -> None:
    """The two ways that do not go through --ranks; whoever starts the ranks, one answer and the same weights."""
    arguments = ["-m", "trivium", "train", str(config), "--set", "train.steps=2", "--json", "--set"]
    launched = launch([*arguments, f"run={tmp_path / 'torchrun'}"], ranks=2)
    assert launched.wait(timeout=240) == 0, launched.stderr
    port, ranks = str(free_port()), []
    for rank in ("0", "1"):
        place = {"SLURM_STEP_ID": "0", "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "2"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, *arguments, f"run={tmp_path / 'slurm'}"],
                cwd=ROOT,
                env=child_environment({**place, "SLURM_JOB_NODELIST": "localhost", "MASTER_PORT": port}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [one.communicate(timeout=240) for one in ranks]
    finally:
        for one in ranks:
            one.kill()
            one.wait()
    assert [one.returncode for one in ranks] == [0, 0], said
    assert said[1][0] == ""
    answers = [json.loads(text) for text in (launched.stdout, said[0][0])]
    assert [(answer["ranks"], answer["steps"]) for answer in answers] == [(2, 2)] * 2
    assert answers[0]["sha256"] == answers[1]["sha256"] is not None


def test_a_killed_rank_is_named(config: Path, start: Start, tmp_path: Path) -> None:
    process = start(str(config), "--run", str(tmp_path / "run"), "--ranks", "2", fault="train.forward:1:2:kill9")
    code, out, err = finish(process)
    assert (code, out) == (1, "")
    assert "the cause was rank 1, which ended killed by signal 9" in err and "[rank 0] a consequence" in err
    assert "Traceback" not in err


def test_a_full_disk_stops_the_run_or_is_only_told(config: Path, start: Start, tmp_path: Path) -> None:
    full = {"fault": "checkpoint.shard:0:4:enospc"}
    code, _, err = finish(start(str(config), "--run", str(tmp_path / "stop"), **full))
    assert code == 4 and "No space left on device" in err and "Earlier checkpoints are intact" in err
    warn = ["--set", "checkpoint.on_save_error=warn"]
    code, out, err = finish(start(str(config), "--run", str(tmp_path / "warn"), "--json", *warn, **full))
    assert code == 0 and "step 4 was not saved, training goes on" in err
    assert json.loads(out)["checkpoint"].endswith("step-00000006")
    assert sorted(path.name for path in (tmp_path / "warn").glob("step-*")) == ["step-00000006"]


def test_ctrl_c_stops_after_the_step_and_a_second_one_at_once(config: Path, start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(str(config), "--run", str(folder), fault="train.data:0:2:stop")
    signalled(signal.SIGINT, process)
    code, _, err = finish(process)
    assert code == 130 and "Traceback" not in err and "stopped after step 3" in err, err
    assert (folder / "step-00000003" / "manifest.json").exists()

    process = start(str(config), "--run", str(folder), fault="train.data:0:4:delay=600000")
    until((folder / "step-00000004" / "manifest.json").exists, process)
    for _ in range(200):  # one within half a second of another is a launcher's copy, and several may be seen as one
        process.send_signal(signal.SIGINT)
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            continue
        break
    code, _, err = finish(process)  # long before the delay is over
    assert code == 130 and "Traceback" not in err
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000003", "step-00000004"]


def _words_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "zero.stge=3"], r"did you mean 'stage'"),
        (["--set", "zero_optimization.stage=3"], r"unknown key 'zero_optimization'"),
        (["--set", "train.steps=many"], r"train.steps.*expected an integer"),
        (["--ranks", "3"], r"train.batch=4 cannot be dealt out: micro_batch=2 × 3 ranks = 6 .*nearest: 6"),
        (["--ranks", "0"], r"greater than or equal to 1"),
        (["--set", "train.batch=3"], r"nearest: 2 or 4"),
        (["--resume", ""], r"resume is empty"),
        (["--stage", "3"], r"No such option"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(
    config: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", str(config), *arguments]) == 2
    words = " ".join(_words_of(capsys).split())
    assert re.search(told, words), words
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize("text", ["", "x = ", "[train]\nsteps = 1\nsteps = 2\n", "\x00\xff"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(text.encode("latin-1"))
    code = run(["train", str(path), "--run", str(tmp_path / "run"), "--ranks", "1000003"])
    assert code == 2 and "Traceback" not in _words_of(capsys)
    assert run(["train", str(tmp_path)]) == 2
    assert run(["train", str(tmp_path / "absent.toml")]) == 2


def test_a_row_that_differs_by_more_than_is_promised_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    usual = {"signal": 0, "steps": 1, "distilled": None, "loss": 1.0, "validation": None, "unigram": None}
    planned = {
        "states": {"planned": 1000, "measured": 1000, "agrees": True},
        "total": {"planned": 1000, "measured": 800, "agrees": False},
    }
    nothing = {"sha256": None, "scores": {}, "samples": [], "checkpoint": None, "report": None}
    _tell({**usual, **nothing, "planned": planned}, as_json=False)
    lines = {line.split()[0]: line.split()[-1] for line in _words_of(capsys).splitlines() if line}
    assert (lines["states"], lines["total"]) == ("exact", "differs")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--set", "--ranks", "--resume", "--run", "--json"):
        assert option in out
    assert "--launched" not in out and "--terminal" not in out


def test_notes_come_back_by_rank(tmp_path: Path) -> None:
    assert as_rank(tmp_path, lambda: (0, {"steps": 3})) == (0, {"steps": 3})
    (note,) = read_notes(tmp_path)
    assert isinstance(note, Note) and (note.rank, note.code, note.answer, note.consequence) == (
        0,
        0,
        {"steps": 3},
        False,
    )
    assert os.listdir(tmp_path) == ["rank-0.json"]
