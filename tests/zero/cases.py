"""What the ranks run for the tests of exactness and of optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import trivium as tv
from tests.zero import oracle, zoo
from tests.zero.oracle import Cell, compare
from trivium.base.errors import TriviumError

__all__ = ["compare", "compare_all"]

LOOPS: tuple[dict[str, bool], ...] = ({"foreach": False}, {"foreach": True})
OPTIMIZERS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("SGD", {"lr": 0.1, "momentum": 0.9, **flag}) for flag in (*LOOPS, {"fused": True})),
    *(("Adam", {"amsgrad": True, **flag}) for flag in (*LOOPS, {"fused": True})),
    *(("AdamW", {"weight_decay": 0.1, **flag}) for flag in (*LOOPS, {"fused": True})),
    *(("Adamax", flag) for flag in LOOPS),
    *(("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1, **flag}) for flag in LOOPS),
    *(("RAdam", flag) for flag in LOOPS),
    *(("ASGD", flag) for flag in LOOPS),
    *(("Adadelta", flag) for flag in LOOPS),
    *(("Adagrad", {"lr_decay": 0.1, **flag}) for flag in (*LOOPS, {"fused": True})),
    *(("RMSprop", {"momentum": 0.9, "centered": True, **flag}) for flag in LOOPS),
    *(("Rprop", flag) for flag in LOOPS),
    *(("Adafactor", flag) for flag in LOOPS),
    ("Muon", {}),
)
REFUSED = ("LBFGS", "SparseAdam")


def compare_all(mesh: Any, cells: list[Cell]) -> list[list[str]]:
    return [compare(mesh, cell) for cell in cells]


def compare_with(mesh: Any, cell: Cell, make: Any, **options: Any) -> list[str]:
    """Compare with one process; ``make(model)`` gives the optimizer."""
    model, alone = zoo.build(cell.model), zoo.build(cell.model)
    optimizer, _ = oracle.train_sharded(mesh, cell, model, make(model), **options)
    alone_optimizer = make(alone)
    oracle.train_alone(mesh.data_size, cell, alone, alone_optimizer)
    return oracle.differences(model, optimizer, alone, alone_optimizer)


def compare_optimizers(mesh: Any) -> list[str]:
    found = []
    for name, flags in OPTIMIZERS:

        def make(model: nn.Module, name: str = name, flags: dict[str, Any] = flags) -> Any:
            kind = getattr(torch.optim, name)
            if name != "Muon":
                return kind(model.parameters(), **flags)
            matrices = [p for p in model.parameters() if p.ndim == 2 and p.numel() and p.requires_grad]
            known = set(matrices)
            return [kind(matrices, **flags), torch.optim.SGD([p for p in model.parameters() if p not in known], lr=0.1)]

        for stage in (1, 3):
            model = "tied" if name == "Adafactor" else "odd"  # torch's divides by the size of a parameter
            cell = Cell(model=model, stage=stage, steps=3, bucket_bytes=1024)
            found += [f"{name}{flags} at stage {stage}: {line}" for line in compare_with(mesh, cell, make)]
    return found


def refuse(mesh: Any, name: str) -> str:
    model = zoo.build("blocks")
    return message_of(lambda: tv.zero.shard(model, getattr(torch.optim, name)(model.parameters()), mesh))


def message_of(call: Any) -> str:
    """What the error says that ``call`` raises."""
    try:
        call()
    except TriviumError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Halve(torch.optim.Optimizer):
    """An optimizer that torch does not know."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"])


