"""What a released parameter shows to whoever reads it: never a number that could pass for a weight."""

from __future__ import annotations

import pytest
import torch

from trivium.zero.flat import nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_floating_point_one_shows_nan(dtype: torch.dtype) -> None:
    found = nothing(dtype, torch.device("cpu"))
    assert found.dtype == dtype and found.dim() == 0 and bool(found.isnan())


@pytest.mark.parametrize(
    ("dtype", "shown"),
    [(torch.bool, True), (torch.uint8, 255), (torch.int8, -128), (torch.int32, -(2**31)), (torch.int64, -(2**63))],
)
def test_a_whole_one_shows_the_end_of_its_range(dtype: torch.dtype, shown: int) -> None:
    found = nothing(dtype, torch.device("cpu"))
    assert found.dtype == dtype and found.dim() == 0 and found.item() == shown
