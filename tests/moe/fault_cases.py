"""What the ranks run for the rows of the fault matrix that concern experts."""

from __future__ import annotations

from typing import Any

import torch

from tests.moe import cases
from trivium.base.errors import ConfigError, MismatchError
from trivium.dist.mesh import Mesh
from trivium.moe import CapacityConfig, MoE


def spread_over(mesh: Any) -> Mesh:
    return Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=mesh.size)


def wrong(mesh: Any, how: str) -> str:
    """What this rank is told when rank 1 alone is different."""
    spread, odd = spread_over(mesh), mesh.rank == 1
    try:
        if how == "experts":
            cases.make(spread) if not odd else MoE(cases.DIM, cases.FFN, cases.EXPERTS + 2, mesh=spread, seed=5)
            return "no error"
        layer, x_TC = cases.make(spread), cases.tokens(mesh.rank, 5)
        if odd:
            layer, x_TC = layer.float(), x_TC.float()
        layer(x_TC)
    except MismatchError as error:
        return str(error)
    return "no error"


def user_gate(mesh: Any) -> str:
    """What this rank is told when the user's gate names expert -1 on rank 1 alone."""
    gate = cases.WrongGate({"experts_TK": lambda experts_TK: experts_TK - 1} if mesh.rank == 1 else {})
    layer = MoE(8, 16, 4, top_k=1, mesh=spread_over(mesh), gate=gate, seed=0)
    try:
        layer(torch.randn(6, 8))
    except (ConfigError, MismatchError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def odd_seed(mesh: Any, seed: int | None) -> tuple[int, list[float], list[float]]:
    """With torch's generator elsewhere on every rank: the layer's seed, router and mixer."""
    torch.manual_seed(40 + mesh.rank)
    layer = MoE(8, 16, 4, top_k=1, residual="mix", mesh=spread_over(mesh), seed=seed)
    found = [layer.get_submodule(name).get_parameter("weight").flatten().tolist() for name in ("gate", "mix")]
    return layer.seed, *found


def odd_option(mesh: Any, options: dict[str, Any]) -> str:
    """What this rank is told when rank 1 alone is built with ``options``."""
    try:
        MoE(8, 16, 4, top_k=1, mesh=spread_over(mesh), **{"seed": 3, **(options if mesh.rank == 1 else {})})
    except MismatchError as error:
        return str(error)
    return "no error"


def routed(mesh: Any, counts: list[int], expert: int, factor: float | None) -> float:
    """How far output and gradient are from the one-hot reference, when all tokens want one expert."""
    capacity = None if factor is None else CapacityConfig(factor=factor, minimum=1)
    layer = cases.make(spread_over(mesh), top_k=1, capacity_factor=capacity)
    whole, x_TC = cases.make(top_k=1), cases.tokens(mesh.rank, counts[mesh.rank])
    with torch.no_grad():
        for one in (layer, whole):
            weight = one.get_submodule("gate").get_parameter("weight")
            weight.zero_()
            weight[expert] = 1.0
    x_TC = x_TC.abs().requires_grad_()  # positive: the chosen expert has the greatest logit
    y_TC, aux = layer(x_TC)
    y_TC.square().sum().backward()
    if aux.load.sum() != aux.load[expert]:
        raise ValueError(f"tokens went to {aux.load.tolist()}, not all to {expert}")
    x_too = x_TC.detach().clone().requires_grad_()
    scores = whole(x_too)[1].routing
    kept = type(scores)(experts_TK=scores.experts_TK, weights_TK=scores.weights_TK, kept_TK=aux.routing.kept_TK)
    expected = cases.oracle(whole, x_too, kept)
    expected.square().sum().backward()
    if factor is not None and len(x_TC) > 2 and aux.dropped == 0:
        raise ValueError("nothing was dropped")
    grads = [torch.zeros_like(x_TC) if x.grad is None else x.grad for x in (x_TC, x_too)]
    return max(cases.far(y_TC.detach(), expected.detach()), cases.far(*grads))
