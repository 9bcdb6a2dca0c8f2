"""The ranks arranged along named axes, and the groups of each axis: made only here.

ZeRO section 1 (data parallel), DeepSpeed-MoE section 4.1 (expert parallel inside data parallel).

Axes, outermost first: ``pp`` (pipeline), ``dp`` (data), ``tp`` (tensor). ``ep`` (expert) subdivides ``dp``: its ranks
read different data; ``edp`` are the ranks that hold the same experts. ``world`` is everyone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import timedelta

import torch
import torch.distributed as dist

from trivium.base.errors import ConfigError
from trivium.dist.comm import Comm, Link
from trivium.dist.ledger import Ledger

Rows = list[list[int]]


def axis_rows(size: int, *, ep: int = 1, tp: int = 1, pp: int = 1) -> dict[str, Rows]:
    """The groups of every axis of ``size`` ranks; every rank is in one group of each. ``ep·tp·pp`` divides ``size``."""
    outer = size // (tp * pp * ep)

    def at(p: int, o: int, e: int, t: int) -> int:
        return ((p * outer + o) * ep + e) * tp + t

    pipes, outers, experts, tensors = range(pp), range(outer), range(ep), range(tp)
    return {
        "world": [list(range(size))],
        "dp": [[at(p, o, e, t) for o in outers for e in experts] for p in pipes for t in tensors],
        "edp": [[at(p, o, e, t) for o in outers] for p in pipes for e in experts for t in tensors],
        "ep": [[at(p, o, e, t) for e in experts] for p in pipes for o in outers for t in tensors],
        "tp": [[at(p, o, e, t) for t in tensors] for p in pipes for o in outers for e in experts],
        "pp": [[at(p, o, e, t) for p in pipes] for o in outers for e in experts for t in tensors],
    }


def split_rows(rows: Rows, inner: int) -> tuple[Rows, Rows]:
    """Each row cut into groups of ``inner`` neighbours, and the ranks at the same place of every group of a row."""
    inside = [row[start : start + inner] for row in rows for start in range(0, len(row), inner)]
    return inside, [row[place::inner] for row in rows for place in range(inner)]


class Mesh:
    """Named axes over the processes of torch's default group. Building one is collective.

    ``timeout_s``: how long a collective of any axis waits for its peers; None: what torch gives a new group.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        device: torch.device,
        ep: int = 1,
        tp: int = 1,
        pp: int = 1,
        delay_s: float = 0.0,
        timeout_s: float | None = None,
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
        self._timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        self._rows: dict[str, Rows] = {}
        self._comms: dict[str, Comm] = {}
        for axis, rows in axis_rows(size, ep=ep, tp=tp, pp=pp).items():
            self._add(axis, rows)

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
            return comm, self._add(f"{axis}/alone", [[rank] for rank in range(self.size)])  # no name of another cut
        inside_rows, across_rows = split_rows(self._rows[axis], inner)
        return self._add(f"{axis}/{inner}", inside_rows), self._add(f"{axis}/{inner}/across", across_rows)

    def channel(self, comm: Comm, name: str) -> Comm:
        """The ranks of ``comm`` again, with an order of messages of their own. Collective over the whole mesh.

        The ``control`` channel is for small agreements: on the CPU, whatever the device.
        """
        key = f"{comm.axis}#{name}"
        if key not in self._comms:
            backend = "gloo" if name == "control" else None
            for row in self._rows[comm.axis]:
                group = dist.new_group(row, self._timeout, backend) if len(row) > 1 else None
                if self.rank in row:
                    self._comms[key] = Comm(comm.axis, row, self.rank, group, self.link, on_cpu=backend is not None)
        return self._comms[key]

    def ledger(self) -> AbstractContextManager[Ledger]:
        """``with mesh.ledger() as sent:`` counts what this rank sends inside the block."""
        return self.link.books.open()

    def _add(self, axis: str, rows: Rows) -> Comm:
        """The axis made of ``rows``, its groups made when it is first asked for."""
        if axis not in self._comms:
            self._rows[axis] = rows
            self._comms[axis] = self._comm(axis, rows)
        return self._comms[axis]

    def _comm(self, axis: str, rows: Rows) -> Comm:
        mine: Comm | None = None
        for row in rows:
            group: dist.ProcessGroup | None = None
            if 1 < len(row) < self.size:
                group = dist.new_group(row, self._timeout)
            elif len(row) == self.size and self.size > 1:
                group = dist.group.WORLD
            if self.rank in row:
                mine = Comm(axis, row, self.rank, group, self.link)
        if mine is None:
            raise ConfigError(f"rank {self.rank} is in no group of axis {axis}")
        return mine
