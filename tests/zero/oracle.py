"""One process doing the work of N ranks, and the comparison of a sharded run with it, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import trivium as tv
from tests.zero import zoo
from trivium.dist.comm import Comm, Link
from trivium.dist.shard import shard_map_of
from trivium.zero.norm import order_free_norm

Loss = Callable[[nn.Module, int], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to train: what is drawn by the property test."""

    model: str = "blocks"
    stage: int = 3
    units: str = "auto"
    bucket_bytes: int = 2**20
    accumulation: int | tuple[int, ...] = 1
    no_sync: bool = False
    average: bool = True
    optimizer: str = "adamw"
    shard_size: int | None = None
    keep_gathered: bool = False
    prefetch: int = 1
    clip: float | None = None
    steps: int = 2

    def accumulation_at(self, step: int) -> int:
        """Micro-batches of this step on each rank: a tuple says one number per step, over and over."""
        return (
            self.accumulation
            if isinstance(self.accumulation, int)
            else self.accumulation[step % len(self.accumulation)]
        )

    def options(self) -> dict[str, Any]:
        """The keywords of `zero.shard`."""
        units: Any = {"auto": "auto", "root": [], "leaves": _is_leaf, "all": lambda name, module: True}[self.units]
        return dict(
            stage=self.stage,
            units=units,
            bucket_bytes=self.bucket_bytes,
            average=self.average,
            shard_size=self.shard_size,
            keep_gathered=self.keep_gathered,
            prefetch=self.prefetch,
        )


def _is_leaf(name: str, module: nn.Module) -> bool:
    return next(module.children(), None) is None


def zoo_loss(model: nn.Module, number: int) -> torch.Tensor:
    """The loss of the ``number``-th micro-batch."""
    loss: torch.Tensor = model(zoo.batch(number), number)
    return loss


def listed(optimizer: Any) -> list[Any]:
    return optimizer if isinstance(optimizer, list) else [optimizer]


def numbered(cell: Cell, step: int, accumulated: int, rank: int, size: int) -> int:
    """The number of a micro-batch of ``cell``: after those of all steps before."""
    return sum(map(cell.accumulation_at, range(step))) * size + number_of(0, accumulated, rank, size, 1)


def number_of(step: int, accumulated: int, rank: int, size: int, accumulation: int) -> int:
    """Micro-batches are numbered (accumulation index)·N + rank."""
    return (step * accumulation + accumulated) * size + rank


def train_sharded(
    mesh: Any, cell: Cell, model: nn.Module, optimizer: Any, loss: Loss = zoo_loss
) -> tuple[Any, list[float]]:
    """Shard and train; the optimizer over segments, and the norms that clipping saw."""
    model, optimizer = tv.zero.shard(model, optimizer, mesh, **cell.options())
    norms = []
    for step in range(cell.steps):
        for index in range(cell.accumulation_at(step)):
            number = numbered(cell, step, index, mesh.data_rank, mesh.data_size)
            if cell.no_sync and index + 1 < cell.accumulation_at(step):
                with tv.zero.no_sync(model):
                    loss(model, number).backward()
            else:
                loss(model, number).backward()
        if cell.clip is not None:
            norms.append(tv.zero.clip_grad_norm_(listed(optimizer), cell.clip).item())
        for one in listed(optimizer):
            one.step()
        for one in listed(optimizer):
            one.zero_grad()
    return optimizer, norms


def train_alone(size: int, cell: Cell, model: nn.Module, optimizer: Any, loss: Loss = zoo_loss) -> list[float]:
    """The same work in one process: gradients of every micro-batch folded in order, divided once."""
    params = list(dict.fromkeys(model.parameters()))
    norms = []
    for step in range(cell.steps):
        for param, gradient in zip(params, summed_gradients(size, cell, model, params, step, loss), strict=True):
            param.grad = gradient.div_(size) if gradient is not None and cell.average and size > 1 else gradient
        if cell.clip is not None:
            norms.append(clip_alone(params, cell.clip))
        for one in listed(optimizer):
            one.step()
            one.zero_grad()
    return norms


def summed_gradients(
    size: int, cell: Cell, model: nn.Module, params: Sequence[nn.Parameter], step: int, loss: Loss
) -> list[torch.Tensor | None]:
    total: list[torch.Tensor | None] = [None] * len(params)

    def gradients(numbers: Sequence[int]) -> list[torch.Tensor | None]:
        for param in params:
            param.grad = None
        for number in numbers:
            loss(model, number).backward()
        return [param.grad for param in params]

    def fold(one: Sequence[torch.Tensor | None]) -> None:
        for index, gradient in enumerate(one):
            if gradient is not None:
                before = total[index]
                total[index] = gradient.clone() if before is None else before.add_(gradient)

    accumulation = cell.accumulation_at(step)
    every = [[numbered(cell, step, index, rank, size) for index in range(accumulation)] for rank in range(size)]
    if cell.no_sync:
        for numbers in every:
            fold(gradients(numbers))
    else:
        for index in range(accumulation):
            for rank in range(size):
                fold(gradients([every[rank][index]]))
    return total


