"""What ranks run for test_api: loss scales, several optimizers, values that differ, what a sharded model refuses."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from trivium import zero
from trivium.base.errors import ConfigError, TriviumError
from trivium.dist.mesh import Mesh


class Mixed(nn.Module):
    """A 16-bit matrix and an fp32 vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Linear(8, 8, bias=False, dtype=torch.float16)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix(x.half()).float() + self.bias


def scaled(mesh: Mesh, stage: int, scale: float, twice: bool) -> tuple[list[list[float]], list[float]]:
    """Weights after one step of SGD under a fixed loss scale, and the gradient of the input."""
    model = Mixed()
    model, optimizer = zero.shard(
        model, torch.optim.SGD(model.parameters(), lr=0.5), mesh, stage=stage, loss_scale=scale
    )
    x = torch.linspace(-1, 1, 16).view(2, 8).requires_grad_()
    y = model(model(x)) if twice else model(x)
    y.square().mean().backward()
    assert x.grad is not None
    optimizer.step()
    return [t.float().flatten().tolist() for t in zero.full_state_dict(model).values()], x.grad.flatten().tolist()


def two_optimizers(mesh: Mesh, stage: int) -> tuple[int, float, bool]:
    """One bad backward under two optimizers: skipped steps counted, the scale after it, whether weights moved."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    parts = [torch.optim.SGD(layer.parameters(), lr=1.0) for layer in model]
    model, optimizers = zero.shard(model, parts, mesh, stage=stage)
    before = zero.full_state_dict(model)
    model(torch.full((1, 4), float("nan"), dtype=torch.float16)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    after = zero.full_state_dict(model)
    moved = any(not torch.equal(before[name], after[name]) for name in before)
    return optimizers[0].num_skipped_steps, optimizers[0].loss_scale, moved


def other_values(mesh: Mesh) -> str:
    """What a model of other values on each rank is told."""
    torch.manual_seed(mesh.rank)
    try:
        zero.shard(nn.Linear(4, 4), None, mesh, stage=0)
    except TriviumError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def refusals(mesh: Mesh) -> dict[str, str]:
    """What is told of optimizers that do not fit and of a copy; the model must stay usable where it was not cut."""
    told: dict[str, str] = {}

    def note(name: str, call: Any) -> None:
        try:
            call()
        except TriviumError as error:
            told[name] = str(error)

    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    sgd = torch.optim.SGD
    note("foreign", lambda: zero.shard(model, sgd(other.parameters(), lr=1.0), mesh))
    note("twice", lambda: zero.shard(model, [sgd(model.parameters(), lr=1.0) for _ in range(2)], mesh))
    told["usable"] = str(bool(torch.isfinite(model(torch.ones(1, 4))).all()))
    zero.shard(model, None, mesh)
    note("copy", lambda: copy.deepcopy(model))
    return told


class Extra(nn.Module):
    """A buffer under two names, one that is not persistent, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("again", self.table)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        self.version = state["version"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def keys(mesh: Mesh, stage: int) -> tuple[list[str], list[str]]:
    """Keys of the bare module's state and of the sharded one's."""
    model = Extra()
    bare = list(model.state_dict())
    zero.shard(model, None, mesh, stage=stage)
    return bare, list(zero.full_state_dict(model))


def writes_that_break_off(mesh: Mesh, stage: int, dtype: torch.dtype) -> tuple[bool, str]:
    """What `gathered` keeps of a block that raises on every rank, and what was written there and before a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
    model, optimizer = zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.0), mesh, stage=stage)
    expected = zero.full_state_dict(model)
    said = ""
    try:
        with zero.gathered(model), torch.no_grad():
            model[0].weight.fill_(0.5)
            raise ValueError("half-way")
    except ValueError as error:
        said = str(error)
    model(torch.ones(1, 4, dtype=dtype)).sum().backward()
    optimizer.step()
    found = zero.full_state_dict(model)
    if expected:
        expected["0.weight"].fill_(0.5)
    return all(torch.equal(found[name], expected[name]) for name in expected), said


def steps_inside(mesh: Mesh, stage: int) -> tuple[str, bool]:
    """What a step says inside `gathered`, and whether the same step goes through after it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    model, optimizer = zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.5), mesh, stage=stage)
    before = [tensor.clone() for _, tensor in zero.iter_full(model)]
    model(torch.ones(1, 4)).sum().backward()
    said = ""
    with zero.gathered(model):
        try:
            optimizer.step()
        except ConfigError as error:
            said = str(error)
    optimizer.step()
    after = [tensor.clone() for _, tensor in zero.iter_full(model)]
    return said, all(torch.equal(old - 0.5, new) for old, new in zip(before, after, strict=True))
