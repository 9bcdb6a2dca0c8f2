"""One flat buffer of a unit's parameters, its shard on this rank, and the moves between the two.

ZeRO section 5.3 (P_os+g+p): sharded, gathered just in time, released.

[Note: storage for life]
Autograd saves *views* of parameters (a linear layer saves ``weight.t()``). Were a gathered parameter put into new
storage, backward
would read the old one. So a flat has one storage for life: releasing resizes it to nothing, gathering fills the very
same
storage through an alias that shares no version counter with the parameters. A released parameter points to a single
NaN (0 where its dtype has none) expanded to its shape: reading it by accident gives that, never stale values and never
a crash. On the CPU
under Linux the storage keeps its size and lends its pages instead: memory/pages [Note: recycled pages].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from trivium.base.errors import TriviumError
from trivium.dist.comm import Comm, Handle
from trivium.memory.meter import Meter
from trivium.memory.pages import Pages
from trivium.zero.placement import Layout, Row
from trivium.zero.units import FlatKey


class State(Enum):
    """Where the parameters are."""

    SHARDED = "sharded"
    GATHERING = "gathering"
    WHOLE = "whole"


@dataclass(frozen=True, kw_only=True)
class Comms:
    """The ranks that reduce a flat's gradient together (``world``), cut into sharding groups (``inside``,
    ``across``)."""

    world: Comm
    inside: Comm
    across: Comm

    def part_of(self, rank: int) -> int:
        """Which part of the flat the ``rank``-th rank of ``world`` reduces: parts of one shard lie together."""
        return (rank % self.inside.size) * self.across.size + rank // self.inside.size


def nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a released parameter shows, 0-dim: NaN, or a number at the end of ``dtype``'s range where it has none."""
    if dtype.is_floating_point:
        filler: float = float("nan")
    else:
        filler = True if dtype == torch.bool else torch.iinfo(dtype).min or torch.iinfo(dtype).max
    return torch.full((), filler, dtype=dtype, device=device)


