"""Reduce gradients to their owners, piece by piece, through buffers of constant size.

ZeRO section 5.2 (P_os+g: bucketed reduction to the owner) and section 6.2 (C_B, constant-size buffers).

[Note: minus zero]
x + (-0.0) is x for every x, and (-0.0) + x too; +0.0 is not neutral, since (-0.0) + (+0.0) is +0.0. So what a rank
has no gradient
for counts as -0.0, and the sum has the bits of a process that accumulated only the gradients that exist.

[Note: running sum]
Ranks are folded one after another into the running sum, micro-batch after micro-batch: one process that runs all of
them in turn
adds in the same order. The average is one division of that sum, so with averaging the undivided sum is kept apart while
gradients accumulate, and always where multiplying the average by the number of ranks would not give it back.

[Note: no waiting in the dark]
A piece of which a peer has not begun its side never ends. So pieces are queued, and waited for (`drive`) only where
every rank is known to have queued the same flats; elsewhere what fits the buffers is sent and the rest stays queued
(`offer`).

[Note: one pass while it is warm]
A piece is added up, divided and looked through for what is not finite when it lands, while the cache holds it. Where
gradients are replicated (stages 0 and 1), rows are sent straight from the flat's own gradient buffer and added up in
place.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from trivium.dist.comm import Handle
from trivium.memory.meter import Meter
from trivium.zero.flat import Flat
from trivium.zero.placement import ZeroConfig, divides_exactly, piece_numel, pieces, slot_bytes, slot_copies

Gradients = Sequence[torch.Tensor | None]
_NUM_FLIGHTS = 2


@dataclass(kw_only=True)
class _Flight:
    """One piece under way: what each rank contributes to it, in rank order."""

    handle: Handle
    flat: Flat
    start: int
    rows: tuple[torch.Tensor, ...]
    in_place: bool


@dataclass(kw_only=True)
class _Job:
    """One flat that is queued: its gradients, and the pieces of it that were not sent yet."""

    flat: Flat
    gradients: Gradients
    pieces: Iterator[tuple[int, int]]


class Reducer:
    """Reduces whole flats: each rank ends with the sum over ranks of its own part.

    ``reduce`` must be called on every rank for the same flats in the same order; ``finish`` waits for all. Sends
    (N-1)/N of each flat, N the ranks of its axis. Averages are over ``num_ranks``, all data-parallel ranks: an expert
    has seen the tokens of all of them, however few hold it. Holds two pieces in flight in buffers of at most twice
    ``bucket_bytes`` in all.
    """

    def __init__(self, config: ZeroConfig, meter: Meter, flats: Sequence[Flat], num_ranks: int) -> None:
        self._config = config
        self._divisor = num_ranks if config.average else 1
        self.keeps_sums = not divides_exactly(self._divisor)
        self._meter = meter
        self._flights: deque[_Flight] = deque()
        self._jobs: deque[_Job] = deque()
        self._num_driven = 0
        self.finite = True
        sizes = [(flat.comms.world.size, flat.layout.part_numel, flat.dtype.itemsize) for flat in flats]
        self._slot_bytes = max((slot_bytes(*size, config.bucket_bytes) for size in sizes), default=0)
        self._num_slots = max((slot_copies(size[0]) for size in sizes), default=0)
        self._slots: list[torch.Tensor] = []
        self._turn = 0
        self._sums: dict[int, torch.Tensor] = {}
        self._continues: set[int] = set()

    def gradient_dtype(self, flat: Flat) -> torch.dtype:
        """What this flat's reduced gradient is kept in."""
        return torch.float32 if self._config.gradient_dtype == "float32" and flat.low_precision else flat.dtype

    def begin(self, flat: Flat, *, accumulate: bool, keep_sum: bool, divided: bool) -> None:
        """Prepare ``flat`` for one backward: add to what was reduced before (``accumulate``) or start afresh.

        ``keep_sum``: more micro-batches may follow, keep the undivided sum. ``divided``: what is in the gradient now
        is an average.
        """
        key = id(flat)
        apart = keep_sum or self.keeps_sums or (accumulate and (self._config.average or not flat.row.gradient))
        if not accumulate:
            self._continues.discard(key)
        else:
            self._continues.add(key)
        if apart and key not in self._sums:
            self._sums[key] = torch.zeros(flat.layout.part_numel, dtype=self.gradient_dtype(flat), device=flat.device)
            self._meter.add("sums", self._sums[key].numel() * self._sums[key].element_size())
            if accumulate:
                self._sums[key].copy_(flat.own_part())
                if divided:
                    self._sums[key].mul_(self._divisor)

    def drop_sums(self) -> None:
        """Free the running sums kept apart, unless they are the only exact ones; the gradients stay."""
        if self.keeps_sums:
            return
        for total in self._sums.values():
            self._meter.add("sums", -total.numel() * total.element_size())
        self._sums.clear()

    def reduce(self, flat: Flat, gradients: Gradients) -> None:
        """Queue ``flat``; ``gradients[i]`` is this rank's gradient of parameter i, None where it has none.

        With replicated gradients they lie in ``flat.gradient_memory`` already and ``gradients`` only says which.
        """
        flat.gradient_memory(self.gradient_dtype(flat))
        step = piece_numel(flat.comms.world.size, self._config.bucket_bytes, flat.dtype.itemsize)
        flattened = [None if g is None else g.reshape(-1) for g in gradients]
        self._jobs.append(_Job(flat=flat, gradients=flattened, pieces=iter(pieces(flat.layout.part_numel, step))))

    def offer(self) -> None:
        """Send what fits the buffers, without waiting."""
        while self._jobs and len(self._flights) < _NUM_FLIGHTS:
            self._send_next()

    def drive(self, num_flats: int | None = None) -> None:
        """Send all pieces of the first ``num_flats`` queued since ``begin_pass`` (None: of all), waiting for buffers.

        Collective: every rank must have queued these.
        """
        while self._jobs and (num_flats is None or self._num_driven < num_flats):
            if len(self._flights) >= _NUM_FLIGHTS:
                self._land()
            self._send_next()

    def begin_pass(self) -> None:
        """Count queued flats from zero; nothing that is not finite was seen yet (``finite``)."""
        self._num_driven = 0
        self.finite = True

    def finish(self) -> None:
        """Send and fold everything queued. Collective."""
        self.drive()
        while self._flights:
            self._land()

    def forget(self) -> None:
        """Drop what was queued and not sent: the backward pass it belongs to broke off."""
        self._jobs.clear()
        while self._flights:
            self._land()

    def complete(self, flat: Flat) -> Handle | None:
        """After ``finish``: average, and bring the parts together where ranks replicate the gradient."""
        part = flat.own_part()
        total = self._sums.get(id(flat))
        if total is not None:
            part.copy_(total)
            self._average(part)
        if flat.comms.across.size > 1:
            flat.comms.across.all_gather(flat.own_gradient(), part, "backward").wait()
        if not flat.row.optimizer:
            return flat.comms.inside.all_gather(
                flat.gradient_memory(self.gradient_dtype(flat)), flat.own_gradient(), "backward"
            )
        return None

    def _send_next(self) -> None:
        """Send the next piece of the first flat in the queue; a flat without one left leaves the queue."""
        job = self._jobs[0]
        piece = next(job.pieces, None)
        if piece is None:
            self._jobs.popleft()
            self._num_driven += 1
            return
        flat, (start, length), world = job.flat, piece, job.flat.comms.world
        native = (self._config.reduce if self._config.reduce != "auto" else world.default_reduce) == "native"
        native = native and not (flat.low_precision and self._config.reduce_dtype == "float32")  # it adds in 16 bits
        send_Nc, received_Nc = self._slot(flat, length)
        in_place = self._sends_in_place(flat, native)
        if in_place:
            send_Nc = flat.gradient_memory(flat.dtype).view(world.size, -1)[:, start : start + length]
        else:
            for rank in range(world.size):
                begin = flat.comms.part_of(rank) * flat.layout.part_numel + start
                _stage(send_Nc[rank], flat, begin, job.gradients)
        if native:
            handle = world.reduce_scatter(received_Nc[0], send_Nc, "backward")
            rows: tuple[torch.Tensor, ...] = (received_Nc[0],)
        else:
            handle = world.exchange(received_Nc, send_Nc, "backward")
            rows = (*received_Nc[: world.rank], send_Nc[world.rank], *received_Nc[world.rank + 1 :])
        self._flights.append(_Flight(handle=handle, flat=flat, start=start, rows=rows, in_place=in_place))

    def _sends_in_place(self, flat: Flat, native: bool) -> bool:
        """Whether rows are sent from the flat's own gradient buffer: it holds all of it, in the order of ranks."""
        if flat.row.gradient or native or flat.comms.across.size > 1 or not flat.comms.world.sends_rows:
            return False
        return self.gradient_dtype(flat) == flat.dtype

    def _slot(self, flat: Flat, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Send and receive rows for one piece, in the buffers that no piece under way uses."""
        ranks = flat.comms.world.size
        if not self._slots:
            self._slots = [
                torch.empty(self._slot_bytes, dtype=torch.uint8, device=flat.device) for _ in range(self._num_slots)
            ]
            self._meter.add("buffers", self._slot_bytes * self._num_slots)
        self._turn = 1 - self._turn
        num_bytes = ranks * length * flat.dtype.itemsize
        send = self._slots[self._turn][:num_bytes].view(flat.dtype).view(ranks, length)
        if ranks == 1:
            return send, send
        return send, self._slots[2 + self._turn][:num_bytes].view(flat.dtype).view(ranks, length)

    def _land(self) -> None:
        flight = self._flights.popleft()
        flight.handle.wait()
        flat = flight.flat
        total = self._sums.get(id(flat))
        rows, afresh = flight.rows, id(flat) not in self._continues
        target = (flat.own_part() if total is None else total)[flight.start : flight.start + rows[0].numel()]
        if target.dtype == flat.dtype and (not flat.low_precision or self._config.reduce_dtype == "parameter"):
            _fold(target, rows, afresh=afresh, own=flat.comms.world.rank if flight.in_place and total is None else 0)
        else:
            wide = target.float()
            _fold(wide, rows, afresh=afresh, own=0)
            target.copy_(wide)
        if total is None:
            self._average(target)
        self.finite = self.finite and _is_finite(target)

    def _average(self, part: torch.Tensor) -> None:
        if self._divisor > 1:
            part.div_(self._divisor)


def _fold(target: torch.Tensor, rows: Sequence[torch.Tensor], *, afresh: bool, own: int) -> None:
    """Add the rows to ``target`` one after another, in rank order; ``afresh`` starts from the first.

    ``target`` may be the very memory of ``rows[own]``: until that one is added, the sum is kept in the first row.
    """
    if not afresh:
        for row in rows:
            target.add_(row)
    elif len(rows) > 1 and rows[0].dtype == target.dtype:
        total = rows[0]
        for rank, row in enumerate(rows[1:], start=1):
            total = torch.add(total, row, out=target if rank >= own else rows[0])
    else:
        target.copy_(rows[0])
        for row in rows[1:]:
            target.add_(row)


def _is_finite(part: torch.Tensor) -> bool:
    """Whether all elements are. A sum that is finite says so at once; one that is not may have overflowed."""
    if part.numel() == 0 or math.isfinite(part.sum(dtype=torch.float32)):
        return True
    low, high = torch.aminmax(part)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _stage(row: torch.Tensor, flat: Flat, begin: int, gradients: Gradients) -> None:
    """Copy the flat's gradient from element ``begin`` on into ``row``; see [Note: minus zero] for what is absent."""
    end = begin + row.numel()
    if not flat.row.gradient and flat.gradient is not None:
        row.copy_(flat.gradient[begin:end])
        return
    position = begin
    for offset, index in flat.spans:
        numel = flat.layout.numels[index]
        if offset + numel <= position or numel == 0:
            continue
        if offset >= end:
            break
        if offset > position:
            row[position - begin : offset - begin].zero_()
            position = offset
        stop = min(offset + numel, end)
        gradient, target = gradients[index], row[position - begin : stop - begin]
        if gradient is None:
            target.fill_(-0.0)
        else:
            target.copy_(gradient[position - offset : stop - offset])
        position = stop
    if position < end:
        row[position - begin :].zero_()
