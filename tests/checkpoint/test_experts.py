"""Row T20 with experts: what was saved at any degree of expert parallelism, any other loads, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.expert_cases import Model, optimizer_of
from tests.worlds import Worlds
from trivium import checkpoint
from trivium.base.errors import CheckpointError
from trivium.moe import MoE

CASES = "tests.checkpoint.expert_cases"


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, through one unsharded process and torch's own optimizer."""
    model = Model(seed=9)
    optimizer = optimizer_of(model)
    for module in model.modules():
        if "number" in vars(module):
            module.number = -1
    checkpoint.load(folder, model=model, optimizer=optimizer)
    found = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = value
    for name, module in model.named_modules():
        if "number" in vars(module):
            found[f"{name} number"] = torch.tensor(module.number)
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_experts_of_eight_ranks_load_on_three(tmp_path: Path, world: Worlds) -> None:
    world(8).run(CASES, "train_and_save", tmp_path / "eight", (8, 8), 3, timeout=300)
    expected = whole(tmp_path / "eight")
    world(3).run(CASES, "load_and_save", tmp_path / "eight", tmp_path / "three", (3, 3), 1, timeout=300)
    assert_same(expected, whole(tmp_path / "three"))


@pytest.mark.parametrize(
    ("size", "ep", "stage", "chain"),
    [
        (2, (2, 2), 3, [(2, (1, 1), 2), (4, (4, 2), 1), (1, (1, 1), 3), (3, (3, 3), 0), (2, (2, 1), 3)]),
        (4, (2, 4), 1, [(3, (1, 3), 3), (2, (2, 2), 0), (4, (4, 4), 2)]),
    ],
)
def test_any_degree_stage_and_number_of_ranks_loads_any_other(
    tmp_path: Path,
    world: Worlds,
    size: int,
    ep: tuple[int, int],
    stage: int,
    chain: list[tuple[int, tuple[int, int], int]],
) -> None:
    source = tmp_path / "source"
    names = world(size).run(CASES, "train_and_save", source, ep, stage)
    assert all(sorted(each) == sorted(names[0]) for each in names)
    expected = whole(source)
    assert {f"layers.1.experts.{i}.rows" for i in range(8)} <= expected.keys()
    assert [int(expected[f"layers.1.experts.{i} number"]) for i in range(8)] == list(range(8))
    assert sum(f"layers.0.experts.{i}.up.weight exp_avg" in expected for i in range(8)) > 4
    for number, (ranks, degrees, reader) in enumerate(chain):
        target = tmp_path / f"step-{number}"
        extras = world(ranks).run(CASES, "load_and_save", source, target, degrees, reader)
        assert extras == [{"ep": list(ep)}] * ranks
        assert_same(expected, whole(target))
        source = target


def test_hugging_face_layout_out_of_and_into_experts_apart(tmp_path: Path, world: Worlds) -> None:
    world(2).run(CASES, "train_and_save", tmp_path / "two", (2, 2), 3)
    world(3).run(CASES, "export", tmp_path / "two", tmp_path / "hf", (3, 1), 3)
    world(2).run(CASES, "from_export", tmp_path / "hf", tmp_path / "back", (1, 2), 2)
    models = [Model(seed=3), Model(seed=4)]
    for model, folder in zip(models, ("two", "back"), strict=True):
        checkpoint.load(tmp_path / folder, model=model)
    one, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_another_number_of_experts_is_told_by_name(tmp_path: Path, world: Worlds) -> None:
    world(2).run(CASES, "train_and_save", tmp_path / "two", (2, 2), 3)
    model = Model()
    model.layers[0] = MoE(6, 5, 9)
    with pytest.raises(CheckpointError, match=r"layers\.0\.experts\.8"):
        checkpoint.load(tmp_path / "two", model=model)
