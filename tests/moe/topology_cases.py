"""One rank that runs every rank's micro-batches in turn, and what ranks with experts apart under ZeRO make of them."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import trivium as tv
from trivium.dist.exchange import ExchangeConfig
from trivium.dist.mesh import Mesh
from trivium.dist.shard import shard_map_of
from trivium.moe import CapacityConfig, MoE

DIM, FFN, STEPS = 6, 8, 20
LR, MAX_NORM = 0.1, 0.5
COUNTS = (5, 7, 0, 3, 1, 6, 2)  # tokens of a rank in a micro-batch: also none


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is computed, however it is placed: experts of each layer, choices, drops, precision, micro-batches."""

    experts: tuple[int, ...] = (8, 5)
    top_k: int = 2
    drops: str = "none"
    expert: str = "linear"
    dtype: str = "float64"
    accumulation: int = 1
    optimizer: str = "sgd"
    average: bool = True
    steps: int = STEPS

    @property
    def file(self) -> str:
        """Where the reference of this work lies in the tests' folder."""
        return f"{zlib.crc32(repr(self).encode()):08x}.pt"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One placement of the same work: degrees of expert parallelism by layer (None: the mesh's), and the stage."""

    work: Work = Work()
    ep: tuple[int | None, ...] = (None, None)
    mesh_ep: int = 1
    stage: int = 3
    no_sync: bool = False
    bucket_bytes: int = 2**20
    shard_size: int | None = None
    node: int | None = None  # a hierarchical exchange by nodes of so many ranks


class Layer(nn.Module):
    """A dense projection, then experts, both beside the residual stream."""

    def __init__(self, work: Work, number: int, mesh: Mesh | None, ep: int | None, node: int | None) -> None:
        super().__init__()
        dtype = getattr(torch, work.dtype)
        capacity = None if work.drops == "none" else CapacityConfig(factor=0.75, minimum=1, policy=work.drops)
        self.dense = nn.Linear(DIM, DIM, dtype=dtype)
        self.moe = MoE(
            DIM,
            FFN,
            work.experts[number],
            top_k=work.top_k,
            capacity_factor=capacity,
            mesh=mesh,
            ep=ep,
            residual=number == 1,
            exchange="auto" if node is None else ExchangeConfig(kind="hierarchical", node=node),
            layer=number,
            expert="swiglu" if work.expert == "swiglu" else lambda expert: nn.Linear(DIM, DIM, dtype=dtype),
            seed=5,
            dtype=dtype,
            init_std=0.5,
            z_weight=0.01,
        )

    def forward(self, x_TC: torch.Tensor, step: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        x_TC = x_TC + torch.tanh(self.dense(x_TC))
        y_TC, aux = self.moe(x_TC, step=step, first_token=first)
        return x_TC + y_TC, aux.loss


class Tower(nn.Module):
    """Two layers of experts between a dense beginning and end; one parameter that nobody uses."""

    def __init__(
        self,
        work: Work,
        mesh: Mesh | None = None,
        ep: tuple[int | None, ...] = (None, None),
        node: int | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(2)
        dtype = getattr(torch, work.dtype)
        self.first = nn.Linear(DIM, DIM, dtype=dtype)
        self.layers = nn.ModuleList(Layer(work, number, mesh, ep[number], node) for number in range(len(work.experts)))
        self.last = nn.Linear(DIM, 3, dtype=dtype)
        self.unused = nn.Parameter(torch.ones(5, dtype=dtype))
        for number, layer in enumerate(self.layers):
            generator = torch.Generator().manual_seed(9 + number)
            weight = layer.get_submodule("moe.gate").get_parameter("weight")
            with torch.no_grad():  # a router that decides
                weight.copy_(torch.randn(weight.shape, dtype=torch.float64, generator=generator).to(weight.dtype))

    def forward(self, x_TC: torch.Tensor, step: int, rank: int) -> torch.Tensor:
        x_TC, total = self.first(x_TC), x_TC.new_zeros(())
        for layer in self.layers:
            x_TC, loss = layer(x_TC, step, rank * max(COUNTS))
            total = total + loss
        loss_: torch.Tensor = self.last(x_TC).square().sum() / 8 + total
        return loss_


def batch(work: Work, step: int, index: int, rank: int) -> torch.Tensor:
    """The tokens [T, DIM] of one micro-batch."""
    number = (step * work.accumulation + index) * 4 + rank
    generator = torch.Generator().manual_seed(1000 + number)
    drawn = torch.randn(COUNTS[(step + 3 * rank + index) % len(COUNTS)], DIM, dtype=torch.float64, generator=generator)
    return drawn.to(getattr(torch, work.dtype))


def optimizer_of(work: Work, model: nn.Module) -> torch.optim.Optimizer:
    if work.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def alone(work: Work, size: int) -> dict[str, Any]:
    """The work of ``size`` ranks in one process: losses, gradients and norms of every step, and where it ends."""
    model = Tower(work)
    optimizer = optimizer_of(work, model)
    losses, norms, gradients = [], [], []
    for step in range(work.steps):
        for index, rank in itertools.product(range(work.accumulation), range(size)):
            loss = model(batch(work, step, index, rank), step * work.accumulation + index, rank)
            loss.backward()
            losses.append(loss.item())
        for parameter in model.parameters():
            if parameter.grad is not None and work.average:
                parameter.grad /= size
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "gradients": gradients, "state": model.state_dict()}


def train(mesh: Mesh, cells: list[Cell], folder: Path) -> list[dict[str, float]]:
    """The largest distances of each cell from the reference of its work, kept in ``folder``."""
    meshes = {1: mesh}
    found = []
    for cell in cells:
        if cell.mesh_ep not in meshes:
            meshes[cell.mesh_ep] = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=cell.mesh_ep)
        reference = torch.load(folder / cell.work.file)
        found.append(_train_one(meshes[cell.mesh_ep], cell, reference))
    return found


def _train_one(mesh: Mesh, cell: Cell, reference: dict[str, Any]) -> dict[str, float]:
    work = cell.work
    model: nn.Module = Tower(work, mesh, cell.ep, cell.node)
    options = {"stage": cell.stage, "bucket_bytes": cell.bucket_bytes, "shard_size": cell.shard_size}
    model, optimizer = tv.zero.shard(model, optimizer_of(work, model), mesh, average=work.average, **options)
    worst = {"loss": 0.0, "gradient": 0.0, "norm": 0.0, "weights": 0.0}
    for step in range(work.steps):
        for index in range(work.accumulation):
            number, rank = step * work.accumulation + index, mesh.data_rank
            loss = model(batch(work, step, index, rank), number, rank)
            expected = reference["losses"][number * mesh.data_size + rank]
            worst["loss"] = max(worst["loss"], abs(loss.item() - expected) / max(abs(expected), 1e-300))
            if cell.no_sync and index + 1 < work.accumulation:
                with tv.zero.no_sync(model):
                    loss.backward()
            else:
                loss.backward()
        worst["gradient"] = max(worst["gradient"], _gradients_off(model, reference["gradients"][step]))
        norm = float(optimizer.clip_grad_norm_(MAX_NORM))
        worst["norm"] = max(worst["norm"], abs(norm - reference["norms"][step]) / max(norm, 1e-300))
        optimizer.step()
        optimizer.zero_grad()
    state = tv.zero.full_state_dict(model)
    if mesh.rank == 0 and list(state) != list(reference["state"]):
        raise AssertionError(f"{list(state)} are the names, not {list(reference['state'])}")
    for name, value in state.items():
        worst["weights"] = max(worst["weights"], far(value, reference["state"][name]))
    return worst


def _gradients_off(model: nn.Module, expected: dict[str, torch.Tensor]) -> float:
    """How far this rank's pieces of gradients are off, relative to the norm of the whole parameter's."""
    shard_map, worst = shard_map_of(model), 0.0
    assert shard_map is not None
    for name, entry in shard_map.entries.items():
        if entry.piece is None:
            continue
        mine = entry.piece.tensor.grad
        if (mine is None) != (name not in expected):
            raise AssertionError(f"{name}: gradient {mine}, one rank alone {expected.get(name)}")
        if mine is not None:
            whole = expected[name].reshape(-1)
            part = whole[entry.piece.start : entry.piece.start + mine.numel()]
            worst = max(worst, float((mine.reshape(-1) - part).norm() / whole.norm().clamp_min(1e-300)))
    return worst


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm-wise relative distance."""
    return float((a - b).norm() / b.norm().clamp_min(1e-300))
