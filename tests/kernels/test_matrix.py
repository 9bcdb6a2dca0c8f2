"""Packing: what a format holds, in either layout, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.steps import FORMATS
from trivium.base.errors import ConfigError
from trivium.kernels.matrix import Format, arrange, matrix_bytes, pack, unpack

SHAPES = ((1, 1), (7, 129), (64, 64), (65, 33), (130, 200))
# Relative error of a normal matrix, in the Frobenius norm: what the number of levels allows.
LOSS = {"float32": 0.0, "bfloat16": 2.5e-3, "float16": 3e-4, "int8": 9e-3, "int4": 0.11}


@pytest.mark.parametrize(("format", "group"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_hold_the_same_numbers(format: Format, group: int, shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    plain = pack(weight, format, group=group)
    panels = pack(weight, format, group=group, layout="panels")
    back = arrange(panels, "plain")
    assert torch.equal(back.data, plain.data)
    if plain.scales is not None:
        assert back.scales is not None
        assert torch.equal(back.scales, plain.scales)
    assert torch.equal(unpack(panels), unpack(plain))
    assert panels.data.shape[0] == -(-shape[0] // 64)


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_what_is_lost(format: Format, group: int) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    error = float((unpack(pack(weight, format, group=group)) - weight).norm() / weight.norm())
    assert error <= LOSS[format]
    assert error > 0 or format == "float32"


def test_int4_is_not_worse_than_the_largest_over_eight() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(4))
    blocks = weight.view(256, 16, 32)
    extreme = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True))
    scale = (extreme / -8).half().float()
    plain = ((blocks / scale).round().clamp(-8, 7) * scale).view(256, 512)
    ours = unpack(pack(weight, "int4", group=32))
    assert (ours - weight).square().sum() < 0.95 * (plain - weight).square().sum()


def test_zero_rows_and_tiny_groups_are_kept() -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 1e-9
    weight[2, 5] = 7.0
    for format, group in (("int8", 0), ("int8", 32), ("int4", 32)):
        back = unpack(pack(weight, format, group=group, layout="panels"))  # type: ignore[arg-type]
        assert torch.equal(back[0], weight[0])
        torch.testing.assert_close(back, weight, rtol=1e-3, atol=0)


def test_bytes() -> None:
    weight = torch.randn(128, 256)
    assert matrix_bytes(pack(weight, "bfloat16", layout="panels")) == 128 * 256 * 2
    assert matrix_bytes(pack(weight, "int8", layout="panels")) == 128 * 256 + 128 * 4
    assert matrix_bytes(pack(weight, "int4", group=32, layout="panels")) == 128 * 256 // 2 + 128 * 8 * 2


@pytest.mark.parametrize(
    ("weight", "format", "group", "message"),
    [
        (torch.zeros(3), "float32", 0, "expected a float matrix"),
        (torch.zeros(3, 3, dtype=torch.int8), "float32", 0, "expected a float matrix"),
        (torch.zeros(0, 3), "float32", 0, "expected a float matrix"),
        (torch.zeros(3, 3), "bfloat16", 32, "only int8 and int4 have groups"),
        (torch.zeros(3, 3), "int4", 48, "group 48: int4 has 32, 64, 128"),
        (torch.zeros(3, 3), "int3", 0, "expected one of float32, bfloat16"),
        (torch.full((3, 3), float("inf")), "int8", 0, "not finite"),
    ],
)
def test_refusals(weight: torch.Tensor, format: Format, group: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack(weight, format, group=group)
