"""Bytes per rank by category, as the runtime's meter will count them.

ZeRO section 3 (where did all the memory go) and 5 (P_os, P_os+g, P_os+g+p); C_B of section 6.2 bounds the buffers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trivium.plan.activations import Activations
from trivium.plan.inventory import PlannedFlat, PlannedUnit
from trivium.zero.placement import ZeroConfig, divides_exactly, slot_bytes, slot_copies

ADAMW_COPIES = 2
NO_ACTIVATIONS = Activations()
_MASTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank, steady state. ``parameters`` to ``sums`` are what the meter counts under the same labels.

    ``gathered`` is a peak: two neighbouring units beside those that stay. ``local_gradients`` are a rank's own, from
    where autograd leaves them until they are reduced (``no_sync``: all of them until the first backward that syncs).
    ``gathered``, ``local_gradients`` and ``activations`` are each the most there is of it; ``passing`` the most of all
    three together, early in backward; ``returned`` of the gradients are not there yet then, since ``zero_grad`` gives
    sharded ones back. ``closing`` is the most of the three late in backward, when all gradients are, and ``step`` what
    the optimizer's step needs for a moment, when activations are gone.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int = 0
    buffers: int = 0
    sums: int = 0
    local_gradients: int = 0
    activations: int = 0
    passing: int = 0
    returned: int = 0
    closing: int = 0
    module_buffers: int = 0
    step: int = 0

    @property
    def states(self) -> int:
        """Model states: the paper's 16Ψ at one rank."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The most that is held at once."""
        lasting = self.states + self.buffers + self.sums + self.module_buffers
        return lasting + max(self.passing - self.returned, self.closing, self.step)


def memory(
    units: Sequence[PlannedUnit],
    zero: ZeroConfig,
    *,
    rank: int = 0,
    accumulation: int = 1,
    no_sync: bool = False,
    optimizer_copies: int = ADAMW_COPIES,
    activations: Activations = NO_ACTIVATIONS,
    module_buffers: int = 0,
) -> Memory:
    """Bytes on ``rank``. ``optimizer_copies``: state tensors per element (AdamW 2, SGD with momentum 1, SGD 0)."""
    row, flats = zero.row, [flat for unit in units for flat in unit.flats]
    trainable = [flat for flat in flats if flat.trainable]
    everything = no_sync and accumulation > 1
    return Memory(
        parameters=sum(_held(flat, flat.dtype, sharded=row.parameter) for flat in flats),
        gradients=sum(_held(flat, flat.gradient_dtype(zero), sharded=row.gradient) for flat in trainable),
        optimizer=sum(_optimizer(flat, zero, rank, optimizer_copies) for flat in trainable),
        gathered=_gathered(units, zero) if row.parameter else 0,
        buffers=_buffers(trainable, zero),
        sums=sum(_sum(flat, zero) for flat in trainable if _keeps_sum(flat, zero, accumulation, no_sync)),
        local_gradients=_local_gradients(units, zero, everything),
        activations=activations.peak,
        passing=_passing(units, zero, everything, activations),
        returned=sum(_reduced(unit, zero) for unit in units[:-1]) if zero.row.gradient and accumulation == 1 else 0,
        closing=_closing(units, zero, everything) + activations.closing,
        module_buffers=module_buffers,
        step=max((_widened(flat, zero) for flat in trainable), default=0),
    )


def _held(flat: PlannedFlat, dtype: torch.dtype, *, sharded: bool) -> int:
    return (flat.layout.shard_numel if sharded else flat.layout.numel) * dtype.itemsize


def _reduced(unit: PlannedUnit, zero: ZeroConfig) -> int:
    """A unit's gradients, sharded."""
    return sum(_held(flat, flat.gradient_dtype(zero), sharded=True) for flat in unit.flats if flat.trainable)


def _optimizer(flat: PlannedFlat, zero: ZeroConfig, rank: int, copies: int) -> int:
    """The fp32 master (padding included) and the optimizer's own states (segments alone)."""
    sharded = zero.row.optimizer
    master = _MASTER_BYTES * (flat.layout.shard_numel if sharded else flat.layout.numel) if flat.low_precision else 0
    element = _MASTER_BYTES if flat.low_precision else flat.dtype.itemsize
    return master + (copies * element * flat.held_numel(rank, sharded=sharded) if flat.optimized else 0)


