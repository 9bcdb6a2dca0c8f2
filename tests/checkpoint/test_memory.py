"""Peak memory: saving takes nothing but a block, loading a block and what is new; each rank reads its own ranges."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.checkpoint.ranks import Cut, all_ok, on_ranks
from tests.checkpoint.test_damage import peak_rss_growth
from trivium import checkpoint
from trivium.checkpoint.shard_file import BLOCK_BYTES

NUM = 10 << 20
MARGIN = 16 << 20


class Wide(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(NUM, dtype=dtype))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_saving_and_loading_hold_a_block_at_a_time(tmp_path: Path) -> None:
    model, other, half = Wide(), Wide(), Wide(torch.bfloat16)
    assert peak_rss_growth(lambda: checkpoint.save(tmp_path / "c", model=model)) < MARGIN
    assert peak_rss_growth(lambda: checkpoint.load(tmp_path / "c", model=other)) < MARGIN
    assert peak_rss_growth(lambda: checkpoint.load(tmp_path / "c", model=half)) < MARGIN
    assert peak_rss_growth(lambda: checkpoint.save_hugging_face(model, tmp_path / "hf")) < MARGIN
    assert peak_rss_growth(lambda: checkpoint.load_hugging_face(other, tmp_path / "hf")) < MARGIN


def test_ranks_read_each_range_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "c", model=Wide())
    read, real = [0], os.preadv

    def counted(file: int, buffers: Sequence[Any], offset: int) -> int:
        found = real(file, buffers, offset)
        read[0] += found
        return found

    cuts = {"weight": [0, NUM // 4 + 1, NUM // 2 + 1, 3 * NUM // 4 + 1, NUM]}
    made = all_ok(on_ranks(4, lambda peers: Cut(Wide(), peers.rank, cuts, None)))
    monkeypatch.setattr(os, "preadv", counted)
    all_ok(on_ranks(4, lambda peers: checkpoint.load(tmp_path / "c", model=made[peers.rank].model, mesh=peers)))
    assert 4 * NUM <= read[0] < 4 * NUM + 4 * BLOCK_BYTES
