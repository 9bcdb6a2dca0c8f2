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
gradients accumulate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trivium.dist.comm import Handle
from trivium.memory.meter import Meter
from trivium.zero.flat import Flat
from trivium.zero.placement import ZeroConfig, piece_numel, pieces, slot_copies, slot_numel

Gradients = Sequence[torch.Tensor | None]


@dataclass(kw_only=True)
class _Flight:
    """One piece under way: what each rank contributes to it, in rank order."""

    handle: Handle
    flat: Flat
    start: int
    rows: tuple[torch.Tensor, ...]


class Reducer:
    """Reduces whole flats: each rank ends with the sum over ranks of its own part.

    ``reduce`` must be called on every rank for the same flats in the same order; ``finish`` waits for all. Sends
    (N-1)/N of each
    flat. Holds two pieces in flight in buffers of at most twice ``bucket_bytes`` in all.
    """

    def __init__(self, config: ZeroConfig, meter: Meter) -> None:
        self._config = config
        self._meter = meter
        self._flights: deque[_Flight] = deque()
        self._slots: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
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
        apart = keep_sum or (accumulate and (self._config.average or not flat.row.gradient))
        if not accumulate:
            self._continues.discard(key)
        else:
            self._continues.add(key)
        if apart and key not in self._sums:
            self._sums[key] = torch.zeros(flat.layout.part_numel, dtype=self._sum_dtype(flat), device=flat.device)
            self._meter.add("sums", self._sums[key].numel() * self._sums[key].element_size())
            if accumulate:
                self._sums[key].copy_(flat.own_part())
                if divided:
                    self._sums[key].mul_(flat.comms.world.size)

    def drop_sums(self) -> None:
        """Free the running sums kept apart; the gradients stay."""
        for total in self._sums.values():
            self._meter.add("sums", -total.numel() * total.element_size())
        self._sums.clear()

    def keeps(self, flat: Flat) -> bool:
        """Whether an undivided sum of ``flat`` is kept apart."""
        return id(flat) in self._sums

    def reduce(self, flat: Flat, gradients: Gradients) -> None:
        """Start reducing ``flat``; ``gradients[i]`` is this rank's gradient of parameter i, None where it has none.

        With replicated gradients they lie in ``flat.gradient_memory`` already and ``gradients`` only says which.
        """
        world = flat.comms.world
        flat.gradient_memory(self.gradient_dtype(flat))
        step = piece_numel(world.size, self._config.bucket_bytes, flat.dtype.itemsize)
        native = (self._config.reduce if self._config.reduce != "auto" else world.default_reduce) == "native"
        flattened = [None if g is None else g.reshape(-1) for g in gradients]
        for start, length in pieces(flat.layout.part_numel, step):
            send_Nc, received_Nc = self._slot(flat, length)
            for rank in range(world.size):
                begin = flat.comms.part_of(rank) * flat.layout.part_numel + start
                _stage(send_Nc[rank], flat, begin, flattened)
            if native:
                handle = world.reduce_scatter(received_Nc[0], send_Nc, "backward")
                rows: tuple[torch.Tensor, ...] = (received_Nc[0],)
            else:
                handle = world.exchange(received_Nc, send_Nc, "backward")
                rows = (*tuple(received_Nc[:world.rank]), send_Nc[world.rank], *tuple(received_Nc[world.rank + 1:]))
            self._flights.append(_Flight(handle=handle, flat=flat, start=start, rows=rows))

    def finish(self) -> None:
        """Wait for every piece under way and fold it."""
        while self._flights:
            self._land()

    def complete(self, flat: Flat) -> Handle | None:
        """After ``finish``: average, and bring the parts together where ranks replicate the gradient."""
        part = flat.own_part()
        total = self._sums.get(id(flat))
        if total is not None:
            part.copy_(total)
        if self._config.average and flat.comms.world.size > 1:
            part.div_(flat.comms.world.size)
        if flat.comms.across.size > 1:
            flat.comms.across.all_gather(flat.own_gradient(), part, "backward").wait()
        if not flat.row.optimizer:
            return flat.comms.inside.all_gather(
                flat.gradient_memory(self.gradient_dtype(flat)), flat.own_gradient(), "backward"
            )
        return None

    def _slot(self, flat: Flat, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Send and receive rows for one piece; waits for the piece that used them last."""
        ranks = flat.comms.world.size
        step = piece_numel(ranks, self._config.bucket_bytes, flat.dtype.itemsize)
        key = (ranks, flat.dtype)
        slots = self._slots.setdefault(key, [])
        needed = slot_numel(ranks, flat.layout.part_numel, step)
        if not slots or slots[0].numel() < needed:
            self.finish()
            self._meter.add("buffers", -sum(s.numel() * s.element_size() for s in slots))
            slots[:] = [torch.empty(needed, dtype=flat.dtype, device=flat.device) for _ in range(slot_copies(ranks))]
            self._meter.add("buffers", sum(s.numel() * s.element_size() for s in slots))
        while len(self._flights) >= 2:
            self._land()
        self._turn = 1 - self._turn
        send = slots[self._turn][: ranks * length].view(ranks, length)
        received = send if ranks == 1 else slots[2 + self._turn][: ranks * length].view(ranks, length)
        return send, received

    def _land(self) -> None:
        flight = self._flights.popleft()
        flight.handle.wait()
        flat = flight.flat
        total = self._sums.get(id(flat))
        rows, afresh = flight.rows, id(flat) not in self._continues
        target = (flat.own_part() if total is None else total)[flight.start : flight.start + rows[0].numel()]
        if target.dtype == flat.dtype and (not flat.low_precision or self._config.reduce_dtype == "parameter"):
            _fold(target, rows, afresh=afresh)
            return
        wide = target.float()
        _fold(wide, rows, afresh=afresh)
        target.copy_(wide)

    def _sum_dtype(self, flat: Flat) -> torch.dtype:
        return self.gradient_dtype(flat)


def _fold(target: torch.Tensor, rows: Sequence[torch.Tensor], *, afresh: bool) -> None:
    """Add the rows to ``target`` one after another, in rank order; ``afresh`` starts from the first."""
    rest = rows
    if afresh and len(rows) > 1 and rows[0].dtype == target.dtype:
        torch.add(rows[0], rows[1], out=target)
        rest = rows[2:]
    elif afresh:
        target.copy_(rows[0])
        rest = rows[1:]
    for row in rest:
        target.add_(row)


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
