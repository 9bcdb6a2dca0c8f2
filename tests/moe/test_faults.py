"""Rows T30 (ranks that differ) and I11 (routing at its edges) of the fault matrix, as far as experts are concerned."""

from __future__ import annotations

from typing import Any

import pytest


def test_t30_another_number_of_experts_is_named_on_all_ranks(world: Any) -> None:
    for words in world(2).run("tests.moe.fault_cases", "wrong", "experts", timeout=30):
        assert "MoE layer 0 differs across ranks" in words and "'num_experts': 10" in words


def test_t30_another_type_is_named_on_all_ranks(world: Any) -> None:
    for words in world(2).run("tests.moe.fault_cases", "wrong", "type", timeout=30):
        assert "6 elements of 8 bytes on rank 0" in words and "6 elements of 4 bytes on rank 1" in words


@pytest.mark.parametrize("counts", [[5, 3], [9, 0], [0, 1]])
@pytest.mark.parametrize("expert", [0, 7])
@pytest.mark.parametrize("factor", [None, 1.0])
def test_i11_all_to_one_expert_none_to_the_others(world: Any, counts: list[int], expert: int, factor: float) -> None:
    found = world(2).run("tests.moe.fault_cases", "routed", counts, expert, factor, timeout=30)
    assert max(found) < 1e-12, found
