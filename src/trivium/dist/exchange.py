"""Bring rows to the ranks that own them and the results home: one all-to-all, by steps that suit the links.

DeepSpeed-MoE section 5.3: flat O(p), hierarchical O(G + p/G), coordinated with a tensor axis O(p/L) + O(L) messages.

R rows, sorted by owner; S sources, which have rows; O owners, which work on them. ``counts_SO[s][o]`` rows go from
source s to owner o; every rank knows the whole table. All strategies give an owner the same rows in the same order (by
source) and a source its rows in the order it had them, so results are equal bit for bit.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch

from trivium.base.errors import ConfigError
from trivium.dist.comm import Comm
from trivium.dist.mesh import Mesh
from trivium.dist.uneven import exchange_rows, gather_rows

Kind = Literal["auto", "flat", "hierarchical", "coordinated"]
Counts = Sequence[Sequence[int]]

@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How rows travel. ``kind``: ``flat``, one message to every rank; ``hierarchical``, inside a node of ``node``
    neighbouring ranks, then across nodes; ``coordinated``, experts spread over the tensor axis too, whose ranks hold
    identical tokens; ``auto``, flat, but hierarchical where ``crossover_bytes`` is given, there are several nodes and a
    flat message would be shorter than that. ``node`` None: as many as share a host.
    """

    kind: Kind = "auto"
    node: int | None = None
    crossover_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "flat", "hierarchical", "coordinated"):
            raise ConfigError(
                f"exchange={self.kind!r}: expected 'auto', 'flat', 'hierarchical', 'coordinated' or a config"
            )
        if self.node is not None and self.node < 1:
            raise ConfigError(f"exchange.node={self.node}: expected the number of ranks of one node, or None")
        if self.crossover_bytes is not None and self.crossover_bytes < 0:
            raise ConfigError(f"exchange.crossover_bytes={self.crossover_bytes}: expected 0 or more")
        if self.kind == "flat" and self.node is not None:
            raise ConfigError(
                f"exchange.node={self.node} has no effect with kind='flat': leave it out, or take 'hierarchical'"
            )
        if self.kind == "auto" and self.node is not None and self.crossover_bytes is None:
            raise ConfigError(
                f"exchange.node={self.node} has no effect with kind='auto', which is flat unless exchange.crossover_bytes "
                "is given: give it, or take 'hierarchical'"
            )
        if self.kind != "auto" and self.crossover_bytes is not None:
            raise ConfigError(
                f"exchange.crossover_bytes={self.crossover_bytes} has no effect with kind={self.kind!r}: it is where "
                "'auto' changes from hierarchical to flat; leave it out, or take 'auto'"
            )


class Exchange(ABC):
    """One way to exchange rows. Every method is collective over the ranks that take part.

    ``sources`` ranks have rows of their own, this one is ``source`` of them, and ``ranks`` are their numbers in the
    world; ``owners`` are those that work on rows, this one is ``owner`` of them. ``compares``: some must have alike
    rows, and the numbers agreed on hold a digest of them.
    """

    compares = False

    def __init__(self, ranks: Sequence[int], source: int, owners: int, owner: int) -> None:
        self.ranks, self.source = tuple(ranks), source
        self.sources = len(self.ranks)
        self.owners, self.owner = owners, owner

    @abstractmethod
    def agree(self, numbers: Sequence[int], phase: str) -> list[list[int]]:
        """Every source's ``numbers``, by source. The first is a status: 0 where all is well."""

    @abstractmethod
    def send(self, rows_RC: torch.Tensor, counts_SO: Counts, phase: str) -> torch.Tensor:
        """This source's rows, sorted by owner → this owner's, sorted by source."""

    @abstractmethod
    def home(self, rows_RC: torch.Tensor, counts_SO: Counts, phase: str) -> torch.Tensor:
        """The way back: this owner's rows, sorted by source → this source's, sorted by owner."""


class Flat(Exchange):
    """Every rank to every other: p - 1 messages."""

    def __init__(self, comm: Comm) -> None:
        super().__init__(comm.ranks, comm.rank, comm.size, comm.rank)
        self._comm = comm

    def agree(self, numbers: Sequence[int], phase: str) -> list[list[int]]:
        """One all-to-all of integers."""
        return self._comm.swap(numbers, phase)

    def send(self, rows_RC: torch.Tensor, counts_SO: Counts, phase: str) -> torch.Tensor:
        """One exchange."""
        receive = [row[self.owner] for row in counts_SO]
        return exchange_rows(self._comm, rows_RC, counts_SO[self.source], receive, phase)

    def home(self, rows_RC: torch.Tensor, counts_SO: Counts, phase: str) -> torch.Tensor:
        """One exchange."""
        return self.send(rows_RC, _turned(counts_SO), phase)


