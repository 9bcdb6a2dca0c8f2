"""Collectives on one axis of the mesh: counted, asynchronous where it matters, with the best algorithm per backend.

ZeRO section 7: reduce-scatter and all-gather are what the volumes 2Ψ and 3Ψ are made of.

[Note: reduce order]
gloo's reduce-scatter is an all-reduce inside (twice the bytes) and NCCL's adds in ring order, which depends on the
number of ranks. So an *ordered* reduction is an all-to-all, which moves exactly (N-1)/N of the tensor, followed by a
local sum in rank order. It gives a fixed order of summation and fp32 accumulation over a 16-bit wire.

[Note: frames]
gloo aborts the process where two ranks send messages of different lengths. So an agreement that may meet another one
starts with a frame of fixed length, which holds what it is about; ranks that came for different things find out there.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from trivium.base.errors import MismatchError, RankError
from trivium.dist.ledger import Books
from trivium.dist.meeting import meet
from trivium.dist.nearby import Nearby, Ticket, channel_of
from trivium.dist.watch import Seat, Watch, own_seat

Reduce = Literal["ordered", "native"]
_FRAME_WORDS = 16
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Link:
    """What all axes of one process share: the books, the device and an optional delay injected per collective."""

    def __init__(self, device: torch.device, delay_s: float = 0.0) -> None:
        self.device = device
        self.delay_s = delay_s
        self.books = Books()
        self.waited_s = 0.0
        self._busy_until_s = 0.0
        self._comms: list[Comm] = []
        self._num_models = 0
        self._watch = Watch(())
        self.nearby: Nearby | None = None

    def watch(self, world: Comm, timeout_s: float, *, nearby: bool) -> None:
        """Learn where each rank runs, to name those that are gone when a collective fails. Collective.

        ``nearby``: exchange rows with the ranks of this host from memory to memory, where the kernel permits it.
        """
        mine = own_seat()
        told = world.all_gather_json([mine.host, mine.pid, mine.space, nearby])
        seats = [Seat(*one[:3]) for one in told]
        self._watch = Watch(seats)
        if not any(one[3] for one in told):
            return
        beside = {
            rank: seat.pid
            for rank, seat in enumerate(seats)
            if nearby and mine.space and seat.space == mine.space and rank != world.rank
        }
        self.nearby = meet(world.rank, beside, world.all_gather_json, timeout_s)

    @property
    def near(self) -> frozenset[int]:
        """The ranks that this one exchanges rows with from memory to memory."""
        return frozenset() if self.nearby is None else self.nearby.ranks

    def lost(self, what: str, error: RuntimeError) -> RankError:
        """The error for a collective that failed because of a peer."""
        words = str(error).splitlines()[0] if str(error) else repr(error)
        return RankError(f"a peer was lost during {what}: {words}. {self._watch.culprits()}")

    def next_model(self) -> int:
        """A number for one more sharded model, from 1: the same on all ranks, which shard them in one order."""
        self._num_models += 1
        return self._num_models

    def join(self, comm: Comm) -> None:
        """Remember ``comm``, to let go of its group at the end."""
        self._comms.append(comm)

    def close(self) -> None:
        """Let go of every group, which ends its threads: one that outlives the interpreter aborts the process."""
        for comm in self._comms:
            comm.group = None
        if self.nearby is not None:
            self.nearby.close()

    def ready_at(self) -> float:
        """When a collective issued now may be called done: links carry one delayed message after another."""
        if self.delay_s == 0.0:
            return 0.0
        self._busy_until_s = max(self._busy_until_s, time.perf_counter()) + self.delay_s
        return self._busy_until_s


class Handle:
    """A collective under way. ``wait`` returns when its output may be read; waiting twice is harmless."""

    def __init__(
        self,
        works: Sequence[dist.Work | Ticket | None],
        link: Link,
        what: str,
        ready_at_s: float,
        keep: tuple[torch.Tensor, ...],
    ) -> None:
        self._works = tuple(work for work in works if work is not None)
        self._link = link
        self._what = what
        self._ready_at_s = ready_at_s
        self._keep = keep

    def wait(self) -> None:
        """Block until done; a peer that is gone raises RankError."""
        if not self._works:
            return
        started = time.perf_counter()
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise self._link.lost(self._what, error) from error
        late = self._ready_at_s - time.perf_counter()
        if late > 0:
            time.sleep(late)
        self._link.waited_s += time.perf_counter() - started
        self._works, self._keep = (), ()


class Comm:
    """The ranks along one axis. Every method is a collective: each rank of the axis must call it, in the same order.

    With one rank nothing is sent and nothing is counted.
    """

    def __init__(
        self,
        axis: str,
        ranks: Sequence[int],
        rank: int,
        group: dist.ProcessGroup | None,
        link: Link,
        *,
        on_cpu: bool = False,
    ) -> None:
        self.axis = axis
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(rank)
        self.group = group
        self.link = link
        link.join(self)
        self._device = torch.device("cpu") if on_cpu else link.device

    @property
    def default_reduce(self) -> Reduce:
        """``ordered`` on gloo, ``native`` where the backend has a true reduce-scatter."""
        return "native" if self.link.device.type == "cuda" else "ordered"

    def all_gather(self, output: torch.Tensor, shard: torch.Tensor, phase: str) -> Handle:
        """Start filling ``output`` [N·n] with every rank's ``shard`` [n], in rank order.

        ``shard`` may be this rank's own range of ``output``. Sends (N-1)·n elements per rank.
        """
        own = output.view(self.size, -1)[self.rank]
        if own.data_ptr() != shard.data_ptr() and (self.size == 1 or self._direct):
            own.copy_(shard)
        if self.size == 1:
            return self._done()
        self._count("all_gather", phase, (self.size - 1) * shard.numel() * shard.element_size())
        what, ready_at_s = f"all_gather on {self.axis} ({phase})", self.link.ready_at()
        if self._direct:
            works = self._send_rows([shard] * self.size, list(output.view(self.size, -1)), what)
        else:
            works = [self._start(what, _ALL_GATHER, output, shard)]
        return Handle(works, self.link, what, ready_at_s, (output, shard))

    def exchange(self, received_Nc: torch.Tensor, send_Nc: torch.Tensor, phase: str) -> Handle:
        """Start sending row r of ``send_Nc`` to rank r; row r of ``received_Nc`` comes from rank r.

        This rank's own row stays where it is, in ``send_Nc``: it is not copied to ``received_Nc``. Where ``sends_rows``
        the rows of ``send_Nc`` may lie apart.
        """
        if self.size == 1:
            return self._done()
        row_bytes = send_Nc[0].numel() * send_Nc.element_size()
        self._count("all_to_all", phase, (self.size - 1) * row_bytes)
        what, ready_at_s = f"all_to_all on {self.axis} ({phase})", self.link.ready_at()
        if self._direct:
            works = self._send_rows(list(send_Nc), list(received_Nc), what)
        else:
            works = [self._start(what, dist.all_to_all_single, received_Nc, send_Nc)]
        return Handle(works, self.link, what, ready_at_s, (received_Nc, send_Nc))

    def reduce_scatter(self, shard: torch.Tensor, send_Nc: torch.Tensor, phase: str) -> Handle:
        """Start the backend's own reduce-scatter (sum in the backend's order) of ``send_Nc`` into ``shard`` [c]."""
        if self.size == 1:
            shard.copy_(send_Nc[0])
            return self._done()
        self._count("reduce_scatter", phase, (self.size - 1) * shard.numel() * shard.element_size())
        what, ready_at_s = f"reduce_scatter on {self.axis} ({phase})", self.link.ready_at()
        return Handle(
            [self._start(what, _REDUCE_SCATTER, shard, send_Nc.view(-1))], self.link, what, ready_at_s, (shard, send_Nc)
        )

    def agree(self, numbers: Sequence[int], what: str = "agreement", doing: str = "") -> list[list[int]]:
        """Every rank's ``numbers`` (int64), by rank; another rank may have come for something else: see [Note: frames].

        ``what``: the same text on all ranks that may meet. ``doing``: what this rank came for, in words for the error.
        Up to 14 numbers take one message. Raises MismatchError on every rank if ``what`` or the count differs.
        """
        if self.size == 1:
            return [list(numbers)]
        head = [zlib.crc32(what.encode()), len(numbers)]
        room = _FRAME_WORDS - len(head)
        frame = [*head, *numbers[:room]]
        rows = self.swap(frame + [0] * (_FRAME_WORDS - len(frame)), "agree")
        if any(row[:2] != head for row in rows):
            raise MismatchError(
                f"ranks came for different things: "
                f"{self._told(doing or f'{what} of {len(numbers)} numbers on {self.axis}')}; "
                "make every rank issue its collectives in the same order"
            )
        rest = self.swap(numbers[room:], "agree") if len(numbers) > room else [[]] * self.size
        return [[*row[2 : 2 + len(numbers)], *more] for row, more in zip(rows, rest, strict=True)]

    def swap(self, numbers: Sequence[int], phase: str) -> list[list[int]]:
        """Every rank's ``numbers`` (int64), by rank, in one message: where no rank can come for anything else.

        Another count on another rank ends the process on gloo; `agree` is for where that may be.
        """
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._device).repeat(self.size)
        everyone = torch.empty_like(mine)
        self._count("all_to_all", phase, (self.size - 1) * len(numbers) * mine.element_size())
        self._blocking(f"agreement on {self.axis} ({phase})", dist.all_to_all_single, everyone, mine, group=self.group)
        rows: list[list[int]] = everyone.view(self.size, -1).tolist()
        return rows

    def _told(self, doing: str) -> str:
        """What each rank came for, in the words it gives; a frame's length of them."""
        size = 8 * _FRAME_WORDS
        text = doing.encode()[:size].ljust(size)
        rows = self.swap([int.from_bytes(text[at : at + 8], "big", signed=True) for at in range(0, size, 8)], "agree")
        words = [b"".join(word.to_bytes(8, "big", signed=True) for word in row) for row in rows]
        return ", ".join(
            f"rank {rank} for {word.decode(errors='ignore').rstrip()}"
            for rank, word in zip(self.ranks, words, strict=True)
        )

    def all_reduce_ints(self, numbers: Sequence[int], op: Literal["sum", "max"] = "sum") -> list[int]:
        """Element-wise sum or maximum of int64 ``numbers`` over the ranks; exact."""
        columns = zip(*self.agree(numbers, f"all_reduce_ints ({op})"), strict=True)
        return [sum(column) if op == "sum" else max(column) for column in columns]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.agree([], "barrier")

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank. For small things: names, manifests, errors."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self._device)
        lengths = [row[0] for row in self.agree([data.numel()], "all_gather_json")]
        longest = max(lengths)
        mine = torch.zeros(longest, dtype=torch.uint8, device=self._device)
        mine[: data.numel()] = data
        everyone = torch.empty(longest * self.size, dtype=torch.uint8, device=self._device)
        self.all_gather(everyone, mine, "agree").wait()
        rows = everyone.view(self.size, -1).cpu().numpy()
        return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]

    def broadcast_json(self, value: Any, src: int = 0) -> Any:
        """Rank ``src``'s JSON value, on every rank."""
        return self.all_gather_json(value if self.rank == src else None)[src]

    def gather_tensor(self, tensor: torch.Tensor, dst: int = 0, phase: str = "gather") -> list[torch.Tensor] | None:
        """The ranks' 1-D tensors of one dtype and any lengths, on rank ``dst``; None elsewhere."""
        if self.size == 1:
            return [tensor]
        lengths = [row[0] for row in self.agree([tensor.numel()], "gather_tensor")]
        parts: list[torch.Tensor] | None = [] if self.rank == dst else None
        for source, length in enumerate(lengths):
            if self.rank == dst and parts is not None:
                part = tensor if source == dst else torch.empty(length, dtype=tensor.dtype, device=tensor.device)
                if source != dst and length:
                    self._blocking(f"recv on {self.axis} ({phase})", dist.recv, part, src=self.ranks[source])
                parts.append(part)
            elif self.rank == source and length:
                self._count("send", phase, length * tensor.element_size(), 1)
                self._blocking(f"send on {self.axis} ({phase})", dist.send, tensor.contiguous(), dst=self.ranks[dst])
        return parts

    def broadcast(self, tensor: torch.Tensor, src: int = 0, phase: str = "broadcast") -> None:
        """Copy rank ``src``'s tensor into everyone's, in place."""
        if self.size == 1:
            return
        root = self.rank == src
        self._count("broadcast", phase, tensor.numel() * tensor.element_size() * root, (self.size - 1) * root)
        self._blocking(
            f"broadcast on {self.axis} ({phase})", dist.broadcast, tensor, src=self.ranks[src], group=self.group
        )

    def require_equal(self, value: Any, what: str) -> None:
        """Raise MismatchError, on every rank, if the ranks' JSON ``value`` differ; names the first two that do."""
        values = self.all_gather_json(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise MismatchError(
                    f"{what} differs across ranks: rank {self.ranks[0]} has {values[0]!r}, "
                    f"rank {self.ranks[rank]} has {other!r}"
                )

    def _count(self, collective: str, phase: str, num_bytes: int, num_messages: int | None = None) -> None:
        others = self.size - 1 if num_messages is None else num_messages
        self.link.books.record(collective, self.axis, phase, num_bytes, others)

    @property
    def sends_rows(self) -> bool:
        """Whether `exchange` sends each row on its own, so that rows may lie apart."""
        return self._direct or self.size == 1

    @property
    def _direct(self) -> bool:
        """Whether messages go straight from rank to rank: on gloo half the processor time of its own collectives."""
        return self._device.type == "cpu"

    def _send_rows(
        self, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor], what: str
    ) -> list[dist.Work | Ticket | None]:
        """Start sending ``send[r]`` to rank r and receiving ``receive[r]`` from it, for every other rank."""
        works: list[dist.Work | Ticket | None] = []
        nearby, near = self.link.nearby, self.link.near
        if nearby is not None and near and self.group is not None:
            channel = channel_of(self.group.group_name)
            ticket = nearby.begin()
            works.append(ticket)
            for step in range(1, self.size):
                target = (self.rank + step) % self.size
                if self.ranks[target] in near:
                    nearby.give(ticket, self.ranks[target], channel, send[target])
            for step in range(1, self.size):
                source = (self.rank - step) % self.size
                if self.ranks[source] in near:
                    nearby.expect(ticket, self.ranks[source], channel, receive[source])
        for step in range(1, self.size):
            source = (self.rank - step) % self.size
            if self.ranks[source] not in near:
                works.append(self._start(what, dist.irecv, receive[source], self.ranks[source], asynchronous=False))
        for step in range(1, self.size):
            target = (self.rank + step) % self.size
            if self.ranks[target] not in near:
                works.append(self._start(what, dist.isend, send[target], self.ranks[target], asynchronous=False))
        return works

    def _start(self, what: str, call: Any, *args: Any, asynchronous: bool = True) -> dist.Work | None:
        options = {"async_op": True} if asynchronous else {}
        try:
            work: dist.Work | None = call(*args, group=self.group, **options)
        except RuntimeError as error:
            raise self.link.lost(what, error) from error
        return work

    def _blocking(self, what: str, call: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except RuntimeError as error:
            raise self.link.lost(what, error) from error

    def _done(self) -> Handle:
        return Handle([], self.link, "", 0.0, ())