def _gathered(units: Sequence[PlannedUnit], zero: ZeroConfig) -> int:
    """Units that stay until backward, and the largest two neighbours of the others."""
    if zero.keep_gathered:
        return sum(unit.whole_bytes for unit in units)
    kept = sum(unit.whole_bytes for unit in units if unit.keep)
    others = [unit.whole_bytes for unit in units if not unit.keep]
    pairs = [first + second for first, second in itertools.pairwise(others)]
    return kept + max(pairs or others or [0])


def _buffers(trainable: Sequence[PlannedFlat], zero: ZeroConfig) -> int:
    """Send and receive buffers: one set that all flats share, as large as the largest need."""
    flats = [flat for flat in trainable if flat.layout.part_numel]
    needs = [slot_bytes(flat.world, flat.layout.part_numel, flat.dtype.itemsize, zero.bucket_bytes) for flat in flats]
    return max(needs, default=0) * max((slot_copies(flat.world) for flat in flats), default=0)


def _keeps_sum(flat: PlannedFlat, zero: ZeroConfig, accumulation: int, no_sync: bool) -> bool:
    """Whether the undivided sum is kept apart from one reduction of a step to its next, or for good."""
    if zero.average and not divides_exactly(flat.world * flat.stride):
        return True
    return accumulation > 1 and not no_sync and (zero.average or not zero.row.gradient)


def _sum(flat: PlannedFlat, zero: ZeroConfig) -> int:
    return flat.layout.part_numel * flat.gradient_dtype(zero).itemsize


def _local_gradients(units: Sequence[PlannedUnit], zero: ZeroConfig, everything: bool) -> int:
    if everything:
        return sum(unit.trainable_bytes for unit in units)
    return _waiting(units) + max((_arriving(unit, zero) for unit in units if unit.name), default=0)


def _waiting(units: Sequence[PlannedUnit]) -> int:
    """Gradients of the root's own parameters, such as a tied embedding: they come in from first to last."""
    return sum(unit.trainable_bytes for unit in units if not unit.name)


def _arriving(unit: PlannedUnit, zero: ZeroConfig) -> int:
    """A unit's gradients until they are reduced; where gradients are replicated, one parameter's at a time."""
    if zero.row.gradient:
        return unit.trainable_bytes
    sizes = (numel * flat.dtype.itemsize for flat in unit.flats if flat.trainable for numel in flat.layout.numels)
    return max(sizes, default=0)


def _passing(units: Sequence[PlannedUnit], zero: ZeroConfig, everything: bool, activations: Activations) -> int:
    """The worst moment: backward through the last unit, everything kept and one unit gathered ahead, or through one
    before it, the last unit's parameters gone."""
    *before, last = units
    own = _waiting(units)
    at_head = own + (_arriving(last, zero) if last.name else 0)
    at_block = own + max((_arriving(unit, zero) for unit in before if unit.name), default=0)
    if everything:
        at_head = at_block = sum(unit.trainable_bytes for unit in units)
    if zero.row.parameter:
        gathered = _gathered(units, zero)
        others = [unit.whole_bytes for unit in before if not unit.keep]
        ahead = others[-1] if others and zero.prefetch and not zero.keep_gathered else 0
        kept = gathered if zero.keep_gathered else sum(unit.whole_bytes for unit in units if unit.keep)
        at_head += kept + ahead
        at_block += gathered - (last.whole_bytes if last.name else 0)
    return max(at_head + activations.head, at_block + activations.block)


def _closing(units: Sequence[PlannedUnit], zero: ZeroConfig, everything: bool) -> int:
    """Parameters and local gradients at the end of backward, through the first units, less what is not reduced yet."""
    if everything:
        return sum(unit.trainable_bytes for unit in units) + (_gathered(units, zero) if zero.row.parameter else 0)
    first = [unit for unit in units if unit.name][:2]
    gathered = sum(unit.whole_bytes for unit in units if unit.keep or unit in first) if zero.row.parameter else 0
    missing = sum(_reduced(unit, zero) for unit in first) if zero.row.gradient else 0
    return gathered + _waiting(units) + max((_arriving(unit, zero) for unit in first), default=0) - missing


def _widened(flat: PlannedFlat, zero: ZeroConfig) -> int:
    """fp32 gradients that a step makes of one 16-bit flat."""
    numel = flat.layout.shard_numel if zero.row.optimizer else flat.layout.numel
    return _MASTER_BYTES * numel if flat.low_precision else 0
