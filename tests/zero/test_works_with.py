"""Sharding beside the rest of torch, transformers and PEFT, without special settings."""

from __future__ import annotations

import pytest
import torch

from tests.worlds import Worlds
from tests.zero.oracle import same

CASES = "tests.zero.works_with_cases"


@pytest.mark.parametrize("built", ["before", "after"])
def test_learning_rate_schedulers(world: Worlds, built: str) -> None:
    assert world(2).run(CASES, "schedulers", built) == [[], []]


def test_evaluation_between_steps(world: Worlds) -> None:
    assert world(2).run(CASES, "evaluation") == [[], []]


def test_grad_scaler_and_fp16_autocast(world: Worlds) -> None:
    for scales, changed in world(2).run(CASES, "grad_scaler"):
        assert scales == [1024.0, 512.0, 512.0, 1024.0]
        assert changed == [True, False, True, True]


@pytest.mark.parametrize("gradient_dtype", ["parameter", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters(world: Worlds, dtype: torch.dtype, gradient_dtype: str) -> None:
    assert world(2).run(CASES, "half", dtype, gradient_dtype) == [[], []]


def test_dynamic_loss_scale(world: Worlds) -> None:
    for scales, skipped in world(2).run(CASES, "overflow"):
        assert skipped >= 1
        assert scales[1] >= scales[2] * 2
        assert scales[-1] == scales[0] / 2**skipped


def test_meta_weights_do_not_depend_on_the_ranks(world: Worlds) -> None:
    alone, two, three = (world(size).run(CASES, "on_meta")[0] for size in (1, 2, 3))
    for kind, full in alone.items():
        for other in (two[kind], three[kind], alone[kind.replace("3", "1")]):
            assert list(full) == list(other)
            assert all(same(full[name], other[name]) for name in full)
    assert not same(alone["reset at stage 3"]["head.weight"], alone["init at stage 3"]["head.weight"])


def test_several_models_in_one_process(world: Worlds) -> None:
    assert world(2).run(CASES, "two_models") == [[], []]


@pytest.mark.parametrize("size", [1, 3])
def test_reading_and_writing_whole_parameters(world: Worlds, size: int) -> None:
    assert world(size).run(CASES, "reading") == [[]] * size


def test_outputs_of_any_kind(world: Worlds) -> None:
    assert world(2).run(CASES, "object_outputs") == [[], []]


def test_the_backends_own_reduction_is_close(world: Worlds) -> None:
    assert all(error < 1e-6 for error in world(2).run(CASES, "native"))


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_transformers(world: Worlds, kind: str, adapted: bool) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    for stage in (2, 3):
        assert world(2).run(CASES, "hugging_face", kind, adapted, stage) == [[], []]
