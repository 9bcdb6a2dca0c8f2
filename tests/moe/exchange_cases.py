"""What the ranks run for the tests of exchange strategies: one layer, forward and backward, every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch

import trivium as tv
from trivium.base.errors import MismatchError, TriviumError
from trivium.dist.exchange import ExchangeConfig, _ranks_per_host
from trivium.dist.mesh import Mesh
from trivium.moe import MoE

DIM, FFN, EXPERTS, TOP_K = 6, 10, 24, 3
ROW_BYTES = 4 * DIM


def make(mesh: Any, exchange: Any) -> MoE:
    torch.manual_seed(3)
    layer = MoE(DIM, FFN, EXPERTS, TOP_K, mesh=mesh, seed=5, init_std=0.5, exchange=exchange)
    with torch.no_grad():
        drawn = torch.randn(EXPERTS, DIM, generator=torch.Generator().manual_seed(9))
        layer.get_submodule("gate").get_parameter("weight").copy_(drawn)
    return layer


def counted(mesh: Mesh, layer: MoE, x_TC: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    x_TC = x_TC.clone().requires_grad_()
    with mesh.ledger() as sent:
        y_TC, aux = layer(x_TC)
        (y_TC.square().sum() + aux.loss).backward()
    found = {"y": y_TC.detach(), "x": x_TC.grad, "load": aux.load}
    found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}  # type: ignore[misc]
    tallies = {
        f"{key.phase} on {key.axis}": (sent.num_messages[key], sent.sent_bytes[key]) for key in sent.num_messages
    }
    return found, tallies  # type: ignore[return-value]


def every_way(mesh: Any, ep: int, tp: int, exchanges: list[dict[str, Any]], counts: list[int]) -> Any:
    """Per exchange: names of what differs from flat in any bit, and the ledger's tallies; last this rank's load."""
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=ep, tp=tp)
    data = spread.comm("ep").rank
    x_TC = torch.randn(counts[data], DIM, generator=torch.Generator().manual_seed(40 + data))
    results = [counted(spread, make(spread, ExchangeConfig(**one)), x_TC) for one in exchanges]
    flat = results[0][0]
    different = [
        [name for name in found if name in flat and not torch.equal(found[name], flat[name])] for found, _ in results
    ]
    return different, [tallies for _, tallies in results], flat["load"].tolist(), sorted(flat)


def apart(mesh: Any, how: str) -> str:
    """What a rank is told whose tensor-parallel neighbour has other tokens, or the same in another order."""
    layer = make(Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=1, tp=mesh.size), "coordinated")
    x_TC = torch.randn(4, DIM, generator=torch.Generator().manual_seed(mesh.rank if how == "other" else 0))
    try:
        layer(x_TC.flip(0) if how == "permuted" and mesh.rank == 1 else x_TC)
    except MismatchError as error:
        return str(error)
    return "no error"


class Net(torch.nn.Module):
    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self.a, self.moe = torch.nn.Linear(DIM, DIM), make(mesh, "coordinated")


def under_zero(mesh: Any, folder: Path) -> list[str]:
    """What `shard`, `save` and the export answer to experts that lie apart over the tensor axis."""
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=1, tp=mesh.size)
    model = Net(spread)
    said = []
    for call in (
        lambda: tv.zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), spread, stage=1),
        lambda: tv.checkpoint.save(folder / "saved", model=model, mesh=spread),
        lambda: tv.checkpoint.save_hugging_face(model, folder / "exported", mesh=spread),
    ):
        try:
            call()
        except TriviumError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def hosts(mesh: Any, names: list[str]) -> int:
    """`_ranks_per_host` where the ranks' hosts are called ``names``."""
    with mock.patch("socket.gethostname", lambda: names[mesh.rank]):
        return _ranks_per_host(mesh.comm("dp"))
