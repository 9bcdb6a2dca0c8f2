"""Losses, choice, seeds and owners, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from trivium.moe.choice import choose
from trivium.moe.dispatch import owners
from trivium.moe.draw import key
from trivium.moe.losses import entropy, load_balance, z_loss


def test_the_balance_loss_is_one_when_even_and_e_when_not() -> None:
    even = torch.full((8, 4), 0.25)
    each = torch.arange(8).remainder(4).view(8, 1)
    assert load_balance(even, each).item() == pytest.approx(1.0)
    one = torch.zeros(8, 4)
    one[:, 2] = 1.0
    assert load_balance(one, torch.full((8, 1), 2)).item() == pytest.approx(4.0)
    assert load_balance(even, torch.stack([each[:, 0], (each[:, 0] + 1) % 4], 1)).item() == pytest.approx(1.0)


def test_the_z_loss_and_the_entropy_are_their_definitions() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert z_loss(logits).item() == pytest.approx(expected)
    assert entropy(logits.softmax(-1)).item() == pytest.approx(math.log(2))
    assert entropy(torch.tensor([[1.0, 0.0]])).item() == 0.0


def test_without_tokens_losses_are_zero_and_have_a_graph() -> None:
    nothing = torch.zeros(0, 4, requires_grad=True)
    for loss in (load_balance(nothing, torch.zeros(0, 2, dtype=torch.int64)), z_loss(nothing)):
        assert loss.item() == 0.0 and loss.requires_grad


def test_the_best_come_first_and_ties_go_low() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert choose(logits, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


def test_owners_cover_all_experts_in_order() -> None:
    assert [list(r) for r in owners(8, 3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    for experts in range(1, 20):
        for ranks in range(1, experts + 1):
            ranges = owners(experts, ranks)
            assert [number for r in ranges for number in r] == list(range(experts))
            assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_seeds_of_neighbours_differ() -> None:
    drawn = {key(seed, layer, number) for seed in range(4) for layer in range(4) for number in range(64)}
    assert len(drawn) == 4 * 4 * 64 and all(0 <= seed < 2**63 for seed in drawn)
