from __future__ import annotations

import pytest

from trivium.base.errors import ConfigError, RankError
from trivium.bench.launch import launch
from trivium.bench.runner import most_on, ratios, slowest, spread, summary, take_turns


def test_turns_rotate_and_all_do_the_same_steps() -> None:
    done: list[tuple[str, int]] = []
    steps = {name: lambda number, name=name: done.append((name, number)) for name in "abc"}
    met: list[int] = []
    times = take_turns(steps, rounds=3, per_round=2, meet=lambda: met.append(len(done)), first_step=5).times
    assert [name for name, _ in done] == list("aabbcc" + "bbccaa" + "ccaabb")
    assert {name: [n for other, n in done if other == name] for name in "abc"} == {
        name: [*range(5, 11)] for name in "abc"
    }
    assert met == [2 * turn for turn in range(9)]
    assert {name: [len(taken) for taken in rounds] for name, rounds in times.items()} == {
        name: [2] * 3 for name in "abc"
    }


def test_a_ratio_is_taken_within_its_round() -> None:
    drifting = {"base": [[1.0, 1.0], [10.0, 10.0], [4.0, 4.0]], "other": [[2.0, 2.0], [5.0, 5.0], [4.0, 8.0]]}
    found = ratios(drifting, "base")
    assert (found["other"].least, found["other"].median, found["other"].greatest) == (0.5, 1.5, 2.0)
    assert found["base"].to_dict() == {"least": 1.0, "median": 1.0, "greatest": 1.0}
    assert summary(drifting)["other"] == {"least": 2.0, "median": 4.5, "greatest": 8.0}
    with pytest.raises(ConfigError, match="base='gone' took no part; contestants were base, other"):
        ratios(drifting, "gone")
    with pytest.raises(ConfigError, match="at least one round"):
        spread([])


def test_rounds_in_which_much_was_stolen_from_either_do_not_count() -> None:
    times = {"base": [[1.0], [1.0], [9.0]], "other": [[2.0], [8.0], [9.0]], "third": [[3.0], [3.0], [3.0]]}
    stolen = {"base": [0.0, 0.0, 0.5], "other": [0.01, 0.4, 0.0], "third": [0.3, 0.3, 0.3]}
    found = ratios(times, "base", stolen)
    assert found["other"].to_dict() == {"least": 2.0, "median": 2.0, "greatest": 2.0}
    assert found["third"].to_dict() == {"least": 0.333333, "median": 3.0, "greatest": 3.0}  # all are like that
    assert summary(times, stolen)["base"]["greatest"] == 1.0
    assert summary(times, stolen)["other"]["greatest"] == 9.0


def test_a_turn_of_which_much_was_stolen_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.5, 0.3, 0.4, 0.5, 0.01])
    done: list[int] = []
    turns = take_turns(
        {"a": done.append},
        rounds=2,
        per_round=1,
        meet=lambda: None,
        tries=3,
        agree=lambda share, late: (next(shares), late),
    )
    assert turns.stolen == {"a": [0.3, 0.01]} and done == [0, 0, 0, 1, 1]


def test_the_worst_share_counts_on_all_ranks_and_the_latest() -> None:
    class Swapping:
        def swap(self, mine: list[int], phase: str) -> list[list[int]]:
            return [mine, [30_000, 1]]

    assert most_on(Swapping())(0.5, False) == (0.5, True)  # type: ignore[arg-type]
    assert most_on(Swapping())(0.0, True) == (0.03, True)  # type: ignore[arg-type]


def test_a_step_lasts_until_the_last_rank() -> None:
    assert slowest([{"a": [[1.0, 5.0]]}, {"a": [[3.0, 2.0]]}]) == {"a": [[3.0, 5.0]]}


def test_a_rank_that_fails_is_told_with_its_words() -> None:
    with pytest.raises(RankError, match=r"failed \(exit code 1\): rank 0\n(.|\n)*KeyError: 'device'"):
        launch("trivium.bench.zero_ranks", {}, 1, timeout_s=120)
