"""What the ranks of a world do with real shards; run by tests/checkpoint/test_stages.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import trivium as tv
from tests.checkpoint.ranks import seeded
from trivium.dist.mesh import Mesh


class Model(nn.Module):
    """Tied, frozen, odd and single-element parameters, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 17, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        found: torch.Tensor = self.head(self.frozen(hidden) * self.scale)
        return found


def make(seed: int) -> Model:
    model = seeded(seed, Model)
    assert isinstance(model, Model)
    return model


def optimizer_of(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    decay = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    other = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": other}], lr=lr)


def sharded(mesh: Mesh, stage: int, seed: int, dtype: str = "float32") -> tuple[nn.Module, Any]:
    model = make(seed).to(getattr(torch, dtype))
    return tv.zero.shard(model, optimizer_of(model), mesh, stage=stage)


def train(mesh: Mesh, model: nn.Module, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        tokens = torch.arange(12).view(2, 6).add(step + mesh.data_rank) % 17
        model(tokens).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def train_and_save(mesh: Mesh, folder: Path, stage: int, dtype: str = "float32") -> None:
    model, optimizer = sharded(mesh, stage, 0, dtype)
    train(mesh, model, optimizer, 2)
    tv.checkpoint.save(folder, model=model, optimizer=optimizer, extra={"stage": stage}, mesh=mesh)


def load_and_save(mesh: Mesh, source: Path, folder: Path, stage: int, dtype: str = "float32") -> Any:
    model, optimizer = sharded(mesh, stage, 1, dtype)
    extra = tv.checkpoint.load(source, model=model, optimizer=optimizer, mesh=mesh)
    tv.checkpoint.save(folder, model=model, optimizer=optimizer, extra=extra, mesh=mesh)
    return extra


def go_on(mesh: Mesh, source: Path | None, stage: int, folder: Path) -> None:
    """Three steps at once, or two that were saved and one more after loading them; saved at `folder`."""
    model, optimizer = sharded(mesh, stage, 0 if source is None else 1)
    if source is not None:
        tv.checkpoint.load(source, model=model, optimizer=optimizer, mesh=mesh)
    train(mesh, model, optimizer, 2 if source is None else 0)
    train(mesh, model, optimizer, 1)
    tv.checkpoint.save(folder, model=model, optimizer=optimizer, mesh=mesh)


def export(mesh: Mesh, source: Path, folder: Path, stage: int) -> None:
    model, _ = sharded(mesh, stage, 1)
    tv.checkpoint.load(source, model=model, mesh=mesh)
    tv.checkpoint.save_hugging_face(model, folder, mesh=mesh)


def from_export(mesh: Mesh, source: Path, stage: int, folder: Path) -> None:
    model, _ = sharded(mesh, stage, 2)
    tv.checkpoint.load_hugging_face(model, source, mesh=mesh)
    tv.checkpoint.save(folder, model=model, mesh=mesh)
