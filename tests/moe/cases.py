"""What the ranks run for the tests of expert parallelism, and the one-hot oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import trivium as tv
from trivium.base.errors import ConfigError, MismatchError, NonFiniteError
from trivium.dist.mesh import Mesh
from trivium.moe import Gating, MoE, Routing
from trivium.nn import MLP

DIM, FFN, EXPERTS = 6, 10, 8


def oracle(layer: MoE, x_TC: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The paper's one-hot einsums, every expert over slots [E, S]: slot s of expert e holds its s-th choice."""
    num_tokens, top_k = routing.experts_TK.shape
    size = max(1, num_tokens * top_k)
    mask_TKE = torch.nn.functional.one_hot(routing.experts_TK, layer.num_experts) * routing.kept_TK[..., None]
    flat_SE = mask_TKE.reshape(-1, layer.num_experts)
    places_SE = (flat_SE.cumsum(0) - 1).clamp_min(0)
    hot = torch.nn.functional.one_hot(places_SE, size) * flat_SE[..., None]
    hot_TKES = hot.view(num_tokens, top_k, layer.num_experts, size).to(x_TC.dtype)
    slots_ESC = torch.einsum("tkes,tc->esc", hot_TKES, x_TC)
    outs_ESC = torch.stack([layer.experts.get_submodule(str(e))(slots_ESC[e]) for e in range(layer.num_experts)])
    return torch.einsum("tkes,tk,esc->tc", hot_TKES, routing.weights_TK, outs_ESC)


