"""Bytes and calls per rank, by phase, as the ledger will count them once a step repeats.

ZeRO section 7: 2Ψ at stages 0 to 2, 3Ψ at stage 3, times (N-1)/N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trivium.plan.inventory import PlannedFlat, PlannedUnit
from trivium.plan.traffic import Traffic as Traffic
from trivium.zero.placement import ZeroConfig, piece_numel, pieces


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Payload by phase: ``forward`` and ``gather`` once per micro-batch, ``reduce`` once per reduction, ``step`` once.

    The ledger's phase ``backward`` is ``gather`` and ``reduce`` together. Agreements (phase ``agree``) come on top.
    ``exchange``: rows to experts elsewhere and back, by phase, once per micro-batch, of an even router.
    """

    forward: Traffic
    gather: Traffic
    reduce: Traffic
    step: Traffic
    accumulation: int = 1
    no_sync: bool = False
    exchange: Mapping[str, Traffic] = field(default_factory=dict)

    @property
    def by_phase(self) -> dict[str, Traffic]:
        """What one optimizer step sends, under the ledger's names of the phases."""
        reductions = 1 if self.no_sync else self.accumulation
        return {
            "forward": self.forward.times(self.accumulation),
            "backward": self.gather.times(self.accumulation) + self.reduce.times(reductions),
            "step": self.step,
            **{phase: traffic.times(self.accumulation) for phase, traffic in self.exchange.items()},
        }

    @property
    def per_step(self) -> Traffic:
        """All that one optimizer step sends."""
        return sum(self.by_phase.values(), Traffic())

    @property
    def states_per_step(self) -> Traffic:
        """What one optimizer step sends of parameters and gradients: all but the rows for experts."""
        return sum((sent for phase, sent in self.by_phase.items() if phase not in self.exchange), Traffic())

    @property
    def per_micro_batch(self) -> Traffic:
        """What a step of one micro-batch sends of parameters and gradients: the paper's volume."""
        return self.forward + self.gather + self.reduce + self.step


def communication(
    units: Sequence[PlannedUnit],
    zero: ZeroConfig,
    *,
    accumulation: int = 1,
    no_sync: bool = False,
    exchange: Mapping[str, Traffic] | None = None,
) -> Communication:
    """What one rank sends, if it uses every unit once per micro-batch and gradients flow from the last unit to the
    first that is trainable."""
    trainable = [flat for unit in units for flat in unit.flats if flat.trainable]
    forward = gather = Traffic()
    if zero.row.parameter:
        first = next((number for number, unit in enumerate(units) if number and _trains(unit)), 0)
        for number, unit in enumerate(units):
            once = sum((_gather(flat, flat.dtype.itemsize) for flat in unit.flats), Traffic())
            forward += once
            if not (unit.keep or zero.keep_gathered) and number >= first:
                gather += once
    step = Traffic()
    if zero.row.optimizer and not zero.row.parameter:
        step = sum((_gather(flat, flat.dtype.itemsize) for flat in trainable), Traffic())
    return Communication(
        forward=forward,
        gather=gather,
        reduce=sum((_reduce(flat, zero) for flat in trainable), Traffic()),
        step=step,
        accumulation=accumulation,
        no_sync=no_sync,
        exchange=exchange or {},
    )


def _trains(unit: PlannedUnit) -> bool:
    return any(flat.trainable for flat in unit.flats)


def _gather(flat: PlannedFlat, element_bytes: int) -> Traffic:
    """Bring the shards together inside a sharding group."""
    others = flat.layout.num_shards - 1
    return Traffic(sent_bytes=others * flat.layout.shard_numel * element_bytes, calls=1) if others else Traffic()


def _reduce(flat: PlannedFlat, zero: ZeroConfig) -> Traffic:
    """Every rank's part to its owner, piece by piece; then what replicas and stage 0 bring together again."""
    total, layout = Traffic(), flat.layout
    if flat.world > 1:
        step = piece_numel(flat.world, zero.bucket_bytes, flat.dtype.itemsize)
        total += Traffic(
            sent_bytes=(flat.world - 1) * layout.part_numel * flat.dtype.itemsize,
            calls=len(pieces(layout.part_numel, step)),
        )
    kept_bytes = flat.gradient_dtype(zero).itemsize
    if layout.replicas > 1:
        total += Traffic(sent_bytes=(layout.replicas - 1) * layout.part_numel * kept_bytes, calls=1)
    return total if zero.row.optimizer else total + _gather(flat, kept_bytes)