class Flat:
    """Parameters of one dtype, placement and optimizer, laid out end to end and cut into shards.

    ``whole`` [numel] and ``shard`` [shard_numel] have the parameters' dtype; ``master`` is the fp32 copy that the
    optimizer updates, the very same memory where the parameters are fp32 already. ``segments[i]`` is what the optimizer
    sees of parameter i (None: nothing of it is here): 1-D, or shaped like it where it is whole by rule (0-dim ones
    are). ``gradient`` appears with the first backward. ``shared``: all data-parallel ranks hold these parameters.
    ``params`` may be empty: then other ranks have such parameters in the unit, and this one none.
    """

    def __init__(
        self,
        key: FlatKey,
        params: Sequence[nn.Parameter],
        names: Sequence[str],
        layout: Layout,
        row: Row,
        comms: Comms,
        device: torch.device,
        meter: Meter,
        pages: Pages | None = None,
    ) -> None:
        self.params, self.names = tuple(params), tuple(names)
        self.layout, self.row, self.comms, self.comm = layout, row, comms, comms.inside
        self.optimizer, self.whole_parameters, self.meter = key.optimizer, key.cut == "parameter", meter
        self._pages = pages if row.parameter else None
        self.dtype, self.device, self.shared = key.dtype, device, key.axis == "dp"
        self.shapes = tuple(p.shape for p in params)
        self.spans = tuple(sorted((offset, index) for index, offset in enumerate(layout.offsets)))
        self.trainable = key.trainable
        self.low_precision = self.dtype in (torch.float16, torch.bfloat16)
        self.gradient: torch.Tensor | None = None
        self.state = State.WHOLE
        self._handle: Handle | None = None
        self.nan_views = tuple(nothing(self.dtype, self.device).expand(s) for s in self.shapes)

    def adopt(self) -> None:
        """Take the parameters' present values into the flat and keep what this rank holds of them."""
        self._allocate()
        for view, param in zip(self.views, self.params, strict=True):
            view.copy_(param.detach())
        self._settle()

    def adopt_shard(self, shard: torch.Tensor) -> None:
        """Take values that were cut to this rank's shard already ([shard_numel]); the flat never exists whole unless
        it stays."""
        self._allocate(materialise=not self.row.parameter)
        if self.row.parameter:
            self.shard = shard
            self._make_segments()
            self.state = State.SHARDED
            self._point(self.nan_views)
        else:
            self.comm.all_gather(self._alias, shard, "init").wait()
            self._settle()

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.names[0] if self.names else "a flat without parameters here"

    @property
    def own(self) -> slice:
        """This rank's range of the whole flat."""
        return slice(self.comm.rank * self.layout.shard_numel, (self.comm.rank + 1) * self.layout.shard_numel)

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole flat in the parameters' dtype."""
        return self.layout.numel * self.dtype.itemsize

    def start_gather(self, phase: str) -> None:
        """Begin filling the whole flat from all ranks' shards. Collective on the flat's axis; N-1 shards received."""
        if not self.row.parameter:
            return
        if self.state is State.GATHERING:
            raise TriviumError(f"{self.label}: gathered twice at once")
        if self.state is State.SHARDED:
            if self._pages is None:
                self._storage.resize_(self.whole_bytes)
            else:
                self._pages.fill(self._region)
            self.meter.add("gathered", self.whole_bytes)
        self._handle = self.comm.all_gather(self._alias, self.shard, phase)
        self.state = State.GATHERING

    def finish_gather(self) -> None:
        """Wait for the gather under way and let the parameters show it."""
        if self.state is State.SHARDED:
            raise TriviumError(f"{self.label}: waited for, but no gather was started")
        if self.state is State.GATHERING and self._handle is not None:
            self._handle.wait()
            self._handle = None
            self.state = State.WHOLE
            self._point(self.views)

    def release(self) -> None:
        """Give the whole flat's memory back; the shard stays."""
        if not self.row.parameter or self.state is State.SHARDED:
            return
        self.finish_gather()
        self._point(self.nan_views)
        if self._pages is None:
            self._storage.resize_(0)
        else:
            self._pages.park(self._region)
        self.meter.add("gathered", -self.whole_bytes)
        self.state = State.SHARDED

    def start_publish(self) -> Handle | None:
        """Bring parameters up to what the optimizer wrote into the segments: cast, then all-gather where they are
        replicated."""
        if self.master is not self._parameter_memory():
            self._parameter_memory().copy_(self.master)
        if self.row.optimizer and not self.row.parameter:
            return self.comm.all_gather(self._alias, self.shard, "step")
        return None

    def absorb(self) -> None:
        """Take what was written into the gathered parameters from outside into the shard and the fp32 master."""
        memory, source = self._parameter_memory(), self.whole if not self.row.optimizer else self.whole[self.own]
        if self.row.parameter:
            memory.copy_(source)
        if self.master is not memory:
            changed = source != self.master.to(self.dtype)
            self.master.copy_(torch.where(changed, source.float(), self.master))

    def gradient_memory(self, dtype: torch.dtype) -> torch.Tensor:
        """The buffer of reduced gradients, made on first use: [numel] where gradients are replicated, else
        [shard_numel]."""
        if self.gradient is None:
            numel = self.layout.shard_numel if self.row.gradient else self.layout.numel
            self.gradient = torch.zeros(numel, dtype=dtype, device=self.device)
            self.meter.add("gradients", numel * dtype.itemsize)
            self.gradient_views = () if self.row.gradient else self._views_of(self.gradient)
        return self.gradient

    def drop_gradient(self) -> None:
        """Give a sharded gradient's memory back until the next backward: activations peak before it returns.

        A replicated one stays: it is what the next pass accumulates into and sends from.
        """
        if self.gradient is not None and self.row.gradient:
            self.meter.add("gradients", -self.gradient.numel() * self.gradient.element_size())
            self.gradient, self.gradient_views = None, ()

    def own_gradient(self) -> torch.Tensor:
        """This rank's shard of the reduced gradient."""
        if self.gradient is None:
            raise TriviumError(f"{self.label}: no gradient yet")
        return self.gradient if self.row.gradient else self.gradient[self.own]

    def own_part(self) -> torch.Tensor:
        """What of the gradient this rank itself reduces: its shard, divided among the ranks that hold the same
        shard."""
        numel = self.layout.part_numel
        return self.own_gradient()[self.comms.across.rank * numel : (self.comms.across.rank + 1) * numel]

    def gradient_of(self, index: int) -> torch.Tensor | None:
        """The gradient that belongs to ``segments[index]``, shaped like it."""
        segment, gradient = self.segments[index], self.gradient
        if segment is None or gradient is None:
            return None
        if not self.row.optimizer:
            start = self.layout.offsets[index]
            return gradient[start : start + segment.numel()].view(segment.shape)
        overlap = self.layout.overlap(index, self.comm.rank)
        if overlap is None:
            return None
        return self.own_gradient()[overlap.at : overlap.at + overlap.length].view(segment.shape)

    def _allocate(self, materialise: bool = True) -> None:
        if self._pages is not None and self.whole_bytes:
            self._region = self._pages.region(self.whole_bytes)
            self.whole = self._region.memory.view(self.dtype)
            self._storage = self.whole.untyped_storage()
            self._alias = torch.empty(0, dtype=self.dtype, device=self.device)
            self._alias.set_(self._storage, 0, (self.layout.numel,))  # type: ignore[call-overload]
            self.views = self._views_of(self._alias)
            if materialise:
                self._pages.fill(self._region)
                self.whole.zero_()
            return
        self._pages = None
        self.whole = torch.zeros(self.layout.numel if materialise else 0, dtype=self.dtype, device=self.device)
        self._storage = self.whole.untyped_storage()
        if not materialise:
            self._storage.resize_(0)
            self.whole = torch.empty(0, dtype=self.dtype, device=self.device)
            self.whole.set_(self._storage, 0, (self.layout.numel,))  # type: ignore[call-overload]
            self._storage.resize_(0)
        self._alias = torch.empty(0, dtype=self.dtype, device=self.device)
        self._alias.set_(self._storage, 0, (self.layout.numel,))  # type: ignore[call-overload]
        self.views = self._views_of(self._alias)
        if not materialise:
            self._storage.resize_(0)

    def _settle(self) -> None:
        if self.row.parameter:
            self.shard = self.whole[self.own].clone()
            self._make_segments()
            self.meter.add("gathered", self.whole_bytes)
            self.release()
        else:
            self.shard = self.whole[self.own]
            self._make_segments()
            self._point(self.views)

    def _make_segments(self) -> None:
        memory = self._parameter_memory()
        self.meter.add(
            "parameters", self.whole_bytes if not self.row.parameter else self.shard.numel() * self.dtype.itemsize
        )
        self.master = memory
        if self.low_precision and self.trainable:
            self.master = memory.float()
            self.meter.add("optimizer", self.master.numel() * 4)
        segments: list[nn.Parameter | None] = []
        for index, shape in enumerate(self.shapes):
            overlap = self.layout.overlap(index, self.comm.rank)
            if not self.row.optimizer:
                start, length = self.layout.offsets[index], shape.numel()
            elif overlap is not None:
                start, length = overlap.at, overlap.length
            else:
                segments.append(None)
                continue
            data = self.master[start : start + length]
            shaped = data.view(shape) if self.whole_parameters or not shape else data
            segments.append(nn.Parameter(shaped, requires_grad=self.trainable))
        self.segments = tuple(segments)

    def _parameter_memory(self) -> torch.Tensor:
        """What the master mirrors, in the parameters' dtype."""
        return self.shard if self.row.optimizer else self.whole

    def _views_of(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            flat[start : start + shape.numel()].view(shape)
            for start, shape in zip(self.layout.offsets, self.shapes, strict=True)
        )

    def _point(self, views: Sequence[torch.Tensor]) -> None:
        for param, view in zip(self.params, views, strict=True):
            param.data = view
