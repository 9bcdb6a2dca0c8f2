"""An MoE made of a dense model computes what the dense model does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trivium as tv
from tests.worlds import Worlds
from trivium.base.errors import CheckpointError, ConfigError
from trivium.models import DecoderConfig, MoEConfig, build
from trivium.moe import GateConfig, GELUExpert, MoE
from trivium.nn import MLP


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module | None, moe: MoE | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        if mlp is not None:
            self.mlp = mlp
        if moe is not None:
            self.moe = moe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + (self.mlp(y) if "mlp" in self._modules else self.moe(y)[0])


def dense(kind: str = "swiglu") -> nn.Sequential:
    torch.manual_seed(0)
    make = MLP if kind == "swiglu" else GELUExpert
    return nn.Sequential(*(Layer(make(8, 16, init_std=0.5), None) for _ in range(3)))


def sparse(kind: str = "swiglu", **options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    made = MLP(8, 16) if kind == "swiglu" else GELUExpert(8, 16)
    moes = [MoE(8, 16, experts, expert=kind, init_std=0.5, seed=3, **options) for experts in (4, 6)]  # type: ignore[arg-type]
    return nn.Sequential(Layer(made, None), *(Layer(None, moe) for moe in moes))


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2},
        {"top_k": 3, "gate": GateConfig(score="sigmoid", scale=2.5, bias_rate=0.01)},
        {"top_k": 1, "residual": True},
        {"top_k": 2, "residual": "add", "gate": GateConfig(renormalize=False)},
        {"top_k": 1, "residual": "mix"},
        {"top_k": 2, "residual": "mix"},
    ],
    ids=str,
)
def test_equal_to_the_dense_model_at_step_0(kind: str, options: dict[str, Any]) -> None:
    old, new = dense(kind), sparse(kind, **options)
    x = torch.randn(40, 8)
    assert (new(x) - old(x)).norm() > 0.1 * old(x).norm()
    routers = [new[n].moe.gate.weight.clone() for n in (1, 2)]
    assert tv.moe.upcycle(new, old.state_dict()) == ("1.moe", "2.moe")
    assert (new(x) - old(x)).norm() < 1e-6 * old(x).norm()
    assert all(torch.equal(new[n].moe.gate.weight, routers[n - 1]) for n in (1, 2))
    new(x).square().sum().backward()
    grads = {name: p.grad for name, p in new.named_parameters()}
    assert grads["1.moe.experts.0.down.weight"].abs().sum() > 0  # type: ignore[union-attr]


def test_experts_are_the_dense_mlp() -> None:
    old, new = dense(), sparse()
    tv.moe.upcycle(new, old)
    for number in range(6):
        expert = new[2].moe.experts.get_submodule(str(number))
        assert all(torch.equal(a, b) for a, b in zip(expert.parameters(), old[2].mlp.parameters(), strict=True))


def test_from_a_checkpoint(tmp_path: Path) -> None:
    old, new, too = dense(), sparse(), sparse()
    tv.checkpoint.save(tmp_path / "dense", model=old, extra={})
    tv.moe.upcycle(new, tmp_path / "dense")
    tv.moe.upcycle(too, old)
    assert all(torch.equal(value, too.state_dict()[name]) for name, value in new.state_dict().items())


@pytest.mark.parametrize(
    "moe",
    [MoEConfig(experts=4, top_k=2, shared=1), MoEConfig(experts=(4, 8), top_k=1, residual="add")],
    ids=["shared", "pyramid"],
)
def test_a_decoder_is_made_of_a_dense_ones_checkpoint(tmp_path: Path, moe: MoEConfig) -> None:
    shape = DecoderConfig(vocabulary=61, dim=24, layers=4, heads=4, ffn_dim=40, init_std=0.2)
    old, new = build(shape, seed=0), build(replace(shape, moe=moe), seed=1)
    tv.checkpoint.save(tmp_path / "dense", model=old, extra={})
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    assert (new(ids) - old(ids)).norm() > 0.1 * old(ids).norm()
    assert tv.moe.upcycle(new, tmp_path / "dense") == ("blocks.1.moe", "blocks.3.moe")
    assert (new(ids) - old(ids)).norm() < 1e-6 * old(ids).norm()


def test_experts_on_two_ranks_are_made_of_the_dense_mlp(world: Worlds) -> None:
    for far, held in world(2).run("tests.moe.cases", "upcycled"):
        assert far < 1e-12 and held == 4


def test_what_cannot_be_equal_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 1\.moe has top_k=1 and no residual"):
        tv.moe.upcycle(sparse(top_k=1), dense())
    with pytest.raises(ConfigError, match="does not renormalise"):
        tv.moe.upcycle(sparse(gate=GateConfig(renormalize=False)), dense())
    with pytest.raises(ConfigError, match="has no MoE layer"):
        tv.moe.upcycle(dense(), dense())


def test_what_does_not_fit_is_named_and_nothing_is_changed() -> None:
    state, new = dict(dense().state_dict()), sparse()
    before = {name: value.clone() for name, value in new.state_dict().items()}
    narrow = {**state, "2.mlp.down.weight": torch.zeros(8, 15)}
    with pytest.raises(CheckpointError, match=r"2\.moe\.experts\..\.down\.weight is \[8, 16\] .* \[8, 15\]"):
        tv.moe.upcycle(new, narrow)
    with pytest.raises(CheckpointError, match=r"0\.norm\.bias begins as 0\.norm\.bias, which the dense"):
        tv.moe.upcycle(new, {name: value for name, value in state.items() if name != "0.norm.bias"})
    with pytest.raises(CheckpointError, match="have no place in the MoE, the first head"):
        tv.moe.upcycle(new, {**state, "head": torch.zeros(1)})
    assert all(torch.equal(value, before[name]) for name, value in new.state_dict().items())
