"""Several ranks in one process: threads that meet at a barrier, and modules cut at will."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from trivium.dist.shard import Entry, Piece, ShardMap, attach_shard_map

_SEEDING = threading.Lock()


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """What `build` makes after `seed` is set; one thread at a time, for the generator is the process's."""
    with _SEEDING:
        torch.manual_seed(seed)
        return build()


class _Room:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=240)
        self.slots: list[Any] = [None] * size


class ThreadPeers:
    """One rank among `size` threads; JSON really passes through JSON."""

    def __init__(self, room: _Room, rank: int, size: int) -> None:
        self.room, self.rank, self.size = room, rank, size

    def _exchange(self, value: Any) -> list[Any]:
        self.room.slots[self.rank] = value
        self.room.barrier.wait()
        found = list(self.room.slots)
        self.room.barrier.wait()
        return found

    def barrier(self) -> None:
        self.room.barrier.wait()

    def all_gather_json(self, value: Any) -> list[Any]:
        return [json.loads(text) for text in self._exchange(json.dumps(value))]

    def broadcast_json(self, value: Any, src: int = 0) -> Any:
        return self.all_gather_json(value)[src]

    def gather_tensor(self, tensor: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        found = self._exchange(tensor.clone())
        return found if self.rank == dst else None


def on_ranks(size: int, work: Callable[[ThreadPeers], Any]) -> list[Any]:
    """What `work` returns or raises on each rank."""
    room = _Room(size)

    def one(rank: int) -> Any:
        try:
            return work(ThreadPeers(room, rank, size))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def all_ok(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


class Cut:
    """A model of which this rank keeps, of each parameter, the elements between `cuts[rank]` and `cuts[rank + 1]`.

    The pieces are copies (as fp32 masters are); `publish` writes them back into the module.
    """

    def __init__(
        self, model: nn.Module, rank: int, cuts: dict[str, Sequence[int]], optimizer: Callable[..., Any] | None
    ) -> None:
        self.model, self.published = model, 0
        entries: dict[str, Entry] = {}
        owners: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in owners:
                entry = entries[owners[id(parameter)]]
                entry.names = (*entry.names, name)
                continue
            owners[id(parameter)] = name
            start, end = cuts[name][rank], cuts[name][rank + 1]
            piece = None
            if end > start or (parameter.numel() == 0 and rank == 0):
                piece = Piece(start=start, tensor=parameter.detach().flatten()[start:end].float().clone())
            entries[name] = Entry(names=(name,), shape=parameter.shape, dtype=parameter.dtype, piece=piece)
        self.entries = entries
        self.pieces = {name: entry.piece.tensor for name, entry in entries.items() if entry.piece is not None}
        attach_shard_map(model, ShardMap(entries=entries, publish=self.publish))
        self.optimizer = optimizer(list(self.pieces.values())) if optimizer is not None and self.pieces else None
        if optimizer is not None and not self.pieces:
            self.optimizer = optimizer([torch.zeros(1)])
            self.optimizer.param_groups[0]["params"].clear()

    def publish(self) -> None:
        self.published += 1
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                piece = self.entries[name].piece
                if piece is not None:
                    parameter.data.view(-1)[piece.start : piece.start + piece.tensor.numel()].copy_(piece.tensor)

    def step(self, seed: int) -> None:
        """One optimizer step on gradients that depend on name and element only, not on the cut."""
        for index, (name, tensor) in enumerate(self.pieces.items()):
            entry = self.entries[name]
            generator = torch.Generator().manual_seed(seed * 1000 + list(self.entries).index(name))
            whole = torch.randn(entry.shape.numel(), generator=generator)
            assert entry.piece is not None, index
            tensor.grad = whole[entry.piece.start : entry.piece.start + tensor.numel()].clone()
        if self.optimizer is not None:
            self.optimizer.step()


def even(model: nn.Module, size: int) -> dict[str, list[int]]:
    """Cuts of every parameter into `size` even parts, the first ones larger."""
    return {
        name: [-(-parameter.numel() * rank // size) for rank in range(size + 1)]
        for name, parameter in model.named_parameters()
    }
