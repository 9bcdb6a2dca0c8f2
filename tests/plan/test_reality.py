"""Plan = reality: forecast bytes on the wire and in memory are the ledger's and the meter's, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.plan import cases
from tests.worlds import Worlds
from trivium.models import DecoderConfig
from trivium.plan import Batch

BUCKET = 64 * 1024
CELLS: list[tuple[str, torch.dtype, dict[str, Any], int]] = [
    *(
        (name, dtype, {"stage": stage, "bucket_bytes": BUCKET}, 1)
        for stage in range(4)
        for name, dtype in (
            ("untied", torch.float32),
            ("tied", torch.float32),
            ("untied", torch.bfloat16),
            ("odd", torch.float32),
        )
    ),
    *(("untied", torch.float32, {"stage": stage, "average": False, "bucket_bytes": 4096}, 2) for stage in range(4)),
    *(("tied", torch.bfloat16, {"stage": stage, "gradient_dtype": "float32"}, 2) for stage in (0, 1, 3)),
    *(("untied", torch.float32, {"stage": stage, "shard_size": 1, "bucket_bytes": BUCKET}, 1) for stage in (1, 3)),
    ("untied", torch.float32, {"stage": 3, "keep_gathered": True}, 1),
    ("untied", torch.float32, {"stage": 3, "prefetch": 3}, 1),
    ("untied", torch.float32, {"stage": 3, "reduce": "native", "bucket_bytes": BUCKET}, 1),
]


def named(cell: tuple[str, torch.dtype, dict[str, Any], int]) -> str:
    name, dtype, options, accumulation = cell
    words = "-".join(f"{key}={value}" for key, value in options.items() if key != "bucket_bytes")
    return f"{name}-{str(dtype).removeprefix('torch.')}-{words}-{accumulation}"


@pytest.mark.parametrize("cell", CELLS, ids=named)
def test_two_ranks_hold_and_send_what_was_forecast(world: Worlds, cell: Any) -> None:
    for result in world(2).run(cases.compare, *cell):
        check(result)


@pytest.mark.parametrize("stage", range(4))
def test_no_sync_sends_once_and_holds_whole_gradients(world: Worlds, stage: int) -> None:
    cell = ("untied", torch.float32, {"stage": stage, "average": False, "bucket_bytes": BUCKET}, 3, True)
    for result in world(2).run(cases.compare, *cell):
        check(result)
        psi = cases.DECODER.num_parameters()
        assert result["memory"]["local_gradients"] == 4 * psi


@pytest.mark.parametrize("ranks", (1, 3))
def test_other_numbers_of_ranks(world: Worlds, ranks: int) -> None:
    for stage in (0, 2, 3):
        for result in world(ranks).run(
            cases.compare, "untied", torch.float32, {"stage": stage, "bucket_bytes": BUCKET}, 1
        ):
            check(result)


def test_hybrid_sharding_on_four_ranks(world: Worlds) -> None:
    for stage in (2, 3):
        options = {"stage": stage, "shard_size": 2, "bucket_bytes": BUCKET}
        for result in world(4).run(cases.compare, "untied", torch.bfloat16, options, 1):
            check(result)


@pytest.mark.parametrize(
    ("dtype", "stage", "batch"),
    [
        (torch.float32, 0, Batch(rows=2, sequence=128)),
        (torch.float32, 3, Batch(rows=2, sequence=128, documents=True)),
        (torch.float32, 3, Batch(rows=9, sequence=128)),
        (torch.float32, 2, Batch(rows=9, sequence=128, recompute=True)),
        (torch.bfloat16, 3, Batch(rows=2, sequence=128, recompute=True, documents=True)),
    ],
    ids=["plain", "documents", "chunked-head", "recompute", "bf16"],
)
def test_the_whole_peak_is_within_ten_percent(world: Worlds, dtype: torch.dtype, stage: int, batch: Batch) -> None:
    config = DecoderConfig(vocabulary=2048, dim=128, layers=4, heads=4, kv_heads=2, ffn_dim=352)
    for measured, planned in world(2).run(cases.live_peak, config, dtype, stage, batch):
        assert measured == pytest.approx(planned, rel=0.10)


def check(result: dict[str, Any]) -> None:
    assert result["sent"] == result["forecast"]
    assert result["payload"][0] == result["payload"][1]
    held, memory = result["held"], result["memory"]
    held["gradients"] = result["peak"].get("gradients", 0)  # sharded ones are given back by zero_grad
    for label in ("parameters", "gradients", "optimizer", "buffers", "sums"):
        assert held.get(label, 0) == memory[label], label
    assert held.get("gathered", 0) == 0
    assert result["peak"].get("gathered", 0) <= memory["gathered"]
    if memory["gathered"]:
        assert result["peak"]["gathered"] > memory["gathered"] / 2
