"""Rows T30 (ranks that differ) and I11 (routing at its edges) of the fault matrix, as far as experts are concerned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trivium.moe import CapacityConfig, GateConfig


def test_t30_another_number_of_experts_is_named_on_all_ranks(world: Any) -> None:
    for words in world(2).run("tests.moe.fault_cases", "wrong", "experts"):
        assert "MoE layer 0 differs across ranks" in words and "'num_experts': 10" in words


def test_t30_another_type_is_named_on_all_ranks(world: Any) -> None:
    for words in world(2).run("tests.moe.fault_cases", "wrong", "type"):
        assert "6 elements of 8 bytes on rank 0" in words and "6 elements of 4 bytes on rank 1" in words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 4}, "'seed': 4"),
        ({"capacity_factor": 1.25}, "factor=1.25"),
        ({"capacity_factor": CapacityConfig(factor=1, policy="score")}, "policy='score'"),
        ({"gate": GateConfig(jitter=0.1)}, "jitter=0.1"),
        ({"exchange": "flat"}, "kind='flat'"),
        ({"residual": True}, "'residual': True"),
    ],
    ids=str,
)
def test_t30_another_setting_is_named_on_all_ranks(world: Any, options: dict[str, Any], words: str) -> None:
    for told in world(2).run("tests.moe.fault_cases", "odd_option", options):
        assert "MoE layer 0 differs across ranks" in told and words in told


@pytest.mark.parametrize("seed", [None, 3])
def test_ranks_whose_generators_stand_apart_build_one_layer(world: Any, seed: int | None) -> None:
    first, second = world(2).run("tests.moe.fault_cases", "odd_seed", seed)
    assert first == second
    torch.manual_seed(40)
    assert first[0] == (int(torch.randint(2**62, ())) if seed is None else seed)


def test_a_users_gate_that_is_wrong_on_one_rank_fails_on_all(world: Any) -> None:
    first, second = world(2).run("tests.moe.fault_cases", "user_gate")
    assert first.startswith("MismatchError: rank 1 has failed")
    assert second.startswith("ConfigError: the gate's experts_TK names [-1] in row 0")


@pytest.mark.parametrize("counts", [[5, 3], [9, 0], [0, 1]])
@pytest.mark.parametrize("expert", [0, 7])
@pytest.mark.parametrize("factor", [None, 1.0])
def test_i11_all_to_one_expert_none_to_the_others(world: Any, counts: list[int], expert: int, factor: float) -> None:
    found = world(2).run("tests.moe.fault_cases", "routed", counts, expert, factor)
    assert max(found) < 1e-12, found
