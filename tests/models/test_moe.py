"""A decoder with experts: its arithmetic, its losses, its record, and recomputation that replays the routing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from trivium.base import config as configs
from trivium.base.errors import ConfigError
from trivium.models import PRESETS, DecoderConfig, MoEBlock, MoEConfig, Record, build
from trivium.moe import CapacityConfig

MOE = MoEConfig(experts=4, top_k=2, ffn_dim=12)
SMALL = DecoderConfig(vocabulary=61, dim=24, layers=4, heads=4, ffn_dim=40, init_std=0.2, moe=MOE)
PAPER = {
    "moe-350m-128": 13.15e9,
    "moe-1.3b-128": 52.47e9,
    "pr-moe-350m-32/64": 4.12e9,
    "pr-moe-1.3b-64/128": 31.39e9,
    "mos-350m-32/64": 3.54e9,
    "mos-1.3b-64/128": 26.94e9,
    "moe-2.4b-128": 107.1e9,
    "moe-8b-128": 349e9,
    "moe-24b-128": 1047e9,
    "moe-47b-128": 2024e9,
}


def shape(**moe: Any) -> DecoderConfig:
    return dataclasses.replace(SMALL, moe=dataclasses.replace(MOE, **moe))


def tokens(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(0, SMALL.vocabulary, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_the_papers_sizes_and_the_counts_of_their_meta_builds(name: str) -> None:
    config = PRESETS[name]
    assert config.num_parameters() == sum(parameter.numel() for parameter in build(config, "meta").parameters())
    assert config.num_parameters() == pytest.approx(PAPER[name], rel=0.0025)


def test_every_preset_with_experts_is_one_of_the_papers() -> None:
    assert set(PAPER) == {name for name, config in PRESETS.items() if config.moe is not None}


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"top_k": 1, "residual": "add"},
        {"residual": "mix"},
        {"top_k": 1, "shared": 2},
        {"expert": "gelu", "residual": "add"},
        {"experts": (3, 5), "layers": (0, 3)},
        {"expert": "gelu", "shared": 3},
        {"ffn_dim": None},
    ],
)
def test_parameters_and_flops_are_what_torch_counts(moe: dict[str, Any]) -> None:
    config = shape(**moe)
    model = build(config, seed=0)
    counts = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
    assert counts == [config.num_block_parameters(layer) for layer in range(4)]
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert config.num_expert_parameters() == routed
    idle = config.num_parameters() - config.num_activated_parameters()
    one = routed // sum(config.num_experts)
    assert idle == sum(experts - config.moe.top_k for experts in config.num_experts if experts) * one
    assert config.num_activated_parameters() < config.num_parameters()

    def attend(q, k, v, *, layer):  # written out, so that the counter sees plain products
        return (q @ k.mT).softmax(-1) @ v

    ids = tokens(3, 7)

    def in_place(self_shape, a_shape, b_shape, *rest, **more):  # torch counts addmm, but not this form of it
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        loss = model(ids, ids, attend=attend)
        loss.backward()
    assert counter.get_total_flops() == 21 * config.flops_per_token(7)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"experts": 0}, "moe.experts=0: expected a whole number of at least 1"),
        ({"experts": (4, 0)}, "moe.experts=0"),
        ({"experts": ()}, r"moe.experts=\[\]"),
        ({"experts": (4, 4, 4)}, r"moe.experts lists 3 layers, but 2 of 4 have experts \(1, 3\)"),
        ({"top_k": 5}, "moe.top_k=5: expected 1 to moe.experts=4"),
        ({"layers": (1, 4)}, r"moe.layers=\[1, 4\]: expected .* from 0 to 3"),
        ({"layers": (2, 1)}, "in ascending order"),
        ({"layers": ()}, "no layer has experts"),
        ({"residual": "sum"}, "moe.residual='sum': expected 'none' or 'add' or 'mix'"),
        ({"shared": 1, "residual": "add"}, "leave one out"),
        ({"shared": -1}, "moe.shared=-1"),
        ({"balance_weight": -0.1}, "moe.balance_weight=-0.1"),
        ({"ffn_dim": 0}, "moe.ffn_dim=0"),
    ],
)
def test_what_does_not_fit_is_refused(moe: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape(**moe)


def test_one_layer_has_no_second() -> None:
    with pytest.raises(ConfigError, match="no layer has experts: 1 layer"):
        dataclasses.replace(SMALL, layers=1)


def test_a_table_of_toml_describes_it() -> None:
    table = {
        "vocabulary": 61, "dim": 24, "layers": 4, "heads": 4, "ffn_dim": 40, "init_std": 0.2,
        "moe": {"experts": [2, 4], "residual": "add", "capacity": {"factor": 1.25}, "gate": {"score": "sigmoid"}},
    }  # fmt: skip
    config = configs.build(DecoderConfig, table)
    assert config.num_experts == (0, 2, 0, 4) and config.moe is not None
    assert config.moe.capacity == CapacityConfig(factor=1.25) and config.moe.gate.score == "sigmoid"
    assert configs.build(DecoderConfig, configs.to_dict(config)) == config


def test_auxiliary_losses_are_in_the_loss_of_training_alone() -> None:
    model, ids, record = build(SMALL, seed=0), tokens(), Record()
    targets = ids.clone()
    targets[0, :5] = -100
    loss = model(ids, targets, record=record)
    assert list(record.aux) == [1, 3] and record.cross_entropy is not None
    extra = record.aux[1].loss + record.aux[3].loss
    assert float(extra.detach()) > 0.015  # two layers, weight 0.01, and at least 1 where uneven
    assert torch.equal(loss, record.cross_entropy + extra)
    summed = model(ids, targets, reduction="sum")
    torch.testing.assert_close(summed, loss * 17)
    each = model(ids, targets, reduction="none")
    torch.testing.assert_close(each.sum() / 17, record.cross_entropy)
    assert [int(aux.load.sum()) for aux in record.aux.values()] == [44, 44]
    model.eval()
    assert torch.equal(model(ids, targets), record.cross_entropy)
    assert not list(model.buffers())


def test_gradients_reach_router_and_chosen_experts() -> None:
    model, ids = build(SMALL, seed=0), tokens()
    model(ids, ids).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None and ".experts." not in name]
    assert missing == []
    assert model.get_parameter("blocks.1.moe.gate.weight").grad.norm() > 0


def test_a_routing_is_replayed_and_recompute_changes_nothing() -> None:
    model, ids = build(shape(capacity=CapacityConfig(factor=0.5, minimum=1)), seed=0), tokens()
    record = Record()
    model(ids, ids, record=record).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    routed = {layer: aux.routing.detach() for layer, aux in record.aux.items()}
    other = Record()
    flipped = {1: dataclasses.replace(routed[1], experts_TK=routed[1].experts_TK.flip(1))}
    model(ids, ids, routings=flipped, record=other)
    assert torch.equal(other.aux[1].routing.experts_TK, flipped[1].experts_TK)
    model.zero_grad()

    def again(block: Any, *arguments: Any) -> Any:
        return checkpoint(block, *arguments, use_reentrant=False)

    model(ids, ids, routings=routed, run_block=again).backward()
    for name, gradient in plain.items():
        assert torch.equal(gradient, model.get_parameter(name).grad), name


def test_random_choices_need_and_follow_the_step() -> None:
    model, ids = build(shape(gate=dataclasses.replace(MOE.gate, jitter=0.5)), seed=0), tokens()
    with pytest.raises(ConfigError, match="needs step="):
        model(ids, ids)
    first, again, other = (float(model(ids, ids, step=step).detach()) for step in (3, 3, 4))
    assert first == again != other
    assert (
        float(build(shape(gate=dataclasses.replace(MOE.gate, jitter=0.5)), seed=0)(ids, ids, step=3).detach()) == first
    )


def test_degrees_of_layers_must_be_as_many_as_they() -> None:
    with pytest.raises(ConfigError, match=r"ep=\[1\]: expected one degree for each of 2 layers"):
        build(SMALL, "meta", ep=[1])
    assert isinstance(build(SMALL, "meta", ep=[1, 1]).blocks[3], MoEBlock)
