"""What a model is made of, as the runtime will cut it: units, their flats, and each flat's layout.

ZeRO sections 5 and 7.2. The very functions of `trivium.zero` decide; the model may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from trivium.base.errors import ConfigError
from trivium.zero.placement import Cut, Layout, ZeroConfig, lay_out
from trivium.zero.units import FlatKey, Units, UnitSpec, assign, shared_units


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """A model's units before anything is cut; the same for every stage and number of ranks.

    ``numels`` holds the elements of each parameter by name, ``keep`` the units that stay gathered until backward.
    ``whole`` is Ψ where experts on other ranks are not in here; ``ep`` the degrees that it was taken for.
    """

    specs: tuple[UnitSpec, ...]
    numels: Mapping[str, int]
    keep: frozenset[str]
    module_buffer_bytes: int
    tied: frozenset[str] = field(default=frozenset())
    whole: int | None = None
    ep: int | tuple[int, ...] = 1

    @cached_property
    def num_parameters(self) -> int:
        """Ψ: all parameters, tied ones once."""
        return sum(self.numels.values()) if self.whole is None else self.whole

    @cached_property
    def num_trainable(self) -> int:
        """Elements that receive gradients."""
        return sum(
            self.numels[name]
            for spec in self.specs
            for key, names in spec.flats.items()
            if key.trainable
            for name in names
        )

    def with_dtype(self, dtype: torch.dtype) -> Inventory:
        """The same model with every floating parameter in ``dtype``."""
        specs = []
        for spec in self.specs:
            flats: dict[FlatKey, list[str]] = {}
            for key, names in spec.flats.items():
                flats.setdefault(replace(key, dtype=dtype), []).extend(names)
            specs.append(UnitSpec(name=spec.name, module=spec.module, flats=flats))
        return replace(self, specs=tuple(specs))


def take(model: nn.Module, *, units: Units = "auto", owner: Mapping[int, tuple[int, Cut]] | None = None) -> Inventory:
    """The inventory of ``model``, on any device. ``owner`` as in `trivium.zero.units.assign`; None: one element-wise
    optimizer over everything."""
    named = dict(model.named_parameters())
    one: dict[int, tuple[int, Cut]] = {id(parameter): (0, "element") for parameter in named.values()}
    specs = assign(model, units, one if owner is None else owner)
    times: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        times[id(parameter)] = times.get(id(parameter), 0) + 1
    return Inventory(
        specs=tuple(specs),
        numels={name: parameter.numel() for name, parameter in named.items()},
        keep=frozenset(shared_units(model, specs)),
        module_buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        tied=frozenset(name for name, parameter in named.items() if times[id(parameter)] > 1),
    )


@dataclass(frozen=True, kw_only=True)
class PlannedFlat:
    """One flat buffer: its parameters and their cut over ``world`` ranks of ``axis``, every ``stride``-th rank."""

    names: tuple[str, ...]
    layout: Layout
    dtype: torch.dtype
    trainable: bool
    optimized: bool
    axis: str
    world: int
    stride: int = 1

    @property
    def low_precision(self) -> bool:
        """Whether an fp32 master copy is kept."""
        return self.dtype in (torch.float16, torch.bfloat16)

    def gradient_dtype(self, zero: ZeroConfig) -> torch.dtype:
        """What the reduced gradient is kept in."""
        return torch.float32 if zero.gradient_dtype == "float32" and self.low_precision else self.dtype

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole flat in the parameters' dtype, padding included."""
        return self.layout.numel * self.dtype.itemsize

    def held_numel(self, rank: int, *, sharded: bool) -> int:
        """Elements of parameters (no padding) that ``rank`` holds: all, or what lies in its shard."""
        if not sharded:
            return sum(self.layout.numels)
        shard = rank // self.stride % self.layout.num_shards
        found = (self.layout.overlap(index, shard) for index in range(len(self.layout.numels)))
        return sum(overlap.length for overlap in found if overlap is not None)


@dataclass(frozen=True, kw_only=True)
class PlannedUnit:
    """A unit and its flats; ``keep``: gathered from forward to backward."""

    name: str
    keep: bool
    flats: tuple[PlannedFlat, ...]

    @property
    def whole_bytes(self) -> int:
        """Bytes of the gathered unit."""
        return sum(flat.whole_bytes for flat in self.flats)

    @property
    def trainable_bytes(self) -> int:
        """Bytes of the gradients that one rank computes for the unit, in the parameters' dtype."""
        return sum(sum(flat.layout.numels) * flat.dtype.itemsize for flat in self.flats if flat.trainable)


def cut(inventory: Inventory, zero: ZeroConfig, axes: Mapping[str, int]) -> tuple[PlannedUnit, ...]:
    """Lay every flat out over its axis; ``axes`` gives the number of ranks of each, ``{"dp": 64}``."""
    return tuple(
        PlannedUnit(
            name=spec.name,
            keep=spec.name in inventory.keep,
            flats=tuple(_flat(inventory, key, names, zero, axes) for key, names in spec.flats.items()),
        )
        for spec in inventory.specs
    )


def _flat(
    inventory: Inventory, key: FlatKey, names: Sequence[str], zero: ZeroConfig, axes: Mapping[str, int]
) -> PlannedFlat:
    world = axes.get(key.axis)
    if world is None:
        raise ConfigError(f"{names[0]} is reduced over axis {key.axis!r}, whose size is not known; given: {dict(axes)}")
    inside = min(zero.shard_size or world, world)
    if world % inside:
        raise ConfigError(f"zero.shard_size={inside}: {world} ranks cannot be cut into groups of {inside}")
    layout = lay_out([inventory.numels[name] for name in names], inside, key.dtype.itemsize, key.cut, world // inside)
    return PlannedFlat(
        names=tuple(names),
        layout=layout,
        dtype=key.dtype,
        trainable=key.trainable,
        optimized=key.optimizer is not None,
        axis=key.axis,
        world=world,
        stride=max(1, axes.get("dp", world) // world),
    )
