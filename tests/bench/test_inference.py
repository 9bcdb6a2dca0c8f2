"""The inference bench: a whole run at the smallest size, its arithmetic, and what it refuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trivium.base.errors import ConfigError, SetupError
from trivium.bench import inference_process
from trivium.bench.inference import ON_CUDA, InferenceBench, copy_limit, read_limit, run, summary, undisturbed
from trivium.bench.inference_process import ContestantDied, Worker
from trivium.bench.inference_table import lines, table, targets
from trivium.bench.resident import Peak, resident
from trivium.cli.output import data_console


def test_a_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    names = ("trivium int8", "transformers float32")
    bench = InferenceBench(
        shape="tiny", rounds=2, steps=2, threads=1, batches=(1, 3), context=9, prefill=20, contestants=names
    )
    kept: list[dict[str, Any]] = []
    report = run(bench, "the command", said.append, kept.append)
    assert [len(one["rounds"]) for one in kept] == [2, 2]  # the same list, told of after every round
    assert set(report["summary"]) == set(names)
    for entries in report["summary"].values():
        assert set(entries) == {"decode 1", "decode 3", "prefill 20"}
        assert all(entry["seconds"] > 0 for entry in entries.values())
    # 2 layers of q, o 64², k, v 32·64, MLP 3·160·64, and the head 256·64: int8 pads 160 rows to 192.
    floats = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64) + 256 * 64
    norms = 5 * 64
    assert report["step_bytes"]["transformers float32"] == 4 * (floats + norms)
    assert floats < report["step_bytes"]["trivium int8"] < 1.5 * floats
    assert report["kernels"]["transformers float32"] == "torch cpu"
    assert report["kernels"]["trivium int8"].startswith(("native", "torch cpu"))
    assert report["read_limit_gb_per_s"] > 0
    data_console().print(table(report))
    assert "transformers float32" in capsys.readouterr().out


def report_of(ours: float, theirs: float) -> dict[str, Any]:
    rounds = [
        {
            "read_limit_gb_per_s": 10.0,
            "seconds": {"trivium int8": {"decode 1": ours}, "llama.cpp Q8_0": {"decode 1": theirs}},
        }
    ]
    return {
        "shape": {"name": "0.5b"},
        "rounds": rounds,
        "summary": summary(rounds, {"trivium int8": 10**9, "llama.cpp Q8_0": 10**9}),
    }


def test_targets_tell_ratios_and_shares() -> None:
    met = report_of(0.11, 0.2)
    assert met["summary"]["trivium int8"]["decode 1"]["share_of_read_limit"] == pytest.approx(0.909, abs=1e-3)
    assert met["summary"]["trivium int8"]["decode 1"]["tokens_per_s"] == pytest.approx(9.09, abs=1e-2)
    assert targets(met) == [
        "trivium int8, decode 1: 1.82 × llama.cpp Q8_0 (aim 1.3): met",
        "trivium int8: 91% of the read limit (aim 80%): met",
    ]
    assert all(line.endswith("missed") for line in targets(report_of(0.2, 0.21)))


def test_targets_count_calm_rounds_of_those_where_both_took_part() -> None:
    def told(stolen: float, **seconds: float) -> dict[str, Any]:
        names = {"ours": "trivium int8", "theirs": "llama.cpp Q8_0"}
        return {
            "read_limit_gb_per_s": 10.0,
            "seconds": {names[who]: {"decode 1": taken} for who, taken in seconds.items()},
            "stolen": {"read limit": 0.0, **{names[who]: {"decode 1": stolen} for who in seconds}},
        }

    def aims(*rounds: dict[str, Any]) -> list[str]:
        return targets({"shape": {"name": "0.5b"}, "rounds": list(rounds), "summary": {}})

    (line,) = aims(told(0.3, ours=0.1, theirs=0.2), told(0.0, theirs=0.2))
    assert line == "trivium int8, decode 1: 2.00 × llama.cpp Q8_0 (aim 1.3): met"
    (line,) = aims(told(0.3, ours=0.1, theirs=0.2), told(0.0, theirs=0.2), told(0.0, ours=0.2, theirs=0.2))
    assert "1.00 ×" in line
    assert aims(told(0.0, theirs=0.2), told(0.0, ours=0.2)) == []
    assert undisturbed([told(0.0)], "decode 1", []) == [told(0.0)]


def test_nothing_is_taken_again_beyond_the_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trivium.bench.stolen.Watched.share", lambda self: 0.5)
    limits: list[int] = []
    said: list[str] = []
    report = dying(monkeypatch, tmp_path, 22, ("llama.cpp Q8_0",), said.append, 0.0, lambda n: limits.append(n) or 10.0)
    assert limits == [2] and report["rounds"][0]["stolen"]["read limit"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "7b"}, "expected one of 0.5b, 1.1b"),
        ({"contestants": ("vllm",)}, "--contestants vllm"),
        ({"rounds": 0}, "at least 1"),
        ({"device": "tpu"}, "--device tpu: expected cpu or cuda"),
        ({"device": "cuda"}, "--contestants llama.cpp BF16: runs on the CPU here, not on cuda"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InferenceBench(**arguments)


def test_a_contestant_that_cannot_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContestantDied, match=r"trivium int8: its process ended with code 1 while loading.*nowhere"):
        Worker("trivium int8", tmp_path / "nowhere", 1)


DYING = """
import os, signal, sys
from trivium.bench.inference_worker import serve

