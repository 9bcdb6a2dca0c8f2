"""What the ranks run for tests/zero/test_diverging.py: ranks that do not do the same."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

import trivium as tv
from tests.clock import Since
from tests.zero import oracle, zoo
from tests.zero.cases import message_of
from tests.zero.oracle import Cell
from trivium.zero.api import engine_of


class Routed(nn.Module):
    """Runs the layers that the batch names, in the order it names them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(zoo.Block(zoo.DIM, 9) for _ in range(4))
        self.last = nn.Linear(zoo.DIM, 3)

    def forward(self, x: torch.Tensor, route: list[int]) -> torch.Tensor:
        for index in route:
            x = self.layers[index](x)
        return self.last(x).square().mean()


ROUTES = [[0, 1, 2, 3], [3, 1], [2], [1, 0, 1, 2, 3], [], [3, 2, 1, 0], [0, 1, 2, 3], [0, 0, 0], [1], [2, 3, 0]]


def routed(mesh: Any, counts: list[int], routes: list[list[int]], bucket_bytes: int = 1024) -> list[str]:
    """Each rank runs its own number of micro-batches on its own routes, three steps; against one process."""
    found = []
    for stage in range(4):
        torch.manual_seed(1)
        model = Routed()
        torch.manual_seed(1)
        alone = Routed()
        kind = torch.optim.AdamW
        _, optimizer = tv.zero.shard(model, kind(model.parameters()), mesh, stage=stage, bucket_bytes=bucket_bytes)
        alone_optimizer = kind(alone.parameters())
        for step in range(3):
            plan = [
                (index * mesh.size + rank, routes[(step + 3 * index + rank) % len(routes)])
                for index in range(max(counts))
                for rank in range(mesh.size)
                if index < counts[(rank + step) % len(counts)]
            ]
            for number, route in plan:
                if number % mesh.size == mesh.rank:
                    model(zoo.batch(number), route).backward()
            total: list[Any] = [None] * len(list(alone.parameters()))
            for number, route in plan:
                for param in alone.parameters():
                    param.grad = None
                alone(zoo.batch(number), route).backward()
                for index, param in enumerate(alone.parameters()):
                    if param.grad is not None:
                        total[index] = param.grad if total[index] is None else total[index] + param.grad
            for param, gradient in zip(alone.parameters(), total, strict=True):
                param.grad = None if gradient is None else gradient / mesh.size
            optimizer.clip_grad_norm_(0.1)
            oracle.clip_alone(list(alone.parameters()), 0.1)
            for one in (optimizer, alone_optimizer):
                one.step()
                one.zero_grad()
        found += [f"stage {stage}: {line}" for line in oracle.differences(model, optimizer, alone, alone_optimizer)]
    return found


def phases_that_differ(mesh: Any, what: str) -> tuple[str, float]:
    """The last rank does something else than the others: what each is told, and how soon."""
    model = zoo.build("blocks")
    model, optimizer = tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, stage=3)
    other = mesh.rank == mesh.size - 1

    def call() -> None:
        if what == "step or read":
            model(zoo.batch(0)).backward()
            if other:
                tv.zero.full_state_dict(model)
            else:
                optimizer.step()
        elif what == "clip or step":
            model(zoo.batch(0)).backward()
            if other:
                optimizer.step()
            else:
                optimizer.clip_grad_norm_(1.0)
        else:
            with tv.zero.gathered(model.layers[0] if other else model.layers[1]):  # type: ignore[index]
                pass

    mesh.comm("dp").barrier()
    since = Since()
    return message_of(call), since.seconds()


def left_over(mesh: Any) -> list[str]:
    """Gradients that only no_sync passes left: refused by the step on every rank, dropped by zero_grad."""
    found = []
    for stage in (1, 3):
        model = zoo.build("blocks")
        model, optimizer = tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, stage=stage)
        if mesh.rank == 0:
            with tv.zero.no_sync(model):
                model(zoo.batch(0)).backward()
        found.append(message_of(optimizer.step))
        optimizer.zero_grad()
        found.append(message_of(optimizer.step))
    return found


