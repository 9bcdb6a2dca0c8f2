"""Capacity is exact arithmetic; drop policies keep whom they say, against a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trivium.moe.capacity import CapacityConfig, Policy, capacity, keep


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "expected"),
    [
        (64, 8, 1, 1.0, 8),
        (65, 8, 1, 1.0, 9),
        (64, 8, 2, 1.25, 20),
        (100, 10, 1, 1.1, 11),  # 10 · 1.1 is 11.000000000000002 in floating point
        (8, 8, 1, 1.0, 4),
        (0, 8, 2, 1.0, 4),
    ],
)
def test_capacity(tokens: int, experts: int, top_k: int, factor: float, expected: int) -> None:
    assert capacity(tokens, experts, top_k, CapacityConfig(factor=factor)) == expected


@given(
    experts=st.lists(st.permutations(range(4)), max_size=12),
    top_k=st.integers(1, 4),
    limit=st.integers(1, 5),
    policy=st.sampled_from(["position", "score", "random"]),
    seed=st.integers(0, 99),
)
def test_keep_is_a_plain_loop(experts: list[list[int]], top_k: int, limit: int, policy: Policy, seed: int) -> None:
    experts_TK = torch.tensor([row[:top_k] for row in experts], dtype=torch.int64).view(-1, top_k)
    weights_TK = torch.randint(3, experts_TK.shape, generator=torch.Generator().manual_seed(seed)) / 2.0
    queue = [(k, t) for k in range(top_k) for t in range(len(experts))]
    if policy == "score":
        queue.sort(key=lambda slot: -float(weights_TK[slot[1], slot[0]]))
    drawn_T = torch.randint(9, (len(experts),), generator=torch.Generator().manual_seed(seed))
    if policy == "random":
        queue.sort(key=lambda slot: (slot[0], int(drawn_T[slot[1]])))
    expected, room = torch.zeros_like(experts_TK, dtype=torch.bool), [limit] * 4
    for k, t in queue:
        expert = int(experts_TK[t, k])
        expected[t, k] = room[expert] > 0
        room[expert] -= 1
    assert torch.equal(keep(experts_TK, weights_TK, 4, limit, policy, drawn_T), expected)