def make(mesh: Any = None, **options: Any) -> MoE:
    torch.manual_seed(3)
    layer = MoE(DIM, FFN, EXPERTS, mesh=mesh, seed=5, dtype=torch.float64, init_std=0.5, **options)
    with torch.no_grad():  # a router that decides
        drawn = torch.randn(EXPERTS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        layer.get_submodule("gate").get_parameter("weight").copy_(drawn)
    return layer


def tokens(rank: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(count, DIM, dtype=torch.float64, generator=generator)


def run(layer: MoE, x_TC: torch.Tensor, routing: Routing | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    x_TC = x_TC.clone().requires_grad_()
    y_TC, aux = layer(x_TC, routing)
    (y_TC.square().sum() + y_TC.sum() + aux.loss).backward()
    grad = x_TC.grad
    return y_TC.detach(), torch.zeros_like(x_TC) if grad is None else grad


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm-wise relative distance."""
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def parallel_equals_alone(mesh: Any, cells: list[tuple[list[int], dict[str, Any], int | None]]) -> list[float]:
    """The largest distance per cell between this rank in an expert-parallel world and one rank with all tokens.

    A cell: tokens per rank, the layer's options, and an expert that takes everything, or None.
    """
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=mesh.size)
    found = []
    for counts, options, everything in cells:
        layer, alone = make(spread, **options), make(**options)
        forced = [force(count, everything, layer.top_k) for count in counts]
        outs = [run(alone, tokens(rank, count), forced[rank]) for rank, count in enumerate(counts)]
        y_TC, grad_TC = run(layer, tokens(mesh.rank, counts[mesh.rank]), forced[mesh.rank])
        distances = [far(y_TC, outs[mesh.rank][0]), far(grad_TC, outs[mesh.rank][1])]
        theirs = dict(alone.named_parameters())
        for name, parameter in layer.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            if not name.startswith("experts."):
                total = [torch.empty_like(grad) for _ in range(mesh.size)]
                spread.comm("ep").all_gather(
                    flat := torch.empty(grad.numel() * mesh.size, dtype=grad.dtype), grad.reshape(-1), "test"
                ).wait()
                total = list(flat.view(mesh.size, *grad.shape))
                grad = torch.stack(total).sum(0)
            expected = theirs[name].grad
            distances.append(far(grad, torch.zeros_like(grad) if expected is None else expected))
            distances.append(far(parameter.detach(), theirs[name].detach()))
        found.append(max(distances))
    return found


def force(count: int, expert: int | None, top_k: int) -> Routing | None:
    if expert is None:
        return None
    experts_TK = (torch.arange(top_k).expand(count, top_k) + expert) % EXPERTS
    return Routing(
        experts_TK=experts_TK.contiguous(),
        weights_TK=torch.empty(count, top_k),
        kept_TK=torch.ones(count, top_k, dtype=torch.bool),
    )


def held(mesh: Any) -> list[str]:
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=mesh.size)
    layer = make(spread)
    return [*(name for name, _ in layer.experts.named_children()), layer.experts.placement.axis]


def bytes_sent(mesh: Any) -> tuple[int, int]:
    """(what the ledger saw for rows, what the routing says must cross)."""
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=mesh.size)
    layer = make(spread)
    x_TC = tokens(mesh.rank, 7).requires_grad_()
    mine = {int(name) for name, _ in layer.experts.named_children()}
    with spread.ledger() as sent:
        y_TC, aux = layer(x_TC)
        y_TC.sum().backward()
    away = sum(int(load) for number, load in enumerate(aux.load) if number not in mine)
    phases = sent.bytes_by("phase")
    return phases["dispatch"] + phases["combine.backward"], 2 * away * DIM * 8


def nan_on_one(mesh: Any) -> str:
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=mesh.size)
    layer = make(spread)
    x_TC = tokens(mesh.rank, 5)
    if mesh.rank == 1:
        x_TC[3, 0] = float("nan")
    try:
        layer(x_TC)
    except NonFiniteError as error:
        return str(error)
    return "no error"


def wrong_routing_on_one(mesh: Any) -> str:
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=mesh.size)
    try:
        make(spread)(tokens(mesh.rank, 5), force(3, 0, 2) if mesh.rank == 1 else None)
    except (ConfigError, MismatchError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def only_one_rank_hit(mesh: Any) -> bool:
    """Whether an expert of this rank got a gradient, when all tokens, which need none, go to the first expert."""
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=mesh.size)
    layer = make(spread, top_k=1)
    layer.get_submodule("gate").requires_grad_(False)
    y_TC, _ = layer(tokens(mesh.rank, 4), force(4, 0, 1))
    y_TC.sum().backward()
    return any(parameter.grad is not None for parameter in layer.experts.parameters())


def degree_of_its_own(mesh: Any) -> tuple[list[str], str, float]:
    """A layer with ep=2 on a mesh of two ranks without expert parallelism."""
    layer, alone = make(mesh, ep=2), make()
    y_TC, _ = run(layer, tokens(mesh.rank, 5))
    expected, _ = run(alone, tokens(mesh.rank, 5))
    return [name for name, _ in layer.experts.named_children()], layer.experts.placement.axis, far(y_TC, expected)


class Beside(torch.nn.Module):
    """Tokens beside what an MLP, or the experts in its place, makes of them."""

    def __init__(self, mlp: torch.nn.Module | None, moe: MoE | None) -> None:
        super().__init__()
        if mlp is not None:
            self.mlp = mlp
        if moe is not None:
            self.moe = moe

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        return x_TC + (self.mlp(x_TC) if "mlp" in self._modules else self.moe(x_TC)[0])


def upcycled(mesh: Any) -> tuple[float, int]:
    """How far experts on several ranks are from the dense MLP they were made of, and how many this rank holds."""
    torch.manual_seed(0)
    dense = Beside(MLP(DIM, FFN, init_std=0.5, dtype=torch.float64), None)
    moe = make(Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=mesh.size))
    sparse, x_TC = Beside(None, moe), tokens(mesh.rank, 5 + mesh.rank)
    tv.moe.upcycle(sparse, dense)
    return far(sparse(x_TC).detach(), dense(x_TC).detach()), len(moe.experts.numbers)


class WrongGate(torch.nn.Module):
    """A gate of top-1 among 4 experts that gets one thing wrong."""

    def __init__(self, wrong: dict[str, Callable[[torch.Tensor], Any]] | None) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x_TC: torch.Tensor, **options: Any) -> Any:
        logits_TE = torch.zeros(len(x_TC), 4)
        parts = {
            "logits_TE": logits_TE,
            "probabilities_TE": logits_TE.softmax(-1),
            "experts_TK": torch.arange(len(x_TC)).remainder(4)[:, None],
            "weights_TK": torch.ones(len(x_TC), 1),
        }
        if self.wrong is None:
            return tuple(parts.values())
        return Gating(**{**parts, **{name: change(parts[name]) for name, change in self.wrong.items()}})


class Stack(torch.nn.Module):
    def __init__(self, mesh: Any = None) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(make(mesh, top_k=1) for _ in range(2))

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        loss = torch.zeros((), dtype=x_TC.dtype)
        for block in self.blocks:
            y_TC, aux = block(x_TC)
            x_TC, loss = x_TC + y_TC, loss + aux.loss
        return loss + x_TC.square().mean()


def sharded(mesh: Any, stage: int, ep: int) -> float:
    """How far three steps end from one process that runs the ranks' micro-batches in turn."""
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=ep)
    torch.manual_seed(0)
    alone, model = Stack(), Stack(spread)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (alone, model)]
    model, optimizer = tv.zero.shard(model, optimizers[1], spread, stage=stage)
    for step in range(3):
        for rank in range(mesh.size):
            (alone(tokens(10 * step + rank, 3)) / mesh.size).backward()
        model(tokens(10 * step + mesh.rank, 3)).backward()
        for each in (optimizers[0], optimizer):
            each.step()
            each.zero_grad()
    state = tv.zero.full_state_dict(model)
    expected = alone.state_dict()
    return max((far(value, expected[name]) for name, value in state.items()), default=0.0)
