"""The rivals of ``trivium bench moe`` compute the same; its numbers are made of what was measured."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

from trivium.base.errors import ConfigError
from trivium.bench.moe import MoEBench, lines
from trivium.bench.moe_layers import Rivals, Shape

SHAPE = Shape(experts=8, top_k=2, dim=16, ffn_dim=12, tokens=50)


@pytest.mark.parametrize("name", ["grouped", "eager"])
def test_rivals_layers_are_ours(name: str) -> None:
    rivals = Rivals(SHAPE)
    ours, theirs = rivals.step(rivals.layer("trivium")), rivals.step(rivals.layer(name))
    assert ours.norm() > 0 and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 * float(ours.abs().max()))


def test_a_skewed_router_fills_the_first_experts() -> None:
    rivals = Rivals(replace(SHAPE, skew=2.0))
    load = rivals.load()
    assert sum(load) == 100 and load[0] > 30 > 12 > load[-1]
    ours, theirs = rivals.step(rivals.layer("trivium")), rivals.step(rivals.layer("grouped"))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 * float(ours.abs().max()))
    assert max(Rivals(SHAPE).load()) < 30


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.filterwarnings("ignore")
def test_deepspeeds_drop_free_layer_is_ours() -> None:
    rivals = Rivals(SHAPE)
    ours, theirs = rivals.step(rivals.layer("trivium")), rivals.step(rivals.layer("deepspeed"))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 * float(ours.abs().max()))


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_the_einsum_baseline_moves_what_the_table_moves(top_k: int, factor: float) -> None:
    rivals = Rivals(Shape(experts=8, top_k=top_k, dim=16, ffn_dim=1, tokens=50))
    table, einsum = (rivals.mover(name, factor)(rivals.x_TC) for name in ("trivium", "einsum"))
    assert torch.allclose(table, einsum, rtol=1e-5, atol=1e-6)
    assert (table.abs().sum(1) == 0).any() == (factor < 1)


def test_bytes_of_a_step_are_the_formula(world: Any) -> None:
    found = world(2).run("tests.bench.moe_cases", "training")
    assert sum(one[0] for one in found) == sum(one[1] for one in found) > 0
    for _, _, step_s, exchange_s in found:
        assert len(step_s) == 2 and all(0 < inside < whole for inside, whole in zip(exchange_s, step_s, strict=True))


def test_products_flops_and_settings() -> None:
    assert SHAPE.flops == 18 * 50 * 2 * 16 * 12
    Rivals(SHAPE).products()()
    for options, words in (
        ({"parts": ("layers",)}, "part 'layers'"),
        ({"rounds": 0}, "rounds=0"),
        ({"clock": "cpu"}, "use threads=1"),
    ):
        with pytest.raises(ConfigError, match=words):
            MoEBench(**options)  # type: ignore[arg-type]


def test_lines_say_what_was_met() -> None:
    turn = {"step_s": {"median": 0.1}, "ratio": {"median": 1.3, "least": 1.2, "greatest": 1.5}}
    shape = {"experts": 8, "top_k": 2, "dim": 16, "ffn_dim": 12, "tokens": 50}
    targets = [{"what": "layer", "of": "grouped ÷ trivium", "value": 1.3, "at_least": 1.2, "met": True}]
    report = {"layer": [{"shape": shape, "contestants": {"grouped": turn}, "products_share": 0.8}], "targets": targets}
    said = lines(report)
    assert said[0].endswith("products are 80% of ours") and "1.30 × ours (1.20 to 1.50)" in said[1]
    assert said[2] == "met    layer: grouped ÷ trivium 1.30, target at least 1.2"
