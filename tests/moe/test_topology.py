"""Where experts live never changes the maths: ranks under ZeRO against one that runs their micro-batches in turn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.moe.topology_cases import Cell, Work, alone
from tests.worlds import Worlds

CASES = "tests.moe.topology_cases"
LIMITS = {"float64": {"loss": 1e-12, "gradient": 1e-12, "norm": 1e-12, "weights": 1e-12}, "float32": {"loss": 1e-6}}
WORKS = (
    Work(expert="swiglu"),
    Work(experts=(4, 5), top_k=1, drops="position"),
    Work(experts=(6, 4), drops="score"),
    Work(experts=(4, 3), top_k=1, drops="random"),
    Work(experts=(2, 9), top_k=2),
)
PLACES: dict[int, list[dict[str, Any]]] = {  # the mesh's degree of expert parallelism, or one of each layer's own
    1: [{"mesh_ep": 1}],
    2: [{"mesh_ep": 1}, {"mesh_ep": 2}],
    3: [{"mesh_ep": 1}, {"mesh_ep": 3}],
    4: [{"mesh_ep": 2}, {"mesh_ep": 4}, {"ep": (2, 4)}],
}


def works_on(size: int) -> tuple[Work, ...]:
    """All kinds of work on one and two ranks, two of them on more."""
    return WORKS[:2] if size > 2 else WORKS


def grid(size: int) -> list[Cell]:
    """Every placement and stage."""
    return [
        Cell(work=work, stage=stage, **place)
        for work, place, stage in itertools.product(works_on(size), PLACES[size], range(4))
    ]


def report(world: Worlds, size: int, cells: Sequence[Cell], folder: Path) -> None:
    """Fail with each cell that is off, and how far."""
    for work in {cell.work for cell in cells}:
        torch.save(alone(work, size), folder / work.file)
    found = world(size).run(CASES, "train", list(cells), folder, timeout=600)
    wrong = [
        f"rank {rank}, {cell}: {distances}"
        for rank, results in enumerate(found)
        for cell, distances in zip(cells, results, strict=True)
        if not all(distances[name] < limit for name, limit in LIMITS[cell.work.dtype].items())
    ]
    assert not wrong, "\n".join(wrong)


def test_the_grid_has_a_hundred_cells() -> None:
    assert sum(len(grid(size)) for size in PLACES) >= 100


@pytest.mark.parametrize(
    ("size", "number"), [(size, number) for size in PLACES for number in range(len(works_on(size)))]
)
def test_placement_never_changes_the_maths(world: Worlds, size: int, number: int, tmp_path: Path) -> None:
    report(world, size, [cell for cell in grid(size) if cell.work == works_on(size)[number]], tmp_path)


@pytest.mark.parametrize("size", [2, 4])
def test_nor_in_single_precision(world: Worlds, size: int, tmp_path: Path) -> None:
    works = [replace(work, dtype="float32") for work in (Work(), *works_on(size))]
    cells = [Cell(work=work, mesh_ep=2, stage=3) for work in works]
    report(world, size, [*cells, Cell(work=works[0], mesh_ep=2, stage=0)], tmp_path)


def test_nor_do_nodes_nor_who_is_dropped_on_four_ranks(world: Worlds, tmp_path: Path) -> None:
    score, drawn = WORKS[2], replace(WORKS[3], experts=(4, 5))
    cells = [Cell(work=work, mesh_ep=4, node=2, stage=stage) for work, stage in zip(WORKS[:2], (0, 3), strict=True)]
    cells += [Cell(work=score, ep=(2, 4), node=2, stage=2), Cell(work=drawn, mesh_ep=4, node=4, stage=1)]
    cells += [Cell(work=work, mesh_ep=ep, stage=stage) for work in (score, drawn) for ep, stage in ((2, 1), (4, 3))]
    report(world, 4, cells, tmp_path)


def test_nor_with_accumulation_sums_adam_and_hybrid_shards(world: Worlds, tmp_path: Path) -> None:
    several = Work(accumulation=3, steps=5)
    cells = [Cell(work=several, mesh_ep=2, stage=stage, no_sync=alone) for stage in range(4) for alone in (False, True)]
    cells += [Cell(work=replace(several, average=False), mesh_ep=2, stage=stage) for stage in (0, 3)]
    cells += [Cell(work=Work(optimizer="adamw", steps=10), mesh_ep=2, stage=stage) for stage in (1, 3)]
    cells += [Cell(work=Work(steps=5), ep=(2, 1), stage=stage, shard_size=2, bucket_bytes=1024) for stage in (2, 3)]
    report(world, 4, cells, tmp_path)


@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize(("size", "units"), [(2, "auto"), (2, "all"), (4, "auto")])
def test_a_thousand_adversarial_routings_at_stage_3_never_hang(world: Worlds, size: int, units: str, part: int) -> None:
    """In parts, so that a limit against hanging can be short beside what a slow machine needs for all of them."""
    found = world(size).run("tests.moe.routing_cases", "adversarial", 200, part, units, timeout=600)
    for one in found:
        assert one["routings"] >= 200
        assert one["sums"] == found[0]["sums"]
        assert all(math.isfinite(value) for value in one["sums"].values())
        assert units == "all" or one["detours"] == 0  # what is gathered does not depend on who uses which expert