class Dying:
    step_bytes = 1000
    kernels = "none"

    def __init__(self, folder, form, threads, way):
        if form == "BF16":
            raise ImportError(name="some_library")
        self.way = way

    def decode(self, batch, context, steps):
        return [0.5] * steps

    def prefill(self, tokens):
        if self.way != "plain":
            print("the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if tokens == 21:
            sys.exit(3)
        return 2.0

serve(Dying)
"""


def dying(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    prefill: int,
    names: tuple[str, ...] = ("llama.cpp BF16", "llama.cpp Q8_0"),
    say: Callable[[str], None] = lambda words: None,
    budget_s: float = 300.0,
    read_limit: Callable[[int], float] = lambda threads: 10.0,
) -> dict[str, Any]:
    (tmp_path / "dying_contestant.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setitem(inference_process.MODULES, "llama.cpp", "dying_contestant")
    monkeypatch.setattr("trivium.bench.inference.write_folder", lambda shape, folder: 1000)
    monkeypatch.setattr("trivium.bench.inference.read_limit", read_limit)
    bench = InferenceBench(shape="tiny", rounds=2, batches=(1,), prefill=prefill, contestants=names, budget_s=budget_s)
    return run(bench, "the command", say)


ON_A_GPU = """
from trivium.bench.inference_worker import serve

class There:
    def __init__(self, folder, form, threads, way):
        self.step_bytes = 10**9 if way == "cuda" else 1
        self.kernels = "torch cuda, decode steps not captured: int8 matrices"

    def decode(self, batch, context, steps):
        return [0.002] * steps

    def prefill(self, tokens):
        return 2.0

serve(There)
"""


def test_on_cuda_shares_are_of_its_copies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole run with everything replaced that needs a GPU."""
    (tmp_path / "contestant_there.py").write_text(ON_A_GPU)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setitem(inference_process.MODULES, "trivium", "contestant_there")
    monkeypatch.setattr("trivium.bench.inference.write_folder", lambda shape, folder: 1000)
    monkeypatch.setattr("trivium.bench.inference.copy_limit", lambda: 1000.0)
    monkeypatch.setattr("trivium.bench.inference.describe", lambda device: {"gpu": f"the {device} card"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    bench = InferenceBench(shape="tiny", rounds=1, contestants=("trivium bfloat16",), device="cuda")
    said: list[str] = []
    report = run(bench, "the command", said.append)
    assert report["step_bytes"] == {"trivium bfloat16": 10**9}
    told = "torch cuda, decode steps not captured: int8 matrices"  # what it says, not what its device could do
    assert report["kernels"] == {"trivium bfloat16": told} and report["machine"]["kernels"] == "kernels: torch"
    assert any(words.startswith("trivium bfloat16: loaded in") and words.endswith(told) for words in said)
    assert "round 1 of 1: copy bandwidth 1000.0 GB/s" in said
    assert lines(report) == ["trivium bfloat16: 50% of the copy bandwidth"]
    data_console().print(table(report))
    shown = capsys.readouterr().out
    assert "tiny, the cuda card, tokens/s" in shown and "of 1000.0 GB/s" in shown


def test_copies_are_counted_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 9.0, 0.0, 2.0, 0.0, 0.5, *[0.0, 4.0] * 3])  # the first one, which warms up, does not count
    monkeypatch.setattr("trivium.bench.inference.time.perf_counter", lambda: next(ticks))
    assert copy_limit(10**6, device="cpu") == pytest.approx(2 * 10**6 / 0.5 / 1e9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_that_is_not_there_is_an_error() -> None:
    with pytest.raises(SetupError, match="sees no CUDA GPU"):
        run(InferenceBench(shape="tiny", contestants=("trivium bfloat16",), device="cuda"), "", print)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_a_whole_run_on_cuda() -> None:
    bench = InferenceBench(shape="tiny", rounds=1, steps=2, contestants=ON_CUDA, device="cuda", budget_s=0.0)
    report = run(bench, "the command", print)
    assert report["absent"] == {} and set(report["summary"]) == set(ON_CUDA)
    assert all(entries["decode 1"]["share_of_read_limit"] > 0 for entries in report["summary"].values())


def test_who_dies_by_a_signal_runs_the_second_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = dying(monkeypatch, tmp_path, 20)
    assert report["rounds"][0]["seconds"] == {"llama.cpp Q8_0": {"decode 1": 0.5, "prefill 20": 2.0}}
    assert report["rounds"][1]["seconds"] == report["rounds"][0]["seconds"]
    assert lines(report) == [
        "no figures, or not all: llama.cpp BF16: not installed (some_library): pip install 'trivium[bench]'",
        "llama.cpp Q8_0: its process was ended by SIGSEGV while prefill 20; it last said: the last words; "
        "it runs without what died there (plain)",
    ]


def test_who_dies_again_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = dying(monkeypatch, tmp_path, 21)
    assert [r["seconds"] for r in report["rounds"]] == [{"llama.cpp Q8_0": {"decode 1": 0.5}}, {}]
    assert "ended with code 3 while prefill 21" in report["absent"]["llama.cpp Q8_0"]
    assert report["summary"]["llama.cpp Q8_0"]["decode 1"]["tokens_per_s"] == 2.0


def test_those_that_memory_cannot_hold_together_come_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trivium.bench.inference.psutil.virtual_memory", lambda: SimpleNamespace(available=0, total=1))
    said: list[str] = []
    report = dying(monkeypatch, tmp_path, 20, ("llama.cpp Q8_0", "llama.cpp Q4_0"), said.append)
    assert all(len(r["seconds"]) == 2 for r in report["rounds"])
    # Each once to die and once for its second way, then anew in the second round.
    assert sum("loaded in" in words for words in said) == 6


def test_no_round_begins_beyond_the_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    assert len(dying(monkeypatch, tmp_path, 20, say=said.append, budget_s=0.0)["rounds"]) == 1
    assert "1 of 2 rounds fit into 0 s" in said


def test_a_contestant_without_an_answer_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "silent_contestant.py").write_text("import time; time.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(inference_process.MODULES, "llama.cpp", "silent_contestant")
    with pytest.raises(ContestantDied, match=r"SIGKILL .no answer within 0 s"):
        Worker("llama.cpp Q8_0", tmp_path, 1, limit_s=0.3)


def test_the_read_limit_is_a_rate() -> None:
    assert 0.05 < read_limit(1, 16 << 20) < 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
def test_the_read_limit_holds_its_memory_once() -> None:
    size_bytes = 256 << 20
    before = resident()
    with Peak(interval_s=0.001) as peak:
        read_limit(1, size_bytes)
    assert peak.highest.total_bytes - before.total_bytes < 1.5 * size_bytes
