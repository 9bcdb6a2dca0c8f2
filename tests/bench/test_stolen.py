"""What the host of a virtual machine took away, and measuring again until it was little."""

from __future__ import annotations

from pathlib import Path

import pytest

from trivium.bench import stolen
from trivium.bench.stolen import Watched, least_stolen, stolen_s


def test_the_kernel_s_count_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counts = tmp_path / "stat"
    counts.write_text("cpu  10 20 30 40 50 60 70 850 90 100\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    monkeypatch.setattr(stolen, "_STAT", counts)
    assert stolen_s() == 8.5
    monkeypatch.setattr(stolen, "_STAT", tmp_path / "none")
    assert stolen_s() == 0.0


def test_a_share_is_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, gone = iter([10.0, 14.0]), iter([100.0, 102.0])
    monkeypatch.setattr("trivium.bench.stolen.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(stolen, "stolen_s", lambda: next(gone))
    monkeypatch.setattr("trivium.bench.stolen.psutil.cpu_count", lambda logical: 2)
    assert Watched().share() == 0.25


@pytest.mark.parametrize(
    ("shares", "best"),
    [([0.0], (1, 0.0)), ([0.5, 0.02, 0.0], (2, 0.02)), ([0.5, 0.3, 0.4], (2, 0.3)), ([0.5, 0.5, 0.5], (1, 0.5))],
)
def test_the_least_stolen_counts_and_little_is_enough(shares: list[float], best: tuple[int, float]) -> None:
    told, calls = iter(shares), iter(range(1, 10))
    assert least_stolen(lambda: next(calls), 3, lambda share: next(told)) == best
