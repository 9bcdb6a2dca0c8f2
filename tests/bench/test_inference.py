"""The inference bench: a whole run at the smallest size, its arithmetic, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trivium.base.errors import ConfigError, SetupError
from trivium.bench.inference import InferenceBench, Worker, _summary, read_limit, run
from trivium.bench.inference_table import table, targets
from trivium.cli.output import data_console


def test_a_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    names = ("trivium int8", "transformers float32")
    bench = InferenceBench(
        shape="tiny", rounds=2, steps=2, threads=1, batches=(1, 3), context=9, prefill=20, contestants=names
    )
    report = run(bench, "the command", said.append)
    assert set(report["summary"]) == set(names)
    for entries in report["summary"].values():
        assert set(entries) == {"decode 1", "decode 3", "prefill 20"}
        assert all(entry["seconds"] > 0 for entry in entries.values())
    # 2 layers of q, o 64², k, v 32·64, MLP 3·160·64, and the head 256·64: int8 pads 160 rows to 192.
    floats = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64) + 256 * 64
    norms = 5 * 64
    assert report["step_bytes"]["transformers float32"] == 4 * (floats + norms)
    assert floats < report["step_bytes"]["trivium int8"] < 1.5 * floats
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
    return {"rounds": rounds, "summary": _summary(rounds, {"trivium int8": 10**9, "llama.cpp Q8_0": 10**9})}


def test_targets_tell_ratios_and_shares() -> None:
    met = report_of(0.11, 0.2)
    assert met["summary"]["trivium int8"]["decode 1"]["share_of_read_limit"] == pytest.approx(0.909, abs=1e-3)
    assert met["summary"]["trivium int8"]["decode 1"]["tokens_per_s"] == pytest.approx(9.09, abs=1e-2)
    assert targets(met) == [
        "trivium int8, decode 1: 1.82 × llama.cpp Q8_0 (aim 1.3): met",
        "trivium int8: 91% of the read limit (aim 80%): met",
    ]
    assert all(line.endswith("missed") for line in targets(report_of(0.2, 0.21)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "7b"}, "expected one of 0.5b, 1.1b"),
        ({"contestants": ("vllm",)}, "--contestants vllm"),
        ({"rounds": 0}, "at least 1"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InferenceBench(**arguments)


def test_a_contestant_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="trivium int8: its process ended"):
        Worker("trivium int8", tmp_path / "nowhere", InferenceBench(shape="tiny"))


def test_the_read_limit_is_a_rate() -> None:
    assert 0.05 < read_limit(1, 16 << 20) < 10_000
