"""Experts on several ranks are the maths of one rank."""

from __future__ import annotations

from typing import Any

import pytest

CELLS: list[tuple[list[int], dict[str, Any], int | None]] = [
    ([5, 7, 4], {}, None),
    ([5, 0, 9], {"top_k": 1}, None),
    ([1, 0, 0], {"top_k": 3, "residual": "mix"}, None),
    ([6, 6, 6], {"top_k": 2, "capacity_factor": 0.5}, None),
    ([4, 3, 5], {"top_k": 2, "residual": True}, 0),
    ([4, 3, 5], {"top_k": 1, "expert": "gelu"}, 7),
    ([0, 0, 0], {}, None),
]


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_equals_one(world: Any, size: int) -> None:
    cells = [(counts[:size], options, everything) for counts, options, everything in CELLS]
    for found in world(size).run("tests.moe.cases", "parallel_equals_alone", cells):
        assert max(found) < 1e-12, found


def test_three_ranks_hold_eight_experts_unevenly(world: Any) -> None:
    assert world(3).run("tests.moe.cases", "held") == [
        ["0", "1", "2", "edp"],
        ["3", "4", "5", "edp"],
        ["6", "7", "edp"],
    ]


def test_the_ledger_counts_the_rows_that_cross(world: Any) -> None:
    for seen, expected in world(2).run("tests.moe.cases", "bytes_sent"):
        assert seen == expected > 0


def test_a_router_that_fails_on_one_rank_fails_on_all(world: Any) -> None:
    first, second = world(2).run("tests.moe.cases", "nan_on_one")
    assert "not finite on rank 1" in first
    assert "row 3" in second and "1 of 5 rows" in second


def test_an_error_before_dispatch_fails_on_all(world: Any) -> None:
    first, second = world(2).run("tests.moe.cases", "wrong_routing_on_one")
    assert first.startswith("MismatchError: rank 1 has failed")
    assert second.startswith("ConfigError: routing")


def test_backward_ends_where_no_expert_and_no_input_needs_a_gradient(world: Any) -> None:
    assert world(2).run("tests.moe.cases", "only_one_rank_hit") == [True, False]


def test_a_layer_sets_its_own_degree(world: Any) -> None:
    found = world(2).run("tests.moe.cases", "degree_of_its_own")
    assert [names for names, _, _ in found] == [["0", "1", "2", "3"], ["4", "5", "6", "7"]]
    assert all(axis == "dp/alone" and distance < 1e-12 for _, axis, distance in found)


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("stage", [0, 3])
def test_two_data_parallel_ranks_under_zero_train_as_one_process(world: Any, stage: int, ep: int) -> None:
    assert max(world(2).run("tests.moe.cases", "sharded", stage, ep)) < 1e-12
