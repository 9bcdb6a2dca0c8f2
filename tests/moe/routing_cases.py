"""Adversarial routings for tests/moe/test_topology.py: ranks that use different experts, or none, in every layer."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

import trivium as tv
from trivium.dist.mesh import Mesh
from trivium.moe import MoE, Routing
from trivium.zero.api import engine_of

DIM, EXPERTS, LAYERS, TOP_K = 4, 6, 4, 2
KINDS = ("one", "elsewhere", "random", "nobody", "mine", "few", "dropped")


class Forced(nn.Module):
    """Layers whose routing the caller dictates."""

    def __init__(self, mesh: Mesh | None) -> None:
        super().__init__()
        torch.manual_seed(4)

        def expert(number: int) -> nn.Module:
            return nn.Linear(DIM, DIM)

        self.layers = nn.ModuleList(
            MoE(DIM, 1, EXPERTS, TOP_K, mesh=mesh, expert=expert, layer=i, seed=7) for i in range(LAYERS)
        )

    def forward(self, x_TC: torch.Tensor, routings: list[Routing]) -> torch.Tensor:
        losses = []
        for layer, routing in zip(self.layers, routings, strict=True):
            y_TC, aux = layer(x_TC, routing)
            x_TC = x_TC + torch.tanh(y_TC)
            losses.append(aux.loss)
        return x_TC.square().sum() / 8 + torch.stack(losses).sum()  # every layer's loss gets its gradient at once


def routing(drawn: random.Random, kind: str, rank: int, size: int, num_tokens: int) -> Routing:
    """One rank's choice: ``elsewhere`` means the next rank's experts only, ``dropped`` that nothing is kept."""
    mine = range(rank * EXPERTS // size, (rank + 1) * EXPERTS // size)
    theirs = range((rank + 1) % size * EXPERTS // size, ((rank + 1) % size + 1) * EXPERTS // size)
    pool = {"elsewhere": list(theirs), "mine": list(mine), "one": [drawn.randrange(EXPERTS)], "few": [0, EXPERTS - 1]}
    among = pool.get(kind, list(range(EXPERTS))) or [0]
    experts = [[drawn.choice(among) for _ in range(TOP_K)] for _ in range(num_tokens)]
    kept = [[kind != "dropped" and (kind != "random" or drawn.random() < 0.7) for _ in row] for row in experts]
    return Routing(
        experts_TK=torch.tensor(experts, dtype=torch.int64).view(num_tokens, TOP_K),
        weights_TK=torch.empty(num_tokens, TOP_K),
        kept_TK=torch.tensor(kept, dtype=torch.bool).view(num_tokens, TOP_K),
    )


def adversarial(mesh: Mesh, count: int, seed: int, units: str) -> dict[str, Any]:
    """``count`` routings of single layers, at stage 3: how many came through, and whether the ranks still agree."""
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=mesh.size)
    model: nn.Module = Forced(spread)
    every = (lambda name, module: True) if units == "all" else "auto"
    model, optimizer = tv.zero.shard(
        model, torch.optim.SGD(model.parameters(), lr=1e-3), spread, stage=3, units=every, bucket_bytes=1024
    )
    drawn = random.Random(1000 * seed + mesh.rank)
    together = random.Random(seed)  # what all ranks do alike: how many passes a step has, and of which kind
    routings = passes = 0
    while routings < count:
        for _ in range(together.choice((1, 1, 1, 2))):
            num_tokens = drawn.choice((0, 1, 2, 5))
            kinds = [drawn.choice(KINDS) for _ in range(LAYERS)]
            chosen = [
                routing(drawn, kind, mesh.rank, mesh.size, 0 if kinds[0] == "nobody" else num_tokens) for kind in kinds
            ]
            x_TC = torch.randn(len(chosen[0].experts_TK), DIM, generator=torch.Generator().manual_seed(passes))
            if together.random() < 0.1:
                with torch.no_grad():
                    model(x_TC, chosen)
            else:
                model(x_TC, chosen).backward()
            routings += LAYERS
            passes += 1
        if together.random() < 0.5:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    sums = {name: float(value.double().sum()) for name, value in tv.zero.iter_full(model)}
    return {"routings": routings, "sums": sums, "detours": engine_of(model).conductor.num_detours}
