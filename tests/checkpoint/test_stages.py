"""Row T20: what any stage on any number of ranks saved, any other loads, bit for bit; real shards on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.cases import make, optimizer_of
from tests.worlds import Worlds
from trivium import checkpoint

CASES = "tests.checkpoint.cases"


def whole(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, through one unsharded process and torch's own optimizer."""
    model = make(9).to(dtype)
    optimizer = optimizer_of(model, lr=1.0)
    checkpoint.load(folder, model=model, optimizer=optimizer)
    found = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = value
    found["lr"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_any_stage_and_number_of_ranks_loads_any_other(tmp_path: Path, world: Worlds, stage: int) -> None:
    source = tmp_path / "two"
    world(2).run(CASES, "train_and_save", source, stage)
    expected = whole(source)
    assert "embed.weight exp_avg" in expected and "frozen.weight exp_avg" not in expected
    assert bool(expected["embed.weight exp_avg"].abs().sum() > 0)
    other = (stage + 1) % 4
    chain = [(2, (stage + 2) % 4), (3, other), (1, 3 - stage), (3, stage)]
    for number, (ranks, reader) in enumerate(chain):
        target = tmp_path / f"step-{number}"
        extras = world(ranks).run(CASES, "load_and_save", source, target, reader)
        assert extras == [{"stage": stage}] * ranks
        assert_same(expected, whole(target))
        source = target


def test_training_goes_on_bit_equal_at_another_stage(tmp_path: Path, world: Worlds) -> None:
    world(2).run(CASES, "train_and_save", tmp_path / "two", 3)
    world(2).run(CASES, "go_on", None, 1, tmp_path / "uninterrupted")
    # `go_on` repeats the first batch after a resume, so it is compared with a run at another stage that did the same.
    world(2).run(CASES, "go_on", tmp_path / "two", 2, tmp_path / "resumed")
    world(2).run(CASES, "go_on", tmp_path / "two", 0, tmp_path / "resumed-0")
    assert_same(whole(tmp_path / "resumed"), whole(tmp_path / "resumed-0"))
    assert_same(whole(tmp_path / "resumed"), whole(tmp_path / "uninterrupted"))


@pytest.mark.parametrize("stage", [1, 3])
def test_16_bit_training_keeps_its_masters(tmp_path: Path, world: Worlds, stage: int) -> None:
    world(2).run(CASES, "train_and_save", tmp_path / "two", stage, "bfloat16")
    world(3).run(CASES, "load_and_save", tmp_path / "two", tmp_path / "three", 4 - stage, "bfloat16")
    expected = whole(tmp_path / "two")
    assert_same(expected, whole(tmp_path / "three"))
    assert not torch.equal(expected["embed.weight"], expected["embed.weight"].bfloat16().float())


@pytest.mark.parametrize("stage", [2, 3])
def test_hugging_face_layout_out_of_and_into_shards(tmp_path: Path, world: Worlds, stage: int) -> None:
    world(2).run(CASES, "train_and_save", tmp_path / "two", stage)
    world(3).run(CASES, "export", tmp_path / "two", tmp_path / "hf", stage)
    model = make(3)
    checkpoint.load(tmp_path / "two", model=model)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    state = model.state_dict()
    del state["head.weight"]
    assert_same(dict(state), exported)
    world(2).run(CASES, "from_export", tmp_path / "hf", stage, tmp_path / "back")
    other = make(4)
    checkpoint.load(tmp_path / "back", model=other)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
