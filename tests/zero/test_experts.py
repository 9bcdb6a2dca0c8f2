"""Experts apart under ZeRO: compared with those who hold the same, reduced over them, and never alone in a failure."""

from __future__ import annotations

import pytest

from tests.worlds import Worlds

CASES = "tests.zero.expert_cases"


@pytest.mark.parametrize("what", ["shape", "frozen", "values", "dense", "names", "degree", "optimizer"])
def test_ranks_whose_experts_differ_are_told_before_any_payload(world: Worlds, what: str) -> None:
    words = {
        "shape": ["moe.experts.2", "rank 1", "rank 3"],
        "frozen": ["moe.experts.2", "rank 1", "rank 3"],
        "values": ["moe.experts.2", "rank 1", "rank 3", "other values"],
        "dense": ["last.weight", "rank 0", "rank 3"],
        "names": ["moe.experts.0", "ranks 0 and 1", "global number"],
        "degree": ["moe.experts.2", "axis edp", "[1, 3]", "only [1]"],
        "optimizer": ["unit", "1, 3"],
    }[what]
    for said, seconds in world(4).run(CASES, "models_that_differ", what):
        assert said.startswith("MismatchError"), said
        assert all(word in said for word in words), said
        assert seconds < 10


def test_one_bad_expert_is_skipped_by_all_and_counted_once(world: Worlds) -> None:
    for found in world(2).run(CASES, "poisoned"):
        assert found == [(True, False, True, 1, ["3"])] * 4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_experts_on_all_ranks_are_not_reduced_at_all(world: Worlds, stage: int) -> None:
    for sent in world(2).run(CASES, "traffic", stage):
        assert sent["edp"] == 0
        assert sent["dp"] > 0
        assert sent["held"] == 2 * 3 * 5 * 6  # two experts of three matrices: a shard of one rank is all


def test_experts_may_differ_by_number(world: Worlds) -> None:
    for size in (2, 3):
        for names, distance in world(size).run(CASES, "different_kinds"):
            assert names == []
            assert distance < 1e-12


def test_no_unit_begins_inside_a_layer_of_experts(world: Worlds) -> None:
    for units in world(2).run(CASES, "units_everywhere"):
        assert units == ["", "0", "1.first", "1.moe", "1.last"]
