"""Plan = reality with experts: what each rank holds and sends at any degree, and what the paper's models would take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.plan import moe_cases
from tests.worlds import Worlds
from trivium.base.errors import ConfigError
from trivium.dist.exchange import ExchangeConfig
from trivium.models import DecoderConfig, MoEConfig, preset
from trivium.plan import Batch, Setting, forecast, inventory_of
from trivium.zero import ZeroConfig

CELLS: list[tuple[int, Any, torch.dtype, dict[str, Any]]] = [
    *((2, 2, torch.float32, {"stage": stage, "bucket_bytes": 4096}) for stage in range(4)),
    (2, 1, torch.float32, {"stage": 3}),
    (2, 2, torch.bfloat16, {"stage": 3}),
    (2, (2, 1), torch.float32, {"stage": 2}),
    (4, 2, torch.float32, {"stage": 3}),
    (4, (4, 2), torch.float32, {"stage": 1}),
    (3, 3, torch.float32, {"stage": 3}),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_ranks_hold_and_send_what_was_forecast(world: Worlds, cell: Any) -> None:
    ranks, *rest = cell
    for result in world(ranks).run(moe_cases.compare, *rest):
        check(result, apart=rest[0] != 1)


def test_recomputation_sends_rows_again(world: Worlds) -> None:
    for result in world(2).run(moe_cases.compare, 2, torch.float32, {"stage": 3}, True):
        check(result, apart=True, again=2)


@pytest.mark.parametrize(
    ("exchange", "ways"),
    [
        (ExchangeConfig(kind="hierarchical", node=2), 2),
        (ExchangeConfig(kind="hierarchical"), 1),
        (ExchangeConfig(node=2, crossover_bytes=10**9), 2),
        (ExchangeConfig(node=2, crossover_bytes=0), 1),
        (ExchangeConfig(), 1),
    ],
    ids=["nodes", "one node", "short", "long", "auto"],
)
def test_every_exchange_sends_what_was_forecast(world: Worlds, exchange: ExchangeConfig, ways: int) -> None:
    """``ways``: how many exchanges a row takes, on four ranks."""
    moe = replace(moe_cases.MOE, exchange=exchange)
    decoder = replace(moe_cases.DECODER, moe=moe)
    for result in world(4).run(moe_cases.compare, 4, torch.float32, {"stage": 1}, False, decoder):
        assert result["calls"] == result["even_calls"] and result["calls"][1] == 2 * ways  # two layers
        exchanged, even = result["exchanged"], result["even"]
        assert exchanged["dispatch.counts"] == even["dispatch.counts"] > 0
        for phase in moe_cases.EXCHANGED[1:]:
            assert exchanged[phase] == pytest.approx(even[phase], rel=0.5), phase
        rows = 2 * 2 * 16 * moe.top_k * decoder.dim * 4
        assert even["dispatch"] == rows * (0.75 if ways == 1 else 0.5 + 0.5)


def check(result: dict[str, Any], *, apart: bool, again: int = 1) -> None:
    assert result["parameters"] == moe_cases.DECODER.num_parameters()
    assert result["sent"] == result["forecast"]
    assert result["states"][0] == result["states"][1]
    held, memory = result["held"], result["memory"]
    held["gradients"] = result["peak"].get("gradients", 0)  # sharded ones are given back by zero_grad
    for label in ("parameters", "gradients", "optimizer", "buffers", "sums"):
        assert held.get(label, 0) == memory[label], label
    assert result["peak"].get("gathered", 0) <= memory["gathered"]
    exchanged, even = result["exchanged"], result["even"]
    if not apart:
        assert not any(exchanged.values()) and not any(even.values())
        return
    assert result["calls"] == result["even_calls"]
    assert exchanged["dispatch.counts"] == even["dispatch.counts"] > 0
    assert exchanged["dispatch"] == again * result["row_bytes"] == exchanged["combine.backward"] * again
    for phase in ("dispatch", "combine", "dispatch.backward", "combine.backward"):
        assert exchanged[phase] == pytest.approx(even[phase], rel=0.5)


WIDE = DecoderConfig(
    vocabulary=2048, dim=128, layers=4, heads=4, ffn_dim=352, moe=MoEConfig(experts=4, ffn_dim=176, residual="add")
)


@pytest.mark.parametrize(
    ("config", "ep", "stage", "batch"),
    [
        (WIDE, 1, 0, Batch(rows=4, sequence=128)),
        (WIDE, 2, 3, Batch(rows=4, sequence=128)),
        (WIDE, 2, 3, Batch(rows=4, sequence=128, recompute=True)),
        (replace(WIDE, moe=MoEConfig(experts=4, top_k=2, expert="gelu")), 1, 3, Batch(rows=4, sequence=128)),
    ],
    ids=["one", "apart", "recompute", "gelu"],
)
def test_the_whole_peak_is_within_ten_percent(
    world: Worlds, config: DecoderConfig, ep: int, stage: int, batch: Batch
) -> None:
    for measured, planned in world(2).run(moe_cases.live_peak, config, ep, stage, batch):
        assert measured == pytest.approx(planned, rel=0.10)


def test_experts_are_spread_over_ep_and_their_states_over_edp() -> None:
    config = preset("pr-moe-350m-32/64")
    routed = config.num_expert_parameters()
    rest = config.num_parameters() - routed
    for ranks, ep, stage in ((64, 32, 1), (64, 32, 3), (128, 32, 0), (32, 32, 3)):
        setting = Setting(ranks=ranks, ep=ep, dtype=torch.bfloat16, zero=ZeroConfig(stage=stage))
        found = forecast(inventory_of(config, torch.bfloat16, ep=ep), setting, config).memory
        sharded = ranks if stage == 3 else 1
        assert found.parameters == pytest.approx(
            2 * rest / sharded + 2 * routed / (ranks if stage == 3 else ep), rel=1e-2
        )
        cut = ranks if stage else 1
        assert found.optimizer == pytest.approx(12 * rest / cut + 12 * routed / (ranks if stage else ep), rel=1e-2)


def test_the_papers_128_ranks_hold_one_expert_of_each_layer() -> None:
    """Layers of 32, 64 and 128 experts on 128 ranks: expert parallelism as wide as each layer has experts."""
    config = replace(preset("moe-350m-128"), layers=6, moe=MoEConfig(experts=(32, 64, 128), layers=(1, 3, 5)))
    degrees = (32, 64, 128)
    whole = config.num_attention_parameters()
    assert whole
    for rank in (0, 77, 127):
        inventory = inventory_of(config, ep=degrees, rank=rank)
        held = [name for name in inventory.numels if ".experts." in name and ".up." in name]
        assert held == [
            f"blocks.{layer}.moe.experts.{rank % degree}.up.weight"
            for layer, degree in zip((1, 3, 5), degrees, strict=True)
        ]
        plan = forecast(inventory, Setting(ranks=128, ep=degrees, rank=rank, zero=ZeroConfig(stage=1)), config)
        assert plan.num_parameters == config.num_parameters()


def test_degrees_that_do_not_fit_are_refused() -> None:
    config = moe_cases.DECODER
    with pytest.raises(ConfigError, match="ep=3 does not divide 4 ranks"):
        forecast(inventory_of(config, ep=3), Setting(ranks=4, ep=3), config)
    with pytest.raises(ConfigError, match="ep=8 for 4 experts"):
        inventory_of(config, ep=8)
    with pytest.raises(ConfigError, match="the inventory was taken for ep=1, the setting has ep=2"):
        forecast(inventory_of(config), Setting(ranks=2, ep=2), config)
