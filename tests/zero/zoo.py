"""Small models that hold every oddity a sharder meets, and numbered batches that any process can make."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

DIM = 12


class Block(nn.Module):
    """A residual block, as deep as one needs."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Plain(nn.Sequential):
    """A list of layers whose root is the list itself."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(DIM, 17), nn.GELU(), nn.Linear(17, 9), nn.Tanh(), nn.Linear(9, 1))

    def forward(self, x: torch.Tensor, number: int = 0) -> torch.Tensor:
        return super().forward(x).square().mean()


class Blocks(nn.Module):
    """Projections around a list of blocks."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, 16, bias=False)
        self.layers = nn.ModuleList(Block(16, 20) for _ in range(num_layers))
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, number: int = 0) -> torch.Tensor:
        y = self.first(x)
        for layer in self.layers:
            y = layer(y)
        return self.last(y).square().mean()


class Tied(nn.Module):
    """One weight under two names, in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 8)
        self.layers = nn.ModuleList(Block(8, 12) for _ in range(2))
        self.head = nn.Linear(8, 23, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor, number: int = 0) -> torch.Tensor:
        ids = (x[:, :6].abs() * 10).long() % 23
        y = self.embedding(ids)
        for layer in self.layers:
            y = layer(y)
        return F.cross_entropy(self.head(y).flatten(0, 1), ids.flatten())


class Odd(nn.Module):
    """Frozen, zero-size, 0-dim and (1,)-shaped parameters; a layer used twice, one never; a buffer; a nested list."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.25))
        self.shift = nn.Parameter(torch.full((1,), 0.5))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.frozen = nn.Linear(DIM, DIM)
        self.frozen.requires_grad_(False)
        self.twice = nn.Linear(DIM, DIM)
        self.never = nn.Linear(5, 7)
        self.layers = nn.ModuleList([nn.Sequential(Block(DIM, 8), nn.Linear(DIM, DIM)), Block(DIM, 5)])
        self.layers[1].up.bias.requires_grad_(False)
        self.register_buffer("offset", torch.linspace(0, 1, DIM))

    def forward(self, x: torch.Tensor, number: int = 0) -> torch.Tensor:
        y = self.twice(self.frozen(x) + self.offset)
        for layer in self.layers:
            y = layer(y)
        return (self.twice(y) * self.scale + self.shift + self.nothing.sum()).square().mean()


class Sometimes(nn.Module):
    """Experts of which each batch uses one, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, 10)
        self.experts = nn.ModuleList(nn.Linear(10, 10) for _ in range(4))
        self.last = nn.Linear(10, 2)

    def forward(self, x: torch.Tensor, number: int = 0) -> torch.Tensor:
        y = self.first(x)
        chosen = [number % 3, (number + 1) % 2] if number % 2 else [number % 3]
        for expert in chosen:
            y = torch.tanh(self.experts[expert](y))
        return self.last(y).square().mean()


ZOO: dict[str, type[nn.Module]] = {"plain": Plain, "blocks": Blocks, "tied": Tied, "odd": Odd, "sometimes": Sometimes}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model called ``name``, the same on every rank and each time."""
    torch.manual_seed(sum(name.encode()))
    return ZOO[name]().to(dtype)


def batch(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The ``number``-th micro-batch of all."""
    return torch.randn(3, DIM, generator=torch.Generator().manual_seed(1000 + number)).to(dtype)


def optimizer_for(kind: str, model: nn.Module) -> Any:
    """A torch optimizer, or a list of them, with two parameter groups and flags that leave no bit to chance."""
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.numel()]
    others = [p for p in model.parameters() if p.ndim != 2 or not p.numel()]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=1e-2, fused=True)
    if kind == "adam":
        return torch.optim.Adam(groups, lr=1e-2, amsgrad=True, foreach=False)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True, foreach=True)
    if kind == "muon":
        trained = [p for p in matrices if p.requires_grad]
        rest = [*others, *(p for p in matrices if not p.requires_grad)]
        return [torch.optim.Muon(trained, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2, foreach=False)]
    raise KeyError(kind)
