"""What the ranks run for tests/zero/test_experts.py: experts apart that differ, fail, freeze or stay idle."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import trivium as tv
from tests.clock import Since
from tests.zero.cases import message_of
from trivium.dist.mesh import Mesh
from trivium.dist.shard import Placement
from trivium.moe import MoE, Routing
from trivium.zero.api import engine_of

DIM = 6


class Net(nn.Module):
    """A dense layer, four experts, a dense layer."""

    def __init__(self, mesh: Mesh | None, *, ffn: int = 5, ep: int | None = None, experts: int = 4) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(DIM, DIM, dtype=torch.float64)
        self.moe = MoE(DIM, ffn, experts, top_k=1, mesh=mesh, ep=ep, seed=1, dtype=torch.float64, init_std=0.5)
        self.last = nn.Linear(DIM, 2, dtype=torch.float64)

    def forward(self, x_TC: torch.Tensor, routing: Routing | None = None) -> torch.Tensor:
        y_TC, aux = self.moe(self.first(x_TC), routing)
        loss: torch.Tensor = self.last(y_TC).square().sum() + aux.loss
        return loss


def spread(mesh: Mesh, ep: int | None = None) -> Mesh:
    return Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=mesh.size if ep is None else ep)


def models_that_differ(mesh: Mesh, what: str) -> tuple[str, float]:
    """The last rank's experts are others than its peers' of the same axis: the error on each rank, and how soon."""
    last = mesh.rank == mesh.size - 1
    made = spread(mesh, 2)
    net = Net(made, ffn=5, ep=2)
    expert = next(iter(net.moe.experts.children()))
    if what == "shape" and last:  # other sizes given to the layer itself are told when it is built
        first = next(expert.parameters())
        first.data = torch.zeros(first.shape[0] + 1, first.shape[1], dtype=first.dtype)
    if what == "frozen" and last:
        expert.requires_grad_(False)
    if what == "values" and last:
        with torch.no_grad():
            next(expert.parameters()).add_(1.0)
    if what == "dense" and last:
        net.last = nn.Linear(DIM, 3, dtype=torch.float64)
    if what == "names":  # every rank calls its experts 0, 1, …: as if they were the same
        net.moe.experts._modules = {str(i): m for i, m in enumerate(net.moe.experts._modules.values())}
    if what == "degree" and last:
        net.moe.experts.placement = Placement(axis="dp")
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    if what == "optimizer" and last:
        optimizer = torch.optim.AdamW([p for n, p in net.named_parameters() if "experts" not in n], lr=0.1)
    since = Since()
    said = message_of(lambda: tv.zero.shard(net, optimizer, made, stage=3))
    return said, since.seconds()


def to_expert(number: int, num_tokens: int) -> Routing:
    return Routing(
        experts_TK=torch.full((num_tokens, 1), number),
        weights_TK=torch.empty(num_tokens, 1),
        kept_TK=torch.ones(num_tokens, 1, dtype=torch.bool),
    )


def poisoned(mesh: Mesh) -> list[tuple[Any, ...]]:
    """A gradient that is not finite in one expert of the last rank, and nowhere else: all skip, then all go on."""
    found = []
    for stage in range(4):
        made = spread(mesh)
        net, optimizer = tv.zero.shard(net := Net(made), torch.optim.AdamW(net.parameters(), lr=0.1), made, stage=stage)
        before = {name: tensor.clone() for name, tensor in tv.zero.iter_full(net)}
        with tv.zero.gathered(net):
            hooks = [
                parameter.register_hook(lambda gradient: gradient * float("nan"))
                for name, parameter in net.named_parameters()
                if name.startswith("moe.experts.3.")
            ]
        x_TC = torch.ones(4, DIM, dtype=torch.float64)
        net(x_TC, to_expert(3, 4)).backward()
        norm = optimizer.clip_grad_norm_(1.0)
        finite = optimizer.finite
        optimizer.step()
        same = all(torch.equal(tensor, before[name]) for name, tensor in tv.zero.iter_full(net))
        for hook in hooks:
            hook.remove()
        optimizer.zero_grad()
        net(x_TC, to_expert(3, 4)).backward()
        optimizer.step()
        moved = {name for name, tensor in tv.zero.iter_full(net) if not torch.equal(tensor, before[name])}
        experts = sorted({name.split(".")[2] for name in moved if "experts" in name})
        found.append((bool(norm.isnan()), finite, same, optimizer.num_skipped_steps, experts))
    return found


def traffic(mesh: Mesh, stage: int) -> dict[str, int]:
    """Bytes of one step by axis, with experts apart on all ranks."""
    made = spread(mesh)
    net: nn.Module = Net(made)
    net, optimizer = tv.zero.shard(net, torch.optim.SGD(net.parameters(), lr=0.1), made, stage=stage)
    with made.ledger() as sent:
        net(torch.ones(4, DIM, dtype=torch.float64)).backward()
        optimizer.step()
    axes = sent.bytes_by("axis")
    held = sum(
        piece.tensor.numel()
        for name, entry in _entries(net).items()
        if "experts" in name and (piece := entry.piece) is not None
    )
    return {"edp": axes.get("edp", 0), "dp": axes.get("dp", 0), "held": held}


def _entries(net: nn.Module) -> Any:
    from trivium.dist.shard import shard_map_of

    found = shard_map_of(net)
    assert found is not None
    return found.entries


def different_kinds(mesh: Mesh) -> tuple[list[str], float]:
    """Experts that differ by number: one frozen, one of another shape, one without parameters; trained as alone."""

    def expert(number: int) -> nn.Module:
        if number == 1:
            return nn.Tanh()
        layer = nn.Linear(DIM, DIM, bias=number != 2, dtype=torch.float64)
        return layer.requires_grad_(False) if number == 0 else layer

    def build(made: Mesh | None) -> nn.Module:
        net = Net(None)
        net.moe = MoE(DIM, 1, 5, top_k=2, mesh=made, expert=expert, seed=1, dtype=torch.float64)
        return net

    worst = 0.0
    names: list[str] = []
    for stage in range(4):
        made = spread(mesh)
        alone, net = build(None), build(made)
        optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (alone, net)]
        net, optimizer = tv.zero.shard(net, optimizers[1], made, stage=stage)
        for step in range(3):
            drawn = torch.randn(mesh.size, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            for rank in range(mesh.size):
                (alone(drawn[rank]) / mesh.size).backward()
            net(drawn[mesh.rank]).backward()
            for one in (optimizers[0], optimizer):
                one.step()
                one.zero_grad()
        state = tv.zero.full_state_dict(net)
        expected = alone.state_dict()
        if mesh.rank == 0:
            names = [] if list(state) == list(expected) else [*state]
        for name, value in state.items():
            worst = max(worst, float((value - expected[name]).abs().max()))
    return names, worst


def units_everywhere(mesh: Mesh) -> list[str]:
    """The units of a model of which every module was asked to be one."""
    made = spread(mesh)
    net: nn.Module = nn.Sequential(nn.Linear(DIM, DIM, dtype=torch.float64), Net(made))
    net, _ = tv.zero.shard(net, None, made, stage=3, units=lambda name, module: True)
    return [unit.name for unit in engine_of(net).units]
