"""What the ranks run for tests/zero/test_uneven.py: batches of which each rank has another share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import trivium as tv
from tests.zero import oracle, zoo

VOCABULARY = 19
Shares = Sequence[Sequence[Sequence[int | None]]]
"""For each step, each micro-batch and each rank, how many tokens: 0 is an empty batch, None is no batch at all."""


class Language(nn.Module):
    """Tokens [B, T] in, the cross-entropy of the next ones, summed, out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(zoo.Block(8, 12) for _ in range(2))
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens_BT)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets_BT.flatten(), reduction="sum")


def batch(number: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``number``-th micro-batch: one row of ``tokens`` tokens, or no row."""
    generator = torch.Generator().manual_seed(number)
    both = torch.randint(VOCABULARY, (2, 1 if tokens else 0, tokens or 5), generator=generator)
    return both[0], both[1]


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Language()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def uneven(mesh: Any, shares: Shares, divide: str) -> list[str]:
    """Train at every stage on ``shares`` and in one process; what differs on this rank.

    The loss of a step is the sum over all tokens of all ranks, divided once by their number: ``before`` backward, or
    ``after`` it on the reduced gradients.
    """
    comm, found = mesh.comm("dp"), []
    alone, alone_optimizer, norms = trained_alone(shares, divide)
    for stage in range(4):
        model, optimizer = build()
        model, sharded = tv.zero.shard(model, optimizer, mesh, stage=stage, average=False, bucket_bytes=1024)
        seen = []
        for step, rows in enumerate(shares):
            mine = [(index, row[mesh.rank]) for index, row in enumerate(rows)]
            (tokens,) = comm.all_reduce_ints([sum(count or 0 for _, count in mine)])
            for index, count in mine:
                if count is not None:
                    loss = model(*batch(100 * step + index * mesh.size + mesh.rank, count))
                    (loss / tokens if divide == "before" else loss).backward()
            if divide == "after":
                sharded.clip_grad_norm_(
                    math.inf
                )  # a rank with fewer micro-batches waits here for the others' gradients
                for group in sharded.param_groups:
                    for segment in group["params"]:
                        if segment.grad is not None:
                            segment.grad.div_(tokens)
            seen.append(sharded.clip_grad_norm_(0.05).item())
            sharded.step()
            sharded.zero_grad()
        found += [f"stage {stage}: {line}" for line in oracle.differences(model, sharded, alone, alone_optimizer)]
        if seen != norms:
            found.append(f"stage {stage}: norms {seen} instead of {norms}")
    return found


def trained_alone(shares: Shares, divide: str) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
    """One process runs every rank's micro-batches in turn."""
    model, optimizer = build()
    norms = []
    for step, rows in enumerate(shares):
        tokens = sum(count or 0 for row in rows for count in row)
        for index, row in enumerate(rows):
            for rank, count in enumerate(row):
                if count is not None:
                    loss = model(*batch(100 * step + index * len(row) + rank, count))
                    (loss / tokens if divide == "before" else loss).backward()
        if divide == "after":
            for param in model.parameters():
                if param.grad is not None:
                    param.grad.div_(tokens)
        norms.append(oracle.clip_alone(list(model.parameters()), 0.05))
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, norms