class Hierarchical(Exchange):
    """Inside a node of G ranks, then across the p/G nodes: (G - 1) + (p/G - 1) messages, up to twice the bytes.

    A rank first hands its neighbour g all rows for the g-th ranks of any node, then these go to that node.
    """

    def __init__(self, comm: Comm, inside: Comm, across: Comm) -> None:
        super().__init__(comm.ranks, comm.rank, comm.size, comm.rank)
        self._inside, self._across = inside, across

    def agree(self, numbers: Sequence[int], phase: str) -> list[list[int]]:
        """The node's numbers first, then every node's."""
        node = [number for row in self._inside.swap(numbers, phase) for number in row]
        width = len(numbers)
        return [
            flat[start : start + width]
            for flat in self._across.swap(node, phase)
            for start in range(0, len(flat), width)
        ]

    def send(self, rows_RC: torch.Tensor, counts_SO: Counts, phase: str) -> torch.Tensor:
        """Two exchanges, a change of layout before each."""
        size, nodes, place = self._inside.size, self._across.size, self._inside.rank
        first = self._across.rank * size  # of this node
        mine = counts_SO[self.source]
        rows_RC = _reorder(rows_RC, mine, [m * size + g for g in range(size) for m in range(nodes)])
        to_place = [sum(mine[g::size]) for g in range(size)]
        of_node = [counts_SO[first + g][place::size] for g in range(size)]  # [G][node]: for this place
        rows_RC = exchange_rows(self._inside, rows_RC, to_place, [sum(row) for row in of_node], phase)
        segments = [count for row in of_node for count in row]
        rows_RC = _reorder(rows_RC, segments, [g * nodes + m for m in range(nodes) for g in range(size)])
        to_node = [sum(column) for column in zip(*of_node, strict=True)]
        receive = [sum(counts_SO[m * size + g][self.owner] for g in range(size)) for m in range(nodes)]
        return exchange_rows(self._across, rows_RC, to_node, receive, phase)

    def home(self, rows_RC: torch.Tensor, counts_SO: Counts, phase: str) -> torch.Tensor:
        """The same two steps, each rank's part turned round."""
        return self.send(rows_RC, _turned(counts_SO), phase)


class BySize(Exchange):
    """Flat or hierarchical for each exchange, by the mean bytes of a flat message; all ranks know the same table."""

    def __init__(self, flat: Flat, hierarchical: Hierarchical, crossover_bytes: int) -> None:
        super().__init__(flat.ranks, flat.source, flat.owners, flat.owner)
        self._flat, self._hierarchical, self._crossover_bytes = flat, hierarchical, crossover_bytes

    def agree(self, numbers: Sequence[int], phase: str) -> list[list[int]]:
        """Hierarchical: the messages are short."""
        return self._hierarchical.agree(numbers, phase)

    def send(self, rows_RC: torch.Tensor, counts_SO: Counts, phase: str) -> torch.Tensor:
        """By the one or the other."""
        return self._chosen(rows_RC, counts_SO).send(rows_RC, counts_SO, phase)

    def home(self, rows_RC: torch.Tensor, counts_SO: Counts, phase: str) -> torch.Tensor:
        """By the one or the other."""
        return self._chosen(rows_RC, counts_SO).home(rows_RC, counts_SO, phase)

    def _chosen(self, rows_RC: torch.Tensor, counts_SO: Counts) -> Exchange:
        row_bytes = rows_RC[:0].element_size() * rows_RC.shape[1:].numel()
        mean_bytes = sum(map(sum, counts_SO)) * row_bytes / (self.sources * self.owners)
        return self._hierarchical if mean_bytes < self._crossover_bytes else self._flat


class Coordinated(Exchange):
    """With a tensor axis of L ranks that hold identical tokens: p/L - 1 messages, and L - 1 to gather.

    Owner e·L + t is tensor rank t of source e's group, so a rank needs only exchange with its like, over ``inner``, and
    only the rows for owners of its own t; what the others' owners make is gathered inside the tensor group. Gradients
    take the same ways, each counted once.
    """

    APART = 3
    compares = True

    def __init__(self, inner: Exchange, tensor: Comm) -> None:
        super().__init__(inner.ranks, inner.source, inner.owners * tensor.size, inner.owner * tensor.size + tensor.rank)
        self._inner, self._tensor = inner, tensor

    def agree(self, numbers: Sequence[int], phase: str) -> list[list[int]]:
        """First inside the tensor group: a rank that failed, or whose tokens differ, stops all of them."""
        rows = self._tensor.swap(numbers, phase)
        status = max(row[0] for row in rows)
        if not status and any(row != rows[0] for row in rows):
            status = self.APART + 4 * self._tensor.ranks[0]
        return self._inner.agree([status, *numbers[1:]], phase)

    def send(self, rows_RC: torch.Tensor, counts_SO: Counts, phase: str) -> torch.Tensor:
        """Exchange the rows for owners of this tensor rank."""
        size, place = self._tensor.size, self._tensor.rank
        mine = counts_SO[self.source]
        rows_RC = _reorder(rows_RC, mine, list(range(place, self.owners, size)))
        return self._inner.send(rows_RC, [row[place::size] for row in counts_SO], phase)

    def home(self, rows_RC: torch.Tensor, counts_SO: Counts, phase: str) -> torch.Tensor:
        """Exchange them back, then gather the other tensor ranks'."""
        size, place, groups = self._tensor.size, self._tensor.rank, self._inner.owners
        mine = counts_SO[self.source]
        rows_RC = self._inner.home(rows_RC, [row[place::size] for row in counts_SO], phase)
        rows_RC = gather_rows(self._tensor, rows_RC, [sum(mine[t::size]) for t in range(size)], phase)
        segments = [mine[e * size + t] for t in range(size) for e in range(groups)]
        return _reorder(rows_RC, segments, [t * groups + e for e in range(groups) for t in range(size)])


