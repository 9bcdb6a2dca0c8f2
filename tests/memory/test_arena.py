"""Long-lived tensors in blocks of their own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from trivium.memory.arena import Arena


def test_copies_are_equal_aligned_and_apart() -> None:
    arena = Arena()
    made = [
        torch.arange(size).to(dtype).reshape(shape)
        for size, shape in ((6, (2, 3)), (1, ()), (7, (7,)), (0, (0, 4)))
        for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
    ]
    kept = [arena.keep(tensor) for tensor in made]
    for old, new in zip(made, kept, strict=True):
        assert torch.equal(old, new) and old.dtype == new.dtype
        assert new.data_ptr() % 64 == 0 or not new.numel()
    kept[0].fill_(9)
    assert all(torch.equal(old, new) for old, new in zip(made[1:], kept[1:], strict=True))


def test_blocks_that_fill_up_and_tensors_larger_than_one() -> None:
    arena = Arena()
    many = [arena.keep(torch.full((5 << 20,), number, dtype=torch.uint8)) for number in range(30)]
    large = arena.keep(torch.full((70 << 20,), 77, dtype=torch.uint8))
    assert all(int(tensor[0]) == int(tensor[-1]) == number for number, tensor in enumerate(many))
    assert int(large[-1]) == 77


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")
def test_blocks_lie_on_huge_pages_where_there_are_any() -> None:
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not modes.exists() or "[never]" in modes.read_text():
        pytest.skip("this kernel has no huge pages")
    kept = Arena().keep(torch.ones(8 << 20, dtype=torch.uint8))
    flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= kept.data_ptr() < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert kept.data_ptr() % (2 << 20) == 0 and " hg" in flags  # advised; whether they are there is the kernel's choice


def test_a_tensor_outlives_the_arena() -> None:
    kept = Arena().keep(torch.ones(1000).t())
    assert kept.sum() == 1000
