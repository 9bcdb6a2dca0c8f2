"""Every class of torch.optim is bit-equal to one process, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.worlds import Worlds
from tests.zero.cases import OPTIMIZERS, REFUSED


def test_every_class_of_torch_is_decided() -> None:
    every = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    assert every == {name for name, _ in OPTIMIZERS} | set(REFUSED)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_bits_of_one_process(world: Worlds, size: int) -> None:
    found = world(size).run("tests.zero.cases", "compare_optimizers")
    assert [lines for results in found for lines in results if lines] == []


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(world: Worlds, name: str) -> None:
    for message in world(2).run("tests.zero.cases", "refuse", name):
        assert f"torch.optim.{name} cannot be sharded" in message


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("differentiable", "differentiable=True"),
        ("unknown", "pass elementwise=True"),
        ("stranger", "not in the model"),
        ("twice", "sharded already"),
        ("option", "unknown option 'stag'"),
        ("stage", "zero.stage=4: expected 0 to 3"),
        ("late group", "cannot be added after shard"),
        ("unfrozen", "frozen when the model was sharded"),
    ],
)
def test_what_cannot_work_is_told(world: Worlds, what: str, words: str) -> None:
    for message in world(2).run("tests.zero.cases", "misuse", what):
        assert words in message


def test_an_unknown_class_may_promise_to_be_elementwise(world: Worlds) -> None:
    assert world(2).run("tests.zero.cases", "elementwise") == [[], []]


def test_state_from_before_shard_is_cut(world: Worlds) -> None:
    assert world(3).run("tests.zero.cases", "warm_optimizer") == [[]] * 3


def test_state_dict_round_trip(world: Worlds) -> None:
    assert world(2).run("tests.zero.cases", "reload") == [[], []]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_norm_is_free_of_order_and_close_to_fp64(world: Worlds, size: int) -> None:
    results: list[list[tuple[Any, ...]]] = world(size).run("tests.zero.cases", "norms")
    for across_stages in zip(*results, strict=True):
        assert len({bits for _, bits, _ in across_stages}) == 1
        assert all(error < 1e-6 for _, _, error in across_stages)
    assert len({bits for rank in results for _, bits, _ in rank}) == 1
