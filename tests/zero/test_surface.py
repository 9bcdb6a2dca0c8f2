"""The public surface where no other test looks: torch's own clip, given gradients, autocast, compilers, precision."""

from __future__ import annotations

import pytest
import torch

from tests.worlds import Worlds
from tests.zero.surface_cases import DIFFERENCES

CASES = "tests.zero.surface_cases"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_torchs_own_clip_raises_and_changes_nothing(world: Worlds, stage: int) -> None:
    for nan, strides, said, found in world(2).run(CASES, "torch_clips", stage):
        assert nan
        assert strides and all(not any(stride) for stride in strides)
        assert "single memory location" in said
        assert found == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_given_gradient_is_that_of_a_loss(world: Worlds, stage: int, dtype: torch.dtype) -> None:
    assert world(2).run(CASES, "output_gradients", stage, dtype) == [[], []]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_autocast_gives_the_bits_of_one_process(world: Worlds, stage: int) -> None:
    assert world(2).run(CASES, "under_autocast", stage) == [[], []]


def test_compiled_blocks_whose_backward_is_compiled_too(world: Worlds) -> None:
    assert world(2).run(CASES, "compiled_whole", 3) == [[], []]


def test_models_that_differ_are_told_before_any_payload(world: Worlds) -> None:
    for found in world(3).run(CASES, "bytes_before_the_error"):
        assert set(found) == set(DIFFERENCES)
        for what, (kind, payload, agreeing) in found.items():
            assert (kind, payload) == ("MismatchError", 0), what
            assert agreeing > 0


def test_a_meta_model_never_exists_whole(world: Worlds) -> None:
    for peak, held, layer in world(4).run(CASES, "born_in_parts"):
        assert 4 * held >= 24 * layer
        assert held <= peak < held + 3 * layer


@pytest.mark.parametrize(
    ("reduce_dtype", "gradient_dtype"),
    [("float32", "parameter"), ("float32", "float32"), ("parameter", "parameter")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_training_is_what_is_written_out(
    world: Worlds, dtype: torch.dtype, reduce_dtype: str, gradient_dtype: str
) -> None:
    """Three ranks, so that adding in 16 bits rounds twice: masters and weights to the bit."""
    assert world(3).run(CASES, "low_precision", dtype, reduce_dtype, gradient_dtype) == [[]] * 3
