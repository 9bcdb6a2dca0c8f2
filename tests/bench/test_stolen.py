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
    counts.write_text("cpu  10 20 30 40 50 60 70\n")
    assert stolen_s() == 0.0
    monkeypatch.setattr(stolen, "_STAT", tmp_path / "none")
    assert stolen_s() == 0.0


@pytest.mark.parametrize(
    ("seconds", "stolen", "share"),
    [(4.0, 2.01, 0.25), (0.004, 0.01, 0.0), (4.0, 0.0, 0.0), (0.001, 0.5, 1.0), (0.0, 0.0, 0.0)],
)
def test_a_share_is_of_all_cores_and_no_single_tick_is_one(
    monkeypatch: pytest.MonkeyPatch, seconds: float, stolen: float, share: float
) -> None:
    clock, gone = iter([10.0, 10.0 + seconds]), iter([100.0, 100.0 + stolen])
    monkeypatch.setattr("trivium.bench.stolen.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("trivium.bench.stolen.stolen_s", lambda: next(gone))
    monkeypatch.setattr("trivium.bench.stolen.psutil.cpu_count", lambda logical: 2)
    assert Watched().share() == pytest.approx(share)


@pytest.mark.parametrize(
    ("shares", "best"),
    [([0.0], (1, 0.0)), ([0.5, 0.02, 0.0], (2, 0.02)), ([0.5, 0.3, 0.4], (2, 0.3)), ([0.5, 0.5, 0.5], (1, 0.5))],
)
def test_the_least_stolen_counts_and_little_is_enough(shares: list[float], best: tuple[int, float]) -> None:
    told, calls = iter(shares), iter(range(1, 10))
    assert least_stolen(lambda: next(calls), 3, lambda share, late: (next(told), late)) == best


def test_nothing_is_repeated_after_its_time_and_ranks_agree_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("trivium.bench.stolen.time.monotonic", lambda: now[0])

    def measure() -> float:
        now[0] += 1
        return now[0]

    assert least_stolen(measure, 9, lambda share, late: (0.5, late), until_s=3.0) == (1.0, 0.5)
    assert now == [3.0]
    told = iter([False, True])  # another rank is late
    least_stolen(measure, 9, lambda share, late: (0.5, next(told)), until_s=99.0)
    assert now == [5.0]
