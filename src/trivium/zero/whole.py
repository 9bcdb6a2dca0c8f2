"""A sharded model's parameters whole again: in place for a while, one by one, or all of them on rank 0.

ZeRO section 5.3 gathers a layer just before it runs; this is the same for someone who wants to read or write.

[Note: names of experts]
A rank has the modules of its own experts only, each named by its global number. The bare model has all of them: its
order of names is that of every rank's names put together, module by module, in the order of ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trivium.base.errors import ConfigError, MismatchError
from trivium.dist.shard import ShardMap, shard_map_of
from trivium.zero.conductor import Meeting
from trivium.zero.engine import Engine
from trivium.zero.unit import Unit
from trivium.zero.units import names_by_identity


@dataclass(kw_only=True)
class ZeroMap(ShardMap):
    """The shard map of a module that `shard` cut, with the engine behind it."""

    engine: Engine


def engine_of(module: nn.Module) -> Engine:
    """The engine of a sharded module or of a module inside one."""
    found = shard_map_of(module)
    if not isinstance(found, ZeroMap):
        raise ConfigError(f"this {type(module).__name__} is not sharded: call trivium.zero.shard first")
    return found.engine


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A module's parameters whole, at any stage: readable, and writable if every rank writes the same. Collective.

    What was written stays, at every stage alike, also where the block ends with an error.
    """
    engine = engine_of(module)
    mine = {id(param) for param in module.parameters()}
    units = [unit for unit in engine.units if any(id(param) in mine for flat in unit.flats for param in flat.params)]
    with _visited(engine, units):
        try:
            yield
        finally:
            with torch.no_grad():
                for unit in units:
                    for flat in unit.flats:
                        flat.absorb()


