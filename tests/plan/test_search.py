"""What fits, and the way to something that does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trivium.models import preset
from trivium.plan import Batch, Setting, forecast, inventory_of
from trivium.plan.hardware import host_memory_bytes, this_machine
from trivium.plan.search import largest_preset, options
from trivium.zero import ZeroConfig

GB = 10**9


def test_nothing_is_offered_to_what_fits() -> None:
    config = preset("1m")
    assert options(inventory_of(config), Setting(ranks=2), 10 * GB, config) == []


def test_each_option_fits_and_the_smallest_change_comes_first() -> None:
    config = preset("1.3b")
    setting = Setting(ranks=8, zero=ZeroConfig(stage=0), dtype=torch.bfloat16, batch=Batch(rows=4))
    inventory = inventory_of(config, torch.bfloat16)
    found = options(inventory, setting, 30 * GB, config)
    assert [option.change for option in found][:1] == ["stage 3"] or len(found) == 3
    assert len(found) == 3
    assert all(option.plan.memory.total <= 30 * GB for option in found)
    assert len({option.change for option in found}) == 3


def test_more_ranks_when_no_stage_is_enough() -> None:
    config = preset("13b")
    setting = Setting(ranks=2, dtype=torch.bfloat16)
    found = options(inventory_of(config, torch.bfloat16), setting, 16 * GB, config)
    assert len(found) == 3
    assert all(option.plan.setting.ranks > 2 and "ranks" in option.change for option in found)
    assert all(option.plan.memory.total <= 16 * GB for option in found)


def test_the_global_batch_survives_a_smaller_micro_batch() -> None:
    config = preset("34m")
    setting = Setting(batch=Batch(rows=12, sequence=512))
    inventory = inventory_of(config)
    limit = forecast(inventory, setting, config).memory.total * 6 // 10
    found = [o for o in options(inventory, setting, limit, config, count=9) if o.change.startswith("micro-batch")]
    assert found
    for option in found:
        assert option.plan.setting.batch.rows * option.plan.setting.accumulation == 12


def test_nothing_fits_into_nothing() -> None:
    config = preset("1m")
    assert options(inventory_of(config), Setting(), 1000, config) == []
    assert largest_preset(Setting(), 1000) is None


def test_the_largest_preset_fits_and_the_next_does_not() -> None:
    setting = Setting(ranks=8, dtype=torch.bfloat16)
    found = largest_preset(setting, 40 * GB)
    assert found is not None
    name, plan = found
    assert name == "7.5b"
    assert plan.memory.total <= 40 * GB
    larger = forecast(inventory_of(preset("13b"), torch.bfloat16), setting, preset("13b"))
    assert larger.memory.total > 40 * GB
    assert largest_preset(replace(setting, ranks=1), GB) is not None


def test_this_machine_is_shared_by_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one, four = this_machine(), this_machine(4)
    assert one.memory_bytes == host_memory_bytes() > 2**28
    assert four.memory_bytes == one.memory_bytes // 4
    assert "4 ranks" in four.source
