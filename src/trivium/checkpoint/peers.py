"""The few collectives that saving and loading need, and how errors on one rank become errors on all.

ZeRO section 5: every rank writes and reads its own partition; only names, sizes and errors are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch

from trivium.base.errors import CapacityError, CheckpointError, ConfigError, MismatchError, RankError, TriviumError
from trivium.checkpoint.damage import DamagedError
from trivium.dist.launch import world_comm
from trivium.dist.mesh import Mesh

T = TypeVar("T")


class Peers(Protocol):
    """What a checkpoint needs of the other ranks; `dist.comm.Comm` offers it. Every method is a collective."""

    @property
    def rank(self) -> int:
        """This rank's number."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def barrier(self) -> None:
        """Return when every rank has come here."""

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""

    def broadcast_json(self, value: Any, src: int = 0) -> Any:
        """Rank ``src``'s value on every rank."""

    def gather_tensor(self, tensor: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        """The ranks' 1-D tensors, of uneven lengths, on rank ``dst``."""


class Alone:
    """A world of one."""

    rank = 0
    size = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def all_gather_json(self, value: Any) -> list[Any]:
        """This rank's value."""
        return [value]

    def broadcast_json(self, value: Any, src: int = 0) -> Any:
        """This rank's value."""
        return value

    def gather_tensor(self, tensor: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        """This rank's tensor."""
        return [tensor]


def peers_of(mesh: Mesh | Peers | None) -> Peers:
    """Everyone: the mesh's world, the peers given, or torch's default group (one process when there is none)."""
    if mesh is None:
        return world_comm()
    if isinstance(mesh, Mesh):
        return mesh.comm("world")
    return mesh


_CLASSES = MappingProxyType(
    {kind.__name__: kind for kind in (CapacityError, CheckpointError, ConfigError, DamagedError, MismatchError)}
)


def together(peers: Peers, phase: str, work: Callable[[], T]) -> T:
    """Run ``work`` on this rank; when it fails on any rank, raise on all of them, naming the first culprit.

    Collective. The culprit raises its own error, the others one of the same class that says whose it is.
    """
    result: T | None = None
    mine: BaseException | None = None
    try:
        result = work()
    except RankError:
        raise
    except (TriviumError, OSError, MemoryError, RuntimeError, ValueError, TypeError) as error:
        mine = error
    told = None if mine is None else {"class": type(mine).__name__, "message": str(mine) or repr(mine)}
    for rank, failure in enumerate(peers.all_gather_json(told)):
        if failure is None:
            continue
        if mine is not None and rank == peers.rank:
            raise mine
        kind = _CLASSES.get(failure["class"], CheckpointError)
        raise kind(f"rank {rank} failed while {phase}: {failure['message']}") from mine
    return result  # type: ignore[return-value]
