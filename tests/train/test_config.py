"""A run's configuration: what is refused, in one message, with the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.worlds import ROOT
from trivium.base import config as configs
from trivium.base.errors import ConfigError
from trivium.models import PRESETS
from trivium.train.build import decoder_of
from trivium.train.config import LoopConfig, ModelConfig, SummedZeroConfig, TrainConfig
from trivium.zero.placement import ZeroConfig

SMALL = {"dim": 32, "layers": 1, "heads": 2, "ffn_dim": 64}


def moe(**values: Any) -> dict[str, Any]:
    return {"model": {**SMALL, "layers": 4, "moe": {"experts": 4, **values}}}


def of(**values: Any) -> TrainConfig:
    return configs.build(TrainConfig, values)


def test_a_config_that_averages_gradients_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"zero\.average: the trainer sums gradients .* give SummedZeroConfig"):
        TrainConfig(zero=ZeroConfig(average=True))  # type: ignore[arg-type]
    assert not TrainConfig(zero=SummedZeroConfig(stage=2)).zero.average


def test_the_batch_says_how_often_gradients_accumulate() -> None:
    loop = LoopConfig(micro_batch=4, batch=32)
    assert [loop.accumulation_for(ranks) for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert LoopConfig(accumulation=3).accumulation_for(2) == 3 and LoopConfig().accumulation_for(2) == 1


def test_a_batch_that_cannot_be_dealt_out_is_told_with_its_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"train.batch=32 .* micro_batch=4 × 3 ranks = 12 .*nearest: 24 or 36"):
        LoopConfig(micro_batch=4, batch=32).accumulation_for(3)
    with pytest.raises(ConfigError, match=r"= 4 passes per\s+step, but train.accumulation=3"):
        LoopConfig(micro_batch=4, batch=32, accumulation=3).accumulation_for(2)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model": {"dim": 8}}, r"layers, heads, ffn_dim missing; give model.preset, model.from"),
        ({"model": {"from": "x", "dim": 8}}, r"model.from='x' and model.dim are both given"),
        ({"model": {"preset": "34mm"}}, r"did you mean '34m'"),
        ({"model": {"preset": "1m"}}, r"8192 entries .* the model only 2048: set data.vocabulary=2048"),
        ({"model": SMALL, "data": {"sequence": 4096}}, r"data.sequence=4096 .* max_positions=2048"),
        ({"model": SMALL, "train": {"steps": 5}, "schedule": {"warmup_steps": 6}}, r"warmup_steps=6 .* train.steps=5"),
        ({"model": SMALL, "checkpoint": {"keep_last": 1}}, r"keep_last=1: expected 2 or more"),
        ({"model": SMALL, "zero": {"stage": 4}}, r"zero.stage=4: expected 0 to 3"),
        ({"model": SMALL, "zero": {"average": True}}, r"unknown key 'zero.average'"),
        ({"model": SMALL, "data": {"seed": 1}}, r"unknown key 'data.seed'"),
        ({"model": SMALL, "train": {"step": 4}}, r"did you mean 'steps'"),
        ({"model": SMALL, "stage": 3}, r"it belongs in \[zero\]"),
        ({"model": SMALL, "train": {"on_nonfinite": "skp"}}, r"did you mean 'skip'"),
        ({"model": SMALL, "optimizer": {"lr": "auto"}}, r"optimizer.lr = 'auto': expected a finite number"),
        ({"model": SMALL, "optimizer": {"betas": [0.9]}}, r"a list of 2"),
        ({"model": SMALL, "train": {"batch": 9, "micro_batch": 2}}, r"nearest: 8 or 10"),
        ({"run": ""}, r"run is empty"),
        (moe(gate={"jitter": 1.0}), r"\[model.moe.gate\] gate.jitter=1.0"),
        (moe(gate={"score": "softmx"}), r"model.moe.gate.score = 'softmx'.* did you mean 'softmax'"),
        (
            moe(gate={"num_groups": 3, "top_groups": 1}),
            r"\[model.moe\] gate.num_groups=3: expected a divisor",
        ),
        (moe(experts=[4, 6], gate={"num_groups": 4, "top_groups": 1}), r"gate.num_groups=4.* num_experts=6"),
        (moe(gate={"renormalize": True}), r"\[model.moe\] gate.renormalize=true with top_k=1"),
        (moe(gate={"sample_second": True}), r"gate.sample_second=true with top_k=1"),
        (moe(exchange={"kind": "flatt"}), r"model.moe.exchange.kind = 'flatt'.* did you mean 'flat'"),
        (moe(gate={"init_std": -1.0}), r"\[model.moe.gate\] gate.init_std=-1.0"),
        (moe(exchange={"node": 0}), r"\[model.moe.exchange\] exchange.node=0"),
    ],
)
def test_what_cannot_be_run_is_refused_in_words(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){told}"):
        of(**values)


def test_hybrid_groups_must_divide_the_ranks() -> None:
    config = of(model=SMALL, zero={"shard_size": 3})
    config.check_ranks(6)
    with pytest.raises(ConfigError, match=r"zero.shard_size=3 does not divide 4 ranks .* expected one of 1, 2, 4"):
        config.check_ranks(4)


def test_hybrid_groups_must_divide_the_ranks_that_hold_the_same_experts_too() -> None:
    table = moe(experts=4)
    config = of(**table, mesh={"ep": 2}, zero={"shard_size": 2})
    config.check_ranks(4)
    config.check_ranks(2)
    with pytest.raises(ConfigError, match=r"shard_size=2 does not divide 3 ranks that hold .*6 ranks, mesh.ep=2.*1, 3"):
        config.check_ranks(6)
    with pytest.raises(ConfigError, match=r"mesh.ep=4"):
        of(**moe(experts=4, layers=[0, 1]), mesh={"ep": [1, 4]}, zero={"shard_size": 2}).check_ranks(12)


@pytest.mark.parametrize(
    ("exchange", "degree", "words"),
    [
        ({"kind": "coordinated"}, 2, "needs a tensor axis"),
        ({"kind": "hierarchical", "node": 3}, 4, "exchange.node=3 does not divide the 4 ranks"),
        ({"kind": "auto", "node": 3, "crossover_bytes": 4096}, 4, "exchange.node=3 does not divide the 4 ranks"),
    ],
)
def test_exchanges_that_cannot_be_had_are_refused(exchange: dict[str, Any], degree: int, words: str) -> None:
    table = moe(experts=4, exchange=exchange)
    of(**table).check_ranks(4)
    with pytest.raises(ConfigError, match=words):
        of(**table, mesh={"ep": degree}).check_ranks(4)


def test_a_preset_can_be_changed_in_single_values() -> None:
    model = ModelConfig(preset="34m", layers=2, tied=True)
    assert model.decoder(8192).layers == 2 and model.decoder(8192).dim == PRESETS["34m"].dim
    assert ModelConfig(**SMALL).decoder(777).vocabulary == 777


def test_a_config_survives_a_round_trip() -> None:
    config = of(model=SMALL, data={"sequence": 64}, tasks={"names": ["max"]}, zero={"stage": 1})
    assert configs.build(TrainConfig, configs.to_dict(config)) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_the_configurations_that_ship_can_be_read_and_run_on_two_ranks(path: Path) -> None:
    config = configs.load(TrainConfig, path)
    config.check_ranks(2)
    assert decoder_of(config, config.data.vocabulary).num_parameters() > 0


def test_keys_of_data_beside_tasks_are_named() -> None:
    text = {"sequence": 32, "paths": ["/no/such"], "vocabulary": 999}
    assert of(model=SMALL, data=text, tasks={}).unused == ["data.paths", "data.vocabulary"]
    assert of(model=SMALL, data=text).unused == [] == of(model=SMALL, data={"sequence": 32}, tasks={}).unused
