"""Every way to shard gives the bits of one process (ZeRO section 5; [Note: order of reduction] in zero/engine.py)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worlds import Worlds
from tests.zero.oracle import Cell
from tests.zero.zoo import ZOO

BUCKETS = (1024, 1 << 12, 1 << 20)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_stage_model_and_bucket(world: Worlds, size: int) -> None:
    cells = [
        Cell(model=model, stage=stage, bucket_bytes=bucket, clip=0.05, steps=3)
        for model in ZOO
        for stage, bucket in zip((0, 1, 2, 3), (1 << 20, 1024, 1 << 12, 1024), strict=True)
    ]
    cells += [Cell(model="odd", stage=3, units=units, steps=2) for units in ("root", "leaves", "all")]
    report(world, size, cells)


@pytest.mark.parametrize("size", [2, 4])
def test_hybrid_kept_and_several_optimizers(world: Worlds, size: int) -> None:
    report(
        world,
        size,
        [
            Cell(model=model, stage=stage, shard_size=shard_size, keep_gathered=kept, optimizer=kind, accumulation=2)
            for model in ("odd", "tied")
            for stage, shard_size, kept, kind in (
                (3, 1, False, "adamw"),
                (3, size // 2, False, "muon"),
                (2, size // 2, False, "sgd"),
                (1, size // 2, False, "adamw"),
                (3, None, True, "adam"),
                (1, None, False, "muon"),
            )
        ],
    )


@pytest.mark.parametrize("size", [2, 3])
def test_the_number_of_micro_batches_may_change_from_step_to_step(world: Worlds, size: int) -> None:
    """Also from one, after which sums were not kept, to several."""
    report(
        world,
        size,
        [
            Cell(stage=stage, accumulation=(1, 2, 1, 3), steps=4, shard_size=shard_size)
            for stage, shard_size in ((0, None), (1, None), (2, None), (3, None), (3, 1))
        ],
    )


@st.composite
def cells(draw: st.DrawFn, size: int) -> Cell:
    return Cell(
        model=draw(st.sampled_from(sorted(ZOO))),
        stage=draw(st.integers(0, 3)),
        units=draw(st.sampled_from(["auto", "root", "leaves", "all"])),
        bucket_bytes=draw(st.sampled_from(BUCKETS)),
        accumulation=draw(st.integers(1, 3) | st.tuples(*[st.integers(1, 3)] * 3)),
        no_sync=draw(st.booleans()),
        average=draw(st.booleans()),
        optimizer=draw(st.sampled_from(["adamw", "adam", "sgd", "muon"])),
        shard_size=draw(st.sampled_from([None, *(n for n in range(1, size + 1) if size % n == 0)])),
        keep_gathered=draw(st.booleans()),
        prefetch=draw(st.integers(0, 2)),
        clip=draw(st.sampled_from([None, 0.01, 10.0])),
        steps=draw(st.integers(1, 3)),
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_cell(world: Worlds, size: int) -> None:
    @settings(max_examples=6)
    @given(some=st.lists(cells(size), min_size=5, max_size=5))
    def check(some: list[Cell]) -> None:
        report(world, size, some)

    check()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_hundred_steps(world: Worlds, size: int) -> None:
    """Parameters, optimizer states and every clip norm, at every stage, against the same one process.

    Several units and buckets on up to two ranks; one unit on more, where each message costs three or four processes.
    """
    cell = Cell(model="blocks", steps=100, clip=0.02, bucket_bytes=1024)
    if size > 2:
        cell = Cell(model="plain", steps=100, clip=0.02, units="root")
    found = world(size).run("tests.zero.oracle", "compare_stages", cell, (0, 1, 2, 3))
    assert found == [[[]] * 4] * size


def report(world: Worlds, size: int, every: list[Cell], **keywords: Any) -> None:
    """Fail with each cell that differs and what differs in it."""
    found = world(size).run("tests.zero.cases", "compare_all", every, **keywords)
    wrong = [
        f"rank {rank}, {cell}:\n  " + "\n  ".join(lines)
        for rank, results in enumerate(found)
        for cell, lines in zip(every, results, strict=True)
        if lines
    ]
    assert not wrong, "\n".join(wrong)