def misuse(mesh: Any, what: str) -> str:
    model = zoo.build("blocks")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    if what == "differentiable":
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True)
        return message_of(lambda: tv.zero.shard(model, sgd, mesh))
    if what == "unknown":
        return message_of(lambda: tv.zero.shard(model, Halve(model.parameters()), mesh))
    if what == "stranger":
        sgd = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(3))], lr=0.1)
        return message_of(lambda: tv.zero.shard(model, sgd, mesh))
    if what == "option":
        return message_of(lambda: tv.zero.shard(model, sgd, mesh, stag=3))
    if what == "stage":
        return message_of(lambda: tv.zero.shard(model, sgd, mesh, stage=4))
    if what == "unfrozen":
        model.last.requires_grad_(False)
        model, _ = tv.zero.shard(model, sgd, mesh)
        model.last.requires_grad_(True)
        return message_of(lambda: model(zoo.batch(0)))
    model, optimizer = tv.zero.shard(model, sgd, mesh)
    if what == "late group":
        return message_of(lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]}))
    return message_of(lambda: tv.zero.shard(model, sgd, mesh))


def elementwise(mesh: Any) -> list[str]:
    cell = Cell(model="odd", stage=3, steps=2)
    model, alone = zoo.build("odd"), zoo.build("odd")
    model, optimizer = tv.zero.shard(model, Halve(model.parameters()), mesh, elementwise=True)
    for step in range(2):
        oracle.zoo_loss(model, oracle.number_of(step, 0, mesh.rank, mesh.size, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    alone_optimizer = Halve(alone.parameters())
    oracle.train_alone(mesh.size, cell, alone, alone_optimizer)
    return oracle.differences(model, optimizer, alone, alone_optimizer)


def warm_optimizer(mesh: Any) -> list[str]:
    """Train alone, shard with the states that are there, go on; against training alone all the way."""
    found = []
    for stage in range(4):
        runs = []
        for _ in range(2):
            model = zoo.build("tied")
            optimizer = zoo.optimizer_for("adamw", model)
            oracle.train_alone(mesh.size, Cell(steps=2), model, optimizer)
            runs.append((model, optimizer))
        cell = Cell(stage=stage, steps=2)
        wrapped, _ = oracle.train_sharded(mesh, cell, *runs[0])
        oracle.train_alone(mesh.size, cell, *runs[1])
        found += oracle.differences(runs[0][0], wrapped, *runs[1])
    return found


def reload(mesh: Any) -> list[str]:
    """Two steps, the state into another optimizer of the same kind, two more; against four in a row."""
    runs = []
    for broken in (True, False):
        model = zoo.build("blocks")
        optimizer, _ = oracle.train_sharded(mesh, Cell(stage=2), model, zoo.optimizer_for("adamw", model))
        if broken:
            other = zoo.build("blocks")
            other.load_state_dict(broadcast(mesh, tv.zero.full_state_dict(model)))
            fresh = tv.zero.shard(other, zoo.optimizer_for("adamw", other), mesh, stage=2)[1]
            fresh.load_state_dict(optimizer.state_dict())
            model, optimizer = other, fresh
        for step in range(2, 4):
            oracle.zoo_loss(model, oracle.number_of(step, 0, mesh.rank, mesh.size, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(tv.zero.full_state_dict(model))
    return [name for name in runs[0] if not oracle.same(runs[0][name], runs[1][name])]


def broadcast(mesh: Any, full: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    told = mesh.comm("dp").broadcast_json({name: value.tolist() for name, value in full.items()})
    return {name: torch.tensor(value) for name, value in told.items()}


class Wide(nn.Module):
    """One large matrix whose gradient anyone can write down."""

    def __init__(self, gradient: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(gradient))
        self.bias = nn.Parameter(torch.zeros(7))
        self.gradient = gradient

    def forward(self) -> torch.Tensor:
        return (self.weight * self.gradient).sum() + self.bias.sum()


def norms(mesh: Any) -> list[tuple[int, str, float]]:
    """The norm at each stage, in hexadecimal, and its error against fp64."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(1000, 1001, generator=generator) * torch.logspace(-6, 2, 1001)
    exact = torch.cat([gradient.double().flatten(), torch.ones(7, dtype=torch.float64)]).norm().item()
    found = []
    for stage in range(4):
        model = Wide(gradient)
        _, optimizer = tv.zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), mesh, stage=stage)
        model().backward()
        norm = optimizer.clip_grad_norm_(1.0).item()
        found.append((stage, norm.hex(), abs(norm - exact) / exact))
    return found