def poisoned(mesh: Any, value: float) -> list[tuple[Any, ...]]:
    """A gradient that is not finite on one rank only: skipped everywhere, weights untouched, then on as before."""
    found = []
    for stage in range(4):
        model = zoo.build("odd")
        model, optimizer = tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, stage=stage)
        model(zoo.batch(mesh.rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {name: tensor.clone() for name, tensor in tv.zero.iter_full(model)}
        x = zoo.batch(3)
        if mesh.rank == mesh.size - 1:
            x[0, 0] = value
        model(x).backward()
        norm = optimizer.clip_grad_norm_(1.0)
        shown = [segment.grad for group in optimizer.param_groups for segment in group["params"]]
        poison = all(bool(gradient.isnan().all()) for gradient in shown if gradient is not None)
        finite = optimizer.finite
        optimizer.step()
        same = all(oracle.same(tensor, before[name]) for name, tensor in tv.zero.iter_full(model))
        skipped = optimizer.num_skipped_steps
        optimizer.zero_grad()
        model(zoo.batch(mesh.rank)).backward()
        optimizer.step()
        moved = any(not oracle.same(tensor, before[name]) for name, tensor in tv.zero.iter_full(model))
        found.append((bool(norm.isnan()), poison, finite, same, skipped, moved))
    return found


def detours(mesh: Any) -> tuple[int, int]:
    """Detours counted in two like steps, and after ranks took different ways."""
    torch.manual_seed(1)
    model = Routed()
    model, optimizer = tv.zero.shard(model, torch.optim.AdamW(model.parameters()), mesh, stage=3)
    for _ in range(3):
        model(zoo.batch(mesh.rank), [0, 1, 2, 3]).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = engine_of(model).conductor.num_detours
    model(zoo.batch(mesh.rank), [3 - mesh.rank, 2]).backward()
    optimizer.step()
    return before, engine_of(model).conductor.num_detours


def broken_backward(mesh: Any) -> list[str]:
    """An error in a backward pass, the same on every rank, and then training as if nothing had been."""
    cell = Cell(stage=3, steps=2)
    model, alone = zoo.build("blocks"), zoo.build("blocks")
    model, optimizer = tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, stage=3)

    def fail(gradient: torch.Tensor) -> None:
        raise ZeroDivisionError("on purpose")

    x = zoo.batch(0)
    hook = model.layers[1].register_forward_hook(  # type: ignore[index, union-attr]
        lambda module, args, output: output.register_hook(fail) and None
    )
    try:
        model(x).backward()
    except ZeroDivisionError:
        hook.remove()
    optimizer.zero_grad()
    for step in range(2):
        oracle.zoo_loss(model, oracle.number_of(step, 0, mesh.rank, mesh.size, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    alone_optimizer = zoo.optimizer_for("adamw", alone)
    oracle.train_alone(mesh.size, cell, alone, alone_optimizer)
    return oracle.differences(model, optimizer, alone, alone_optimizer)


def broken_after_a_step(mesh: Any) -> list[list[str]]:
    """As `broken_backward`, when the order of reductions is known: some are on their way. By stage."""
    found = []
    for stage in range(4):
        cell = Cell(stage=stage, steps=3)
        model, alone = zoo.build("blocks"), zoo.build("blocks")
        model, optimizer = tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, stage=stage)
        for step in range(3):
            if step == 1:
                _break_off(model)
                optimizer.zero_grad()
            oracle.zoo_loss(model, oracle.number_of(step, 0, mesh.rank, mesh.size, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        alone_optimizer = zoo.optimizer_for("adamw", alone)
        oracle.train_alone(mesh.size, cell, alone, alone_optimizer)
        found.append(oracle.differences(model, optimizer, alone, alone_optimizer))
    return found


def _break_off(model: Any) -> None:
    """A backward pass that raises in the first of the blocks."""

    def fail(gradient: torch.Tensor) -> None:
        raise ZeroDivisionError("on purpose")

    hook = model.layers[0].register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
    with contextlib.suppress(ZeroDivisionError):
        model(zoo.batch(0)).backward()
    hook.remove()
