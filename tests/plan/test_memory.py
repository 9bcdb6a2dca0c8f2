"""The plan's bytes are the paper's formulas, padding aside."""

from __future__ import annotations

import time

import pytest
import torch

from trivium.base.errors import ConfigError
from trivium.models import DecoderConfig, build, preset
from trivium.plan import Batch, Setting, forecast, inventory_of, take
from trivium.plan.activations import saved_block_bytes, saved_rest_bytes
from trivium.plan.inventory import cut
from trivium.plan.paper import FULL, MIXED, state_bytes
from trivium.zero import ZeroConfig

SMALL = DecoderConfig(vocabulary=512, dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=176)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("dtype", "widths"), [(torch.float32, FULL), (torch.bfloat16, MIXED)])
def test_states_are_the_formula(stage: int, dtype: torch.dtype, widths: tuple[int, int, int]) -> None:
    config = preset("34m")
    for ranks in (1, 2, 4, 64):
        setting = Setting(ranks=ranks, dtype=dtype, zero=ZeroConfig(stage=stage))
        found = forecast(inventory_of(config, dtype), setting).memory.states
        assert found == pytest.approx(state_bytes(config.num_parameters(), ranks, stage, widths), rel=1e-3)


def test_the_paper_s_famous_figures() -> None:
    inventory = inventory_of(preset("7.5b"), torch.bfloat16)
    plans = [
        forecast(inventory, Setting(ranks=64, dtype=torch.bfloat16, zero=ZeroConfig(stage=stage))) for stage in range(4)
    ]
    assert [f"{plan.memory.states / 1e9:.3g}" for plan in plans] == ["120", "31.4", "16.6", "1.88"]
    assert [round(plan.volume, 2) for plan in plans] == [2.0, 2.0, 2.0, 2.98]


def test_rank_0_of_1024_holds_one_1024th_of_a_trillion() -> None:
    started = time.process_time()
    inventory = inventory_of(preset("1t"), torch.bfloat16)
    plan = forecast(inventory, Setting(ranks=1024, dtype=torch.bfloat16), preset("1t"))
    assert f"{plan.memory.states / 1e9:.3g}" == "15.6"
    assert plan.memory.states == pytest.approx(16 * inventory.num_parameters / 1024, rel=1e-3)
    assert time.process_time() - started < 15


def test_every_element_has_one_owner() -> None:
    for ranks in (1, 2, 3, 7):
        units = cut(inventory_of(SMALL), ZeroConfig(), {"dp": ranks})
        held = sum(
            flat.held_numel(rank, sharded=True) for unit in units for flat in unit.flats for rank in range(ranks)
        )
        assert held == SMALL.num_parameters()


def test_buffers_are_at_most_twice_the_bucket_at_any_vocabulary() -> None:
    for vocabulary in (512, 50_000, 500_000):
        config = DecoderConfig(vocabulary=vocabulary, dim=256, layers=1, heads=4, ffn_dim=512)
        plan = forecast(inventory_of(config), Setting(ranks=8, zero=ZeroConfig(bucket_bytes=2**20)))
        assert 0 < plan.memory.buffers <= 2**21


def test_at_most_two_units_are_gathered_beside_those_that_stay() -> None:
    config = preset("34m")
    plan = forecast(inventory_of(config), Setting(ranks=2))
    block, table = config.num_block_parameters(), config.vocabulary * config.dim
    assert plan.memory.gathered == pytest.approx(4 * (table + max(2 * block, block + table)), rel=0.01)
    kept = forecast(inventory_of(config), Setting(ranks=2, zero=ZeroConfig(keep_gathered=True)))
    assert kept.memory.gathered == pytest.approx(4 * config.num_parameters(), rel=0.001)
    assert kept.volume == pytest.approx(2.0, rel=0.001)


def test_sums_are_held_only_while_several_micro_batches_are_averaged() -> None:
    inventory = inventory_of(SMALL)
    for ranks, accumulation, average, stage, held in (
        (2, 1, True, 3, False),
        (2, 2, True, 3, True),
        (2, 2, False, 3, False),
        (2, 2, False, 1, True),
        (3, 1, True, 3, True),
        (3, 1, False, 3, False),
        (4, 1, True, 3, False),
    ):
        zero = ZeroConfig(stage=stage, average=average)
        plan = forecast(inventory, Setting(ranks=ranks, accumulation=accumulation, zero=zero))
        assert (plan.memory.sums > 0) == held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [False, True])
def test_saved_activations_are_what_autograd_saves(dtype: torch.dtype, documents: bool) -> None:
    batch = Batch(rows=2, sequence=128, documents=documents)
    one, two = (_saved(layers, dtype, batch) for layers in (1, 2))
    assert two - one == saved_block_bytes(SMALL, batch, dtype)
    rest = one - (two - one)
    assert saved_rest_bytes(SMALL, batch, dtype) == pytest.approx(rest, rel=0.15)


def _saved(layers: int, dtype: torch.dtype, batch: Batch) -> int:
    """Bytes of the distinct tensors that a forward leaves for backward, parameters aside."""
    config = DecoderConfig(vocabulary=512, dim=64, layers=layers, heads=4, kv_heads=2, ffn_dim=176)
    model = build(config, dtype=dtype, seed=0)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            kept[pointer] = tensor
        return tensor

    tokens = torch.randint(0, 512, (batch.rows, batch.sequence))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens, documents_BT=torch.zeros_like(tokens) if batch.documents else None)
    mask = batch.rows * batch.sequence**2
    shared = [tensor for tensor in kept.values() if tensor.dtype != torch.bool or tensor.numel() != mask]
    return sum(tensor.untyped_storage().nbytes() for tensor in shared)


def test_tied_weights_count_once_and_wait_in_backward() -> None:
    tied = DecoderConfig(vocabulary=2048, dim=64, layers=2, heads=4, ffn_dim=176, tied=True)
    inventory = take(build(tied, device="meta"))
    assert inventory.num_parameters == tied.num_parameters()
    plan = forecast(inventory, Setting(ranks=2), tied)
    assert plan.memory.local_gradients >= 4 * (2048 * 64 + tied.num_block_parameters())


def test_what_cannot_be_is_refused() -> None:
    inventory = inventory_of(SMALL)
    with pytest.raises(ConfigError, match="ranks=0: expected at least 1"):
        Setting(ranks=0)
    with pytest.raises(ConfigError, match="rank=2: expected 0 to 1"):
        Setting(ranks=2, rank=2)
    with pytest.raises(ConfigError, match="sequence=0"):
        Batch(sequence=0)
    with pytest.raises(ConfigError, match="shard_size=3: 8 ranks cannot be cut"):
        forecast(inventory, Setting(ranks=8, zero=ZeroConfig(shard_size=3)))
    with pytest.raises(ConfigError, match=r"zero\.stage=4: expected 0 to 3"):
        Setting().at_stage(4)
