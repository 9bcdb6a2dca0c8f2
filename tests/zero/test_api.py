"""The loss scale divides out everywhere, two optimizers make one step, what does not fit is told before the cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trivium.base.errors import ConfigError
from trivium.zero import ZeroConfig

CASES = "tests.zero.api_cases"


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_loss_scale_changes_neither_step_nor_input_gradient(world: Any, stage: int, twice: bool) -> None:
    plain, inputs = world(1).run(CASES, "scaled", stage, 1.0, twice)[0]
    scaled, scaled_inputs = world(1).run(CASES, "scaled", stage, 16.0, twice)[0]
    for mine, theirs in zip([*plain, inputs], [*scaled, scaled_inputs], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_bad_step_under_two_optimizers_counts_once_and_moves_nothing(world: Any, stage: int) -> None:
    assert world(2).run(CASES, "two_optimizers", stage)[0] == (1, 2.0**15, False)


def test_ranks_with_other_values_are_told(world: Any) -> None:
    for told in world(2).run(CASES, "other_values"):
        assert told.startswith("MismatchError: weight has other values on rank 1 than on rank 0")


def test_what_does_not_fit_is_told_before_the_model_is_cut(world: Any) -> None:
    told = world(1).run(CASES, "refusals")[0]
    assert "not in the model" in told["foreign"]
    assert "in two optimizers" in told["twice"]
    assert told["usable"] == "True"
    assert "full_state_dict" in told["copy"]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_full_state_has_exactly_the_bare_modules_keys(world: Any, stage: int) -> None:
    bare, full = world(1).run(CASES, "keys", stage)[0]
    assert full == bare


@pytest.mark.parametrize(
    "options",
    [{"reduce": "foo"}, {"reduce_dtype": "parameter", "gradient_dtype": "float32"},
     {"reduce_dtype": "bf16"}, {"gradient_dtype": "x"}, {"loss_scale": "static"},
     {"bucket_bytes": "1MB"}, {"prefetch": True}, {"shard_size": 1.5}],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"zero.{next(iter(options))}="):
        ZeroConfig(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_was_written_stays_where_the_block_breaks_off(world: Any, stage: int, dtype: torch.dtype) -> None:
    assert world(2).run(CASES, "writes_that_break_off", stage, dtype) == [(True, "half-way")] * 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_inside_a_gathered_block_is_refused(world: Any, stage: int) -> None:
    for said, moved in world(2).run(CASES, "steps_inside", stage):
        assert "leave the block first" in said and moved
