"""The ranks arranged along named axes, and the groups of each axis: made only here.

ZeRO section 1 (data parallel), DeepSpeed-MoE section 4.1 (expert parallel inside data parallel).

Axes, outermost first: ``pp`` (pipeline), ``dp`` (data), ``tp`` (tensor). ``ep`` (expert) subdivides ``dp``: its ranks
read different data; ``edp`` are the ranks that hold the same experts. ``world`` is everyone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from trivium.base.errors import ConfigError
from trivium.dist.comm import Comm, Link
from trivium.dist.ledger import Ledger


class Mesh:
    """Named axes over the processes of torch's default group. Building one is collective."""

    def __init__(
        self, *, rank: int, size: int, device: torch.device, ep: int = 1, tp: int = 1, pp: int = 1, delay_s: float = 0.0
    ) -> None:
        for name, degree in (("ep", ep), ("tp", tp), ("pp", pp)):
            if degree < 1:
                raise ConfigError(f"mesh.{name}={degree}: expected 1 or more")
        if size % (tp * pp):
            raise ConfigError(
                f"{size} ranks cannot be divided into tp={tp} × pp={pp} = {tp * pp}: "
                f"the number of ranks must be a multiple of {tp * pp}"
            )
        dp = size // (tp * pp)
        if dp % ep:
            raise ConfigError(
                f"ep={ep} does not divide the {dp} data-parallel ranks ({size} ranks / (tp·pp = {tp * pp}))"
            )
        self.rank, self.size, self.device = rank, size, device
        self.link = Link(device, delay_s)
        grid = torch.arange(size).view(pp, dp // ep, ep, tp)
        self._comms: dict[str, Comm] = {"world": self._comm("world", [list(range(size))])}
        self._comms["dp"] = self._comm("dp", grid.permute(0, 3, 1, 2).reshape(-1, dp).tolist())
        self._comms["edp"] = self._comm("edp", grid.permute(0, 2, 3, 1).reshape(-1, dp // ep).tolist())
        self._comms["ep"] = self._comm("ep", grid.permute(0, 1, 3, 2).reshape(-1, ep).tolist())
        self._comms["tp"] = self._comm("tp", grid.reshape(-1, tp).tolist())
        self._comms["pp"] = self._comm("pp", grid.permute(1, 2, 3, 0).reshape(-1, pp).tolist())

    @property
    def data_rank(self) -> int:
        """Which share of the data this rank reads."""
        return self._comms["dp"].rank

    @property
    def data_size(self) -> int:
        """How many ranks read different data."""
        return self._comms["dp"].size

    def comm(self, axis: str) -> Comm:
        """The collectives along ``axis`` for this rank."""
        if axis not in self._comms:
            raise ConfigError(f"the mesh has no axis {axis!r}; it has {', '.join(self._comms)}")
        return self._comms[axis]

    def split(self, axis: str, inner: int) -> tuple[Comm, Comm]:
        """Cut ``axis`` into groups of ``inner`` neighbouring ranks: (inside a group, across groups). Collective.

        Hybrid sharding: states are sharded inside and replicated across.
        """
        comm = self.comm(axis)
        if inner < 1 or comm.size % inner:
            raise ConfigError(f"cannot cut axis {axis} of {comm.size} ranks into groups of {inner}")
        if inner == comm.size:
            return comm, self._solo(f"{axis}/across")
        inside, across = f"{axis}/{inner}", f"{axis}/{inner}/across"
        if inside not in self._comms:
            every = self._unique_rows(comm)
            self._comms[inside] = self._comm(
                inside, [row[i : i + inner] for row in every for i in range(0, len(row), inner)]
            )
            self._comms[across] = self._comm(across, [row[i::inner] for row in every for i in range(inner)])
        return self._comms[inside], self._comms[across]

    def channel(self, comm: Comm, name: str) -> Comm:
        """The ranks of ``comm`` again, with an order of messages of their own. Collective over the whole mesh.

        The ``control`` channel is for small agreements: on the CPU, whatever the device.
        """
        key = f"{comm.axis}#{name}"
        if key not in self._comms:
            rows = self._unique_rows(comm)
            backend = "gloo" if name == "control" else None
            for row in rows:
                group = dist.new_group(row, backend=backend) if len(row) > 1 else None
                if self.rank in row:
                    self._comms[key] = Comm(comm.axis, row, self.rank, group, self.link, on_cpu=backend is not None)
        return self._comms[key]

    def ledger(self) -> AbstractContextManager[Ledger]:
        """``with mesh.ledger() as sent:`` counts what this rank sends inside the block."""
        return self.link.books.open()

    def _unique_rows(self, comm: Comm) -> list[list[int]]:
        """The groups of this axis, every rank's, in one order on every rank."""
        rows = self.comm("world").all_gather_json(list(comm.ranks))
        return [list(row) for row in dict.fromkeys(tuple(row) for row in rows)]

    def _solo(self, axis: str) -> Comm:
        return Comm(axis, [self.rank], self.rank, None, self.link)

    def _comm(self, axis: str, rows: list[list[int]]) -> Comm:
        mine: Comm | None = None
        for row in rows:
            group: dist.ProcessGroup | None = None
            if 1 < len(row) < self.size:
                group = dist.new_group(row)
            elif len(row) == self.size and self.size > 1:
                group = dist.group.WORLD
            if self.rank in row:
                mine = Comm(axis, row, self.rank, group, self.link)
        if mine is None:
            raise ConfigError(f"rank {self.rank} is in no group of axis {axis}")
        return mine
