"""What the ranks of a world do with experts apart; run by tests/checkpoint/test_experts.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import trivium as tv
from trivium.dist.mesh import Mesh
from trivium.moe import MoE

DIM = 6


class Expert(nn.Module):
    """An expert with a buffer and an extra state of its own: they must not be lost when rank 0 does not have them."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 5)
        self.down = nn.Linear(5, DIM, bias=False)
        self.register_buffer("rows", torch.full((1,), float(number)))
        self.number = number

    def forward(self, x_RC: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.get_buffer("rows").add_(len(x_RC))
        found: torch.Tensor = self.down(torch.tanh(self.up(x_RC)))
        return found

    def get_extra_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.number = state["number"]


class Model(nn.Module):
    """Two layers of eight experts, each of its own degree, between dense ones."""

    def __init__(self, mesh: Mesh | None = None, ep: tuple[int, int] = (1, 1), seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(
            MoE(DIM, 5, 8, top_k=2, mesh=mesh, ep=degree, seed=seed, layer=i, expert=Expert if i else None)
            for i, degree in enumerate(ep)
        )

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        x_TC = torch.tanh(self.first(x_TC))
        total = x_TC.new_zeros(())
        for layer in self.layers:
            y_TC, aux = layer(x_TC)
            x_TC, total = x_TC + y_TC, total + aux.loss
        return x_TC.square().mean() + total


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    decay = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    other = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": other}], lr=0.01)


def sharded(mesh: Mesh, ep: tuple[int, int], stage: int, seed: int) -> tuple[nn.Module, Any]:
    model = Model(mesh, ep, seed)
    return tv.zero.shard(model, optimizer_of(model), mesh, stage=stage)


def train_and_save(mesh: Mesh, folder: Path, ep: tuple[int, int], stage: int) -> list[str]:
    """Two steps, then a checkpoint; the names that rank 0 has whole."""
    model, optimizer = sharded(mesh, ep, stage, 0)
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + mesh.data_rank)
        model(torch.randn(9, DIM, generator=generator)).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    tv.checkpoint.save(folder, model=model, optimizer=optimizer, extra={"ep": list(ep)}, mesh=mesh)
    return [name for name, _ in tv.zero.iter_full(model)]


def load_and_save(mesh: Mesh, source: Path, folder: Path, ep: tuple[int, int], stage: int) -> Any:
    """Load with experts placed in another way, and save again."""
    model, optimizer = sharded(mesh, ep, stage, 1)
    extra = tv.checkpoint.load(source, model=model, optimizer=optimizer, mesh=mesh)
    tv.checkpoint.save(folder, model=model, optimizer=optimizer, extra=extra, mesh=mesh)
    return extra


def export(mesh: Mesh, source: Path, folder: Path, ep: tuple[int, int], stage: int) -> None:
    model, _ = sharded(mesh, ep, stage, 1)
    tv.checkpoint.load(source, model=model, mesh=mesh)
    tv.checkpoint.save_hugging_face(model, folder, mesh=mesh)


def from_export(mesh: Mesh, source: Path, folder: Path, ep: tuple[int, int], stage: int) -> None:
    model, _ = sharded(mesh, ep, stage, 2)
    tv.checkpoint.load_hugging_face(model, source, mesh=mesh)
    tv.checkpoint.save(folder, model=model, mesh=mesh)
