"""The MoE layers that take part: ours, transformers', DeepSpeed's, the paper's baseline, and bare matrix products.

DeepSpeed-MoE section 5.4. T tokens, C model width, F inner width, E experts, K choices.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trivium.base.errors import ConfigError
from trivium.moe import CapacityConfig, Gate, MoE
from trivium.moe.capacity import capacity, keep
from trivium.moe.dispatch import Combine, Scatter, table
from trivium.moe.routing import Routing
from trivium.nn import MLP

INIT_STD = 0.05


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one layer and its batch. ``skew``: the router favours experts by Zipf's law of this exponent; 0: none."""

    experts: int
    top_k: int
    dim: int
    ffn_dim: int
    tokens: int
    skew: float = 0.0

    @property
    def flops(self) -> int:
        """Of the experts' matrix products, forward and backward."""
        return 3 * 3 * 2 * self.tokens * self.top_k * self.dim * self.ffn_dim


class Rivals:
    """Everything of one shape, made of one set of weights and fed the same rows."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        draw = torch.Generator().manual_seed(1)
        self.x_TC = torch.randn(shape.tokens, shape.dim, generator=draw)
        self.grad_TC = torch.randn(shape.tokens, shape.dim, generator=draw)
        self.router_EC = torch.randn(shape.experts, shape.dim, generator=draw) * INIT_STD
        if shape.skew:  # one feature that every row has alike moves an expert's logit by the logarithm of its share
            self.x_TC[:, 0] = 1.0
            self.router_EC[:, 0] = -shape.skew * torch.arange(1, shape.experts + 1).log()

    def layer(self, name: str) -> nn.Module:
        """A drop-free layer [T, C] → [T, C]: ``trivium``, ``grouped``, ``eager`` or ``deepspeed``."""
        shape = self.shape
        ours = MoE(shape.dim, shape.ffn_dim, shape.experts, shape.top_k, seed=1, init_std=INIT_STD)
        with torch.no_grad():
            ours.get_parameter("gate.weight").copy_(self.router_EC)
        if name == "trivium":
            return Alone(ours)
        experts = [ours.experts.get_submodule(str(number)) for number in range(shape.experts)]
        if name == "deepspeed":
            theirs: nn.Module = _peer("deepspeed_moe").build(self.router_EC, experts, shape.top_k, None)
            return theirs
        weights = [tuple(p.detach() for p in expert.parameters()) for expert in experts]
        path = {"grouped": "grouped_mm", "eager": "eager"}[name]
        block: nn.Module = _peer("transformers_moe").build(self.router_EC, weights, shape.top_k, path)
        return block

    def mover(self, name: str, capacity_factor: float = 1.0) -> nn.Module:
        """Gate, dispatch and combine without experts: ``trivium``, ``einsum`` (the paper's baseline), ``deepspeed``."""
        shape = self.shape
        if name == "deepspeed":
            experts: list[nn.Module] = [nn.Identity() for _ in range(shape.experts)]
            built: nn.Module = _peer("deepspeed_moe").build(self.router_EC, experts, shape.top_k, capacity_factor)
            return built
        gate = Gate(shape.dim, shape.experts, shape.top_k)
        with torch.no_grad():
            gate.weight.copy_(self.router_EC)
        return Mover(gate, CapacityConfig(factor=capacity_factor), dense=name == "einsum")

    def load(self) -> list[int]:
        """Choices of each expert."""
        load: torch.Tensor = self.layer("trivium").inner(self.x_TC)[1].load  # type: ignore[operator]
        return [int(count) for count in load]

    def products(self) -> Callable[[], None]:
        """The experts' matrix products alone, forward and backward, into buffers that are there already."""
        shape, layer = self.shape, self.layer("trivium")
        _, aux = layer.inner(self.x_TC)  # type: ignore[operator]
        counts, most = aux.load.tolist(), int(aux.load.max())
        experts = [MLP(shape.dim, shape.ffn_dim) for _ in range(shape.experts)]
        weights = [tuple(p.detach() for p in expert.parameters()) for expert in experts]
        rows_C, rows_F = torch.randn(most, shape.dim), torch.randn(most, shape.ffn_dim)
        out_C, out_F = torch.empty_like(rows_C), torch.empty_like(rows_F)
        grads = [[torch.empty_like(p) for p in three] for three in weights]

        def run() -> None:
            for count, (gate, up, down), into in zip(counts, weights, grads, strict=True):
                x, h, y, g = rows_C[:count], rows_F[:count], out_C[:count], out_F[:count]
                for matrix in (gate, up):
                    torch.mm(x, matrix.t(), out=g)
                    torch.mm(h, matrix, out=y)
                torch.mm(h, down.t(), out=y)
                torch.mm(x, down, out=g)
                torch.mm(h.t(), x, out=into[0])
                torch.mm(h.t(), x, out=into[1])
                torch.mm(x.t(), h, out=into[2])

        return run

    def step(self, layer: nn.Module) -> torch.Tensor:
        """Forward and backward of one layer; its output."""
        layer.zero_grad(set_to_none=True)
        x_TC = self.x_TC.clone().requires_grad_()
        y_TC: torch.Tensor = layer(x_TC)
        y_TC.backward(self.grad_TC)  # type: ignore[no-untyped-call]
        return y_TC.detach()


class Alone(nn.Module):
    """Our layer without its auxiliary values."""

    def __init__(self, inner: MoE) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        """[T, C] → [T, C]."""
        y_TC: torch.Tensor = self.inner(x_TC)[0]
        return y_TC


class Mover(nn.Module):
    """Gate, drop, dispatch and combine with nothing between: by the table, or by one-hot einsums."""

    def __init__(self, gate: Gate, config: CapacityConfig, dense: bool) -> None:
        super().__init__()
        self.gate, self.config, self.dense = gate, config, dense

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        """[T, C] → [T, C]."""
        gating = self.gate(x_TC)
        num_experts, top_k = gating.logits_TE.shape[1], gating.experts_TK.shape[1]
        limit = capacity(len(x_TC), num_experts, top_k, self.config)
        if self.dense:
            return one_hot(x_TC, gating.experts_TK, gating.weights_TK, num_experts, limit)
        kept_TK = keep(gating.experts_TK, gating.weights_TK, num_experts, limit, self.config.policy)
        routing = Routing(experts_TK=gating.experts_TK, weights_TK=gating.weights_TK, kept_TK=kept_TK)
        plan = table(routing, num_experts)
        rows_RC = Scatter.apply(x_TC, plan)  # type: ignore[no-untyped-call]
        y_TC: torch.Tensor = Combine.apply(rows_RC, routing.weights_TK, plan)  # type: ignore[no-untyped-call]
        return y_TC


def one_hot(
    x_TC: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int, limit: int
) -> torch.Tensor:
    """What section 5.4 replaces: masks [T, E, slots] and two einsums of cost T·E·slots·C."""
    combine_TES = x_TC.new_zeros(len(x_TC), num_experts, limit)
    taken_E = torch.zeros(num_experts, dtype=torch.int64)
    for choice in range(experts_TK.shape[1]):
        mask_TE = F.one_hot(experts_TK[:, choice], num_experts)
        places_TE = mask_TE.cumsum(0) - 1 + taken_E
        taken_E = taken_E + mask_TE.sum(0)
        mask_TE = mask_TE * (places_TE < limit)
        places_T = (places_TE * mask_TE).sum(1)
        weighed_TE = weights_TK[:, choice, None] * mask_TE
        combine_TES = combine_TES + weighed_TE[..., None] * F.one_hot(places_T, limit)[:, None].to(x_TC.dtype)
    slots_ESC = torch.einsum("tes,tc->esc", combine_TES.bool().to(x_TC.dtype), x_TC)
    return torch.einsum("tes,esc->tc", combine_TES, slots_ESC)


def _peer(name: str) -> Any:
    try:
        return importlib.import_module(f"trivium.bench.peers.{name}")
    except ImportError as error:
        raise ConfigError(f"{name.partition('_')[0]} is not installed: pip install 'trivium[bench]'") from error