def clip_alone(params: Sequence[nn.Parameter], max_norm: float) -> float:
    """Trivium's norm of whole gradients, and its clipping."""
    gradients = [p.grad for p in params if p.grad is not None]
    norm = norm_alone(gradients)
    factor = max_norm / (norm + 1e-6)
    if factor < 1.0:
        for gradient in gradients:
            gradient.mul_(factor)
    return norm


def norm_alone(gradients: Sequence[torch.Tensor]) -> float:
    """Trivium's norm of whole gradients in one process."""
    padded = [torch.nn.functional.pad(g.reshape(-1), (0, -g.numel() % 16)) for g in gradients]
    return order_free_norm(padded, Comm("alone", [0], 0, None, Link(torch.device("cpu"))))


def differences(model: nn.Module, optimizer: Any, alone: nn.Module, alone_optimizer: Any) -> list[str]:
    """What is not bit-equal between a sharded run on this rank and the run of one process. Collective."""
    found = []
    full, expected = tv.zero.full_state_dict(model), alone.state_dict()
    if full:
        if list(full) != list(expected):
            found.append(f"keys {list(full)} instead of {list(expected)}")
        found += [
            f"{name}: {_gap(full[name], expected[name])}" for name in full if not same(full[name], expected[name])
        ]
    whole: dict[nn.Parameter, dict[str, Any]] = {}
    for one in listed(alone_optimizer):
        whole.update(one.state)
    mine: dict[Any, dict[str, Any]] = {}
    for one in listed(optimizer):
        mine.update(one.state)
    shard_map = shard_map_of(model)
    parameters = dict(alone.named_parameters())
    for name, entry in (shard_map.entries if shard_map else {}).items():
        if entry.piece is not None:
            found += _state_differences(
                name,
                entry.piece.start,
                entry.piece.tensor.numel(),
                mine.get(entry.piece.tensor),
                whole.get(parameters[name]),
            )
    return found


def _state_differences(name: str, start: int, length: int, mine: Any, whole: Any) -> list[str]:
    if bool(mine) != bool(whole):
        return [f"{name}: has state {bool(mine)}, one process {bool(whole)}"]
    found = []
    for key, value in (whole or {}).items():
        here = mine[key]
        if isinstance(value, torch.Tensor) and value.dim() and value.numel() != here.numel():
            value = value.reshape(-1)[start : start + length]
        if isinstance(value, torch.Tensor):
            if not same(here.reshape(-1), value.reshape(-1)):
                found.append(f"{name}.{key}: {_gap(here.reshape(-1), value.reshape(-1))}")
        elif here != value:
            found.append(f"{name}.{key}: {here} instead of {value}")
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bits, so that 0.0 is not -0.0."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.detach()
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(other.detach().contiguous().view(-1).view(torch.uint8))
        if one.numel()
        else one.shape == other.shape
    )


def _gap(one: torch.Tensor, other: torch.Tensor) -> str:
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{tuple(one.shape)} {one.dtype} instead of {tuple(other.shape)} {other.dtype}"
    gap = (one.double() - other.double()).abs().max().item()
    return f"off by {gap:.3g} in {int((one != other).sum())} of {one.numel()}"


def compare(mesh: Any, cell: Cell) -> list[str]:
    """Train ``cell`` sharded and alone; what differs on this rank."""
    return compare_stages(mesh, cell, (cell.stage,))[0]


def compare_stages(mesh: Any, cell: Cell, stages: Sequence[int]) -> list[list[str]]:
    """Train ``cell`` sharded at each of ``stages`` and alone once, which no stage changes; what differs at each."""
    alone = zoo.build(cell.model)
    alone_optimizer = zoo.optimizer_for(cell.optimizer, alone)
    expected = train_alone(mesh.data_size, cell, alone, alone_optimizer)
    every = []
    for stage in stages:
        model = zoo.build(cell.model)
        optimizer, norms = train_sharded(
            mesh, replace(cell, stage=stage), model, zoo.optimizer_for(cell.optimizer, model)
        )
        found = differences(model, optimizer, alone, alone_optimizer)
        if norms != expected:
            found.append(f"norms {norms} instead of {expected}")
        every.append(found)
    return every


__all__ = ["Cell", "Optimizer", "compare", "compare_stages", "differences", "train_alone", "train_sharded"]