class Send(torch.autograd.Function):
    """`Exchange.send` whose backward is `Exchange.home`.

    ``anchor`` is any tensor that requires a gradient on every rank or on none: it makes the backward, which is
    collective, run on ranks whose rows need none. It receives none itself.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_RC: torch.Tensor, anchor: torch.Tensor, exchange: Exchange, counts_SO: Counts, phase: str
    ) -> torch.Tensor:
        """[rows to send, …] → [rows received, …]."""
        ctx.way_back = (exchange, counts_SO, f"{phase}.backward")
        return _fresh(exchange.send(rows_RC, counts_SO, phase), rows_RC)

    @staticmethod
    def backward(ctx: Any, grad_RC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the rows, brought to where the rows came from."""
        exchange, counts_SO, phase = ctx.way_back
        return exchange.home(grad_RC, counts_SO, phase), None, None, None, None


class Home(torch.autograd.Function):
    """`Exchange.home` whose backward is `Exchange.send`. See `Send`."""

    @staticmethod
    def forward(
        ctx: Any, rows_RC: torch.Tensor, anchor: torch.Tensor, exchange: Exchange, counts_SO: Counts, phase: str
    ) -> torch.Tensor:
        """[rows worked on, …] → [rows of this source, …]."""
        ctx.way_back = (exchange, counts_SO, f"{phase}.backward")
        return _fresh(exchange.home(rows_RC, counts_SO, phase), rows_RC)

    @staticmethod
    def backward(ctx: Any, grad_RC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the rows, brought to where they were worked on."""
        exchange, counts_SO, phase = ctx.way_back
        return exchange.send(grad_RC, counts_SO, phase), None, None, None, None


def make_exchange(mesh: Mesh, comm: Comm, config: ExchangeConfig, name: str = "moe") -> Exchange:
    """The exchange over the ranks of ``comm``, an axis of ``mesh``, on channels called ``name``. Collective."""
    flat = Flat(mesh.channel(comm, name))
    if config.kind == "flat":
        return flat
    if config.kind == "coordinated":
        tensor = mesh.comm("tp")
        if tensor.size == 1:
            raise ConfigError("exchange='coordinated' needs a tensor axis: tp=1 here; use tv.init(tp=…), or 'flat'")
        inner = flat if config.node is None else _hierarchical(mesh, comm, config.node, name)
        return Coordinated(inner, mesh.channel(tensor, name))
    if config.kind == "auto" and (config.crossover_bytes is None or comm.size < 4):
        return flat  # of fewer than 4 ranks, (G - 1) + (p/G - 1) is p - 1 or more
    node = _ranks_per_host(comm) if config.node is None else config.node
    if config.kind == "auto" and not 1 < node < comm.size:
        return flat
    hierarchical = _hierarchical(mesh, comm, node, name)
    if config.kind == "hierarchical":
        return hierarchical
    return BySize(flat, hierarchical, config.crossover_bytes or 0)


def _hierarchical(mesh: Mesh, comm: Comm, node: int, name: str) -> Hierarchical:
    if comm.size % node:
        raise ConfigError(
            f"exchange.node={node} does not divide the {comm.size} ranks of {comm.axis}: choose a divisor"
        )
    inside, across = mesh.split(comm.axis, node)
    return Hierarchical(comm, mesh.channel(inside, name), mesh.channel(across, name))


def _ranks_per_host(comm: Comm) -> int:
    """How many neighbours share a host, if every host has as many of them; else 1."""
    return _regular(comm.all_gather_json(socket.gethostname()))


def _regular(hosts: Sequence[str]) -> int:
    """How many neighbours are alike in every group of them; 1 where groups differ or a host comes twice."""
    size = hosts.count(hosts[0])
    regular = all(hosts[at] == hosts[at - at % size] for at in range(len(hosts)))
    return size if regular and len(hosts) % size == 0 and len(set(hosts)) * size == len(hosts) else 1


def _turned(counts_SO: Counts) -> list[list[int]]:
    return [list(column) for column in zip(*counts_SO, strict=True)]


def _reorder(rows_RC: torch.Tensor, counts: Sequence[int], order: Sequence[int]) -> torch.Tensor:
    """Segments of ``counts`` rows, those named by ``order`` one after the other. One copy, of nothing that stays."""
    wanted = [number for number in order if counts[number]]
    if wanted == [number for number, count in enumerate(counts) if count]:
        return rows_RC
    starts = [0, *accumulate(counts)]
    if not wanted:
        return rows_RC[:0]
    return torch.cat([rows_RC[starts[number] : starts[number + 1]] for number in wanted])


def _fresh(out: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """An autograd function may not return its very input."""
    return out.view_as(out) if out is given else out
