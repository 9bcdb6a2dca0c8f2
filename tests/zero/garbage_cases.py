"""What the ranks run for the test of what a step leaves behind."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

import trivium as tv


class TwoInputs(nn.Module):
    """A unit that takes two tensors and gives two: the hooks of both have several to watch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(x) + y, self.two(y)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(TwoInputs() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = y = self.first(x)
        for block in self.blocks:
            x, y = block(x, y.sin())
        return (x + y).square().mean()


def collected_after_steps(mesh: Any) -> list[str]:
    """The kinds of tensors and graph nodes that a collection finds after two steps at stage 3."""
    model = Model()
    blocks = list(model.blocks)
    model, optimizer = tv.zero.shard(model, torch.optim.AdamW(model.parameters()), mesh, stage=3, units=blocks)
    x = torch.ones(2, 8)
    model(x).backward()  # what is built once, on first use
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(2):
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        kinds = [type(found) for found in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    return sorted({k.__name__ for k in kinds if issubclass(k, torch.Tensor) or k.__name__.endswith("Backward0")})