def iter_full(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical name and whole value of every parameter, one unit gathered at a time, then buffers. Collective.

    Experts of other ranks come too, after their unit's other parameters: every rank sees the same names. The tensor is
    a view that is valid until the next one is asked for. Order is by unit.
    """
    engine = engine_of(model)
    names = {id(param): name for name, param in model.named_parameters()}
    apart = _apart(model, engine)
    for unit in engine.units:
        inside = [(names[id(p)], p) for flat in unit.flats if flat.shared for p in flat.params if id(p) in names]
        others = [one for one in apart if one.unit == unit.number]
        if inside or others:
            with _visited(engine, [unit]):
                for name, param in inside:
                    yield name, param.detach()
                for one in others:
                    yield one.names[0], _shared(engine, one)
    scattered = {name for one in apart for name in one.names if one.unit < 0}
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name not in scattered)
    for one in apart:
        if one.unit < 0:
            yield one.names[0], _shared(engine, one)


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """On rank 0 exactly the bare module's ``state_dict`` (all experts, tied names twice, buffers too) as host tensors;
    elsewhere {}.

    Collective; gathers one unit at a time.
    """
    engine = engine_of(model)
    first = engine.control.rank == 0
    values: dict[str, Any] = {name: tensor.cpu().clone() for name, tensor in iter_full(model) if first}
    keys = {key: extra for key, extra in _state_keys(model)}
    extras = [key for key, extra in keys.items() if extra is not None]
    told = engine.control.all_gather_json([_aliases(model), list(keys), extras])
    if not first:
        return {}
    for tied, _, _ in told:
        for canonical, *others in tied:
            values.update((name, values[canonical]) for name in others)
    return {key: _state_of(key, keys, values, told) for key in put_together([every for _, every, _ in told])}


def put_together(lists: Sequence[Sequence[str]]) -> list[str]:
    """The names of the bare module, from those that each rank has; see [Note: names of experts]."""
    parts = [[(head, rest) for head, _, rest in (name.partition(".") for name in names)] for names in lists]
    order: list[str] = []
    for part in parts:
        heads = list(dict.fromkeys(head for head, _ in part))
        at = len(order)
        for head in reversed(heads):
            if head in order:
                at = order.index(head)
            else:
                order.insert(at, head)
    found: list[str] = []
    for head in order:
        inside = [[rest for one, rest in part if one == head] for part in parts]
        if any("" in rests for rests in inside):
            found.append(head)
        found += [
            f"{head}.{name}" for name in put_together([[r for r in rests if r] for rests in inside if any(rests)])
        ]
    return found


def _aliases(model: nn.Module) -> list[list[str]]:
    """All names of each parameter and buffer that has several."""
    names: dict[int, list[str]] = {}
    for each in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in each:
            names.setdefault(id(tensor), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _state_of(key: str, keys: dict[str, Any], values: dict[str, Any], told: Sequence[Any]) -> Any:
    if key in values:
        return values[key]
    extra = keys.get(key)
    if extra is None:
        ranks = [rank for rank, (_, _, extras) in enumerate(told) if key in extras]
        raise ConfigError(f"{key} is an extra state of a module on ranks {ranks} only: it cannot be sent to rank 0")
    return extra()


@dataclass(frozen=True, kw_only=True)
class _Apart:
    """What ``owner`` has and not all data-parallel ranks: a parameter of unit number ``unit``, or a buffer (-1)."""

    names: tuple[str, ...]
    unit: int
    dtype: torch.dtype
    shape: torch.Size
    owner: int
    mine: torch.Tensor | None


def _apart(model: nn.Module, engine: Engine) -> list[_Apart]:
    """What only some ranks have, in one order on all. Collective; sends names."""
    if all(flat.shared for flat in engine.flats):
        return []
    units = {
        id(param): unit.number
        for unit in engine.units
        for flat in unit.flats
        if not flat.shared
        for param in flat.params
    }
    all_names = names_by_identity(model)
    mine: dict[str, torch.Tensor] = {}
    rows: list[list[Any]] = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) in units or name not in all_names:
            mine[name] = tensor
            names = all_names.get(name, (name,))
            rows.append([list(names), units.get(id(tensor), -1), str(tensor.dtype)[6:], list(tensor.shape)])
    everyone = engine.control.all_gather_json(rows)
    known: dict[str, tuple[int, list[Any]]] = {}
    holders: dict[str, int] = {}
    for rank, told in enumerate(everyone):
        for row in told:
            known.setdefault(row[0][0], (rank, row))
            holders[row[0][0]] = holders.get(row[0][0], 0) + 1
    return [
        _Apart(
            names=tuple(known[name][1][0]),
            unit=known[name][1][1],
            dtype=getattr(torch, known[name][1][2]),
            shape=torch.Size(known[name][1][3]),
            owner=known[name][0],
            mine=mine.get(name),
        )
        for name in put_together([[row[0][0] for row in told] for told in everyone])
        if known[name][1][1] >= 0 or holders[name] < len(everyone)
    ]


def _shared(engine: Engine, one: _Apart) -> torch.Tensor:
    """The value that its owner sends to everyone."""
    if one.mine is not None and one.owner == engine.data.rank:
        value = one.mine.detach().contiguous()
    else:
        value = torch.empty(one.shape, dtype=one.dtype, device=engine.data.link.device)
    if value.numel():
        engine.data.broadcast(value, src=one.owner, phase="visit")
    return value


@contextmanager
def _visited(engine: Engine, units: Sequence[Unit]) -> Iterator[None]:
    """Hold ``units`` gathered and pinned inside the block."""
    wanted = zlib.crc32(repr([unit.number for unit in units]).encode())
    for rank, row in enumerate(engine.conductor.meet(Meeting.VISIT, [wanted])):
        if row[1] != wanted:
            raise MismatchError(
                f"ranks gather different modules: rank {engine.control.ranks[rank]} others than rank "
                f"{engine.control.ranks[engine.control.rank]}, which gathers {[unit.name or 'root' for unit in units]}"
            )
    held = [unit.held for unit in units]
    for unit in units:
        unit.pins += 1
        if not unit.whole:
            unit.start_gather("visit")
            unit.finish_gather()
    try:
        yield
    finally:
        for unit, was_held in zip(units, held, strict=True):
            unit.pins -= 1
            if not was_held:
                unit.release()


def _state_keys(model: nn.Module) -> Iterator[tuple[str, Callable[[], Any] | None]]:
    """The keys of the bare module's ``state_dict``; what gives a module's extra state comes with its key."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, param in module._parameters.items():
            if param is not None:
                yield dot + name, None
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield dot + name, None
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield dot + "_extra_state", module.get_extra_state
